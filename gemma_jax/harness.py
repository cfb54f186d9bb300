"""lm-eval's door to our models: the model `gemma-jax` in its registry.

lm-eval knows only models that have been registered in the same process, and has no plugins. So:

    python -m gemma_jax.harness run --model gemma-jax --model_args model=gemma3-270m --tasks ...

is lm-eval's own command line with this module imported; in Python, import it before
`lm_eval.simple_evaluate(model="gemma-jax", ...)`, or give that a `GemmaJax`.
"""

import os
from collections.abc import Sequence
from typing import Any

from gemma_jax.decoder.model import Gemma
from gemma_jax.evaluation.answerer import Answerer, Ids
from gemma_jax.loading import load_model, load_tokenizer
from gemma_jax.peft import load_adapter
from gemma_jax.text import Tokenizer

LM_EVAL_DEVICE = "cuda:0"  # what its command line says where the user says nothing
MISSING = 'evaluate needs lm-eval: pip install "gemma-jax[eval]"'

try:
    import lm_eval.models  # noqa: F401  # else lm-eval finds ours in its registry, and no more
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    if error.name is not None and error.name.partition(".")[0] != "lm_eval":
        raise
    raise ImportError(MISSING) from None


@register_model("gemma-jax")
class GemmaJax(Answerer, TemplateLM):
    """A model for lm-eval.

    Args:
      model: A catalog name, a folder or a file; or a model, with its tokenizer.
      batch_size: Texts that are written at a time; "auto": 8. Log-likelihoods need no such number.
      device: Refused, but for what lm-eval's command line gives every model: JAX finds its devices
        itself.
      max_batch_size: Refused.
      options: See `gemma_jax.LoadOptions` (`dtype`, `weights`, `cache_dtype`, ...), and `adapter`,
        a PEFT folder.
    """

    def __init__(
        self,
        model: str | os.PathLike | Gemma,
        tokenizer: Tokenizer | None = None,
        *,
        max_length: int | None = None,
        batch_size: int | str = "auto",
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        progress=None,
        **options: Any,
    ):
        if device not in (None, LM_EVAL_DEVICE):
            raise ValueError(f"{device=}: JAX finds its devices itself; leave it out")
        if max_batch_size is not None:
            raise ValueError(f"{max_batch_size=}: batches have no automatic size; leave it out")
        TemplateLM.__init__(self)
        self._source = str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
        if not isinstance(model, Gemma):
            model, tokenizer = _load(model, tokenizer, options)
        elif options:
            raise ValueError(f"{next(iter(options))}: says how to load, but the model is loaded")
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer beside it")
        Answerer.__init__(
            self,
            model,
            tokenizer,
            max_length=max_length,
            batch_size=_whole(batch_size),
            seed=seed,
            progress=progress,
        )

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> Ids:
        """Ids of a text; BOS in front, once, unless the flag says no."""
        return self.tokenizer.encode(string, bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval writes down of the template; one by name there is not."""
        if isinstance(chat_template, str):
            raise ValueError(f"chat template {chat_template!r}: there is one alone; name none")
        own = self.tokenizer.chat_template
        return "Gemma 3, built in" if own is None else own.text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Ids, Ids]], **_
    ) -> list[tuple[float, bool]]:
        return self.loglikelihood_ids([(context, ids) for _, context, ids in requests])


def _load(
    source: str | os.PathLike, tokenizer: Tokenizer | None, options: dict[str, Any]
) -> tuple[Gemma, Tokenizer]:
    options = dict(options)
    adapter = options.pop("adapter", None)
    model = load_model(source, **options)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model, tokenizer or load_tokenizer(source)


def _whole(batch_size: int | str) -> int:
    if batch_size == "auto":
        return 8
    try:
        return int(batch_size)
    except ValueError:
        raise ValueError(f"{batch_size=} must be a number, or auto") from None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
