"""How a GGUF file wants its tokens chosen: `general.sampling.*`.

llama.cpp's converter copies them from `generation_config.json`; what is missing is llama.cpp's own.
Source: `common_init_sampler_from_model` in `common/common.cpp`, `common_params_sampling` in
`common/common.h`.
"""

from collections.abc import Mapping

from gemma_jax.inference.sampling import Sampling

PREFIX = "general.sampling."
# Key of ours -> key of theirs, and what llama.cpp takes without it.
USED: Mapping[str, tuple[str, float]] = {
    "temperature": ("temp", 0.8),
    "top_k": ("top_k", 40),
    "top_p": ("top_p", 0.95),
    "min_p": ("min_p", 0.05),
    "repetition_penalty": ("penalty_repeat", 1.0),
}
IRRELEVANT: Mapping[str, str] = {
    "xtc_threshold": "of xtc, whose probability is 0 or refused",
    "mirostat_tau": "of mirostat, which is 0 or refused",
    "mirostat_eta": "of mirostat, which is 0 or refused",
}
# Key -> the values that change nothing; any other is refused.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "penalty_last_n": (-1,),  # all tokens, as here
    "xtc_probability": (0,),
    "mirostat": (0,),
}


def sampling_from_gguf(metadata: Mapping[str, object]) -> Sampling | None:
    """What a header says; `None` where it says nothing.

    Raises:
      ValueError: a value that is impossible, or a key that this library does not do.
    """
    said = {
        key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)
    }
    names = {theirs for theirs, _ in USED.values()}
    numbers: dict[str, float] = {}
    for key, value in said.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise ValueError(f"{PREFIX}{key} is {value!r:.80}, which is not supported; remove it")
        if key not in names and key not in IRRELEVANT and key not in NEUTRAL:
            raise ValueError(f"{PREFIX}{key} is not known here: it may change what the model says")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{PREFIX}{key} must be a number, got {value!r:.80}")
        numbers[key] = value
    if not names & numbers.keys():
        return None
    given = {ours: numbers.get(theirs, default) for ours, (theirs, default) in USED.items()}
    # Stored as float32: 0.7 comes as 0.699999988.
    rounded = {name: round(value, 6) for name, value in given.items()}
    top_k = max(0, int(rounded.pop("top_k")))
    return Sampling(top_k=top_k, **rounded)
