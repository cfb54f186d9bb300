"""Which requests an engine takes: what no waiting would help is refused at once."""

from collections.abc import Sequence

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.reader import MOST_BEST
from gemma_jax.inference.requests import Request
from gemma_jax.inference.slots import MOST_BIASES
from gemma_jax.multimodal.modality import Modality, check_media
from gemma_jax.resident_adapters import held_adapters


def check_request(
    request: Request, model: Gemma, context: int, modalities: Sequence[Modality]
) -> None:
    """Looks at all that a request asks for.

    Args:
      context: Tokens that a prompt and its continuation may take together.

    Raises:
      ValueError: The first thing that cannot be done.
    """
    _check_prompt(request, model, context, modalities)
    V = model.cfg.vocab_size
    if len(request.logit_bias) > MOST_BIASES:
        raise ValueError(f"{len(request.logit_bias)} biases; at most {MOST_BIASES} are taken")
    if bad := [i for i in request.logit_bias if not 0 <= i < V]:
        raise ValueError(f"logit_bias has id {bad[0]} outside [0, {V}), the vocabulary")
    if not 0 <= request.top_log_probs <= MOST_BEST:
        raise ValueError(f"top_log_probs={request.top_log_probs} must be between 0 and {MOST_BEST}")
    if request.adapter is not None and request.adapter not in held_adapters(model):
        held = ", ".join(held_adapters(model)) or "none"
        raise ValueError(f"no adapter {request.adapter!r}; the model holds {held}")


def _check_prompt(
    request: Request, model: Gemma, context: int, modalities: Sequence[Modality]
) -> None:
    ids, V = request.prompt.token_ids, model.cfg.vocab_size
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    least = 0 if request.prompt_log_probs else 1  # to read a prompt is something by itself
    if request.max_new_tokens < least:
        raise ValueError(f"max_new_tokens={request.max_new_tokens} must be at least {least}")
    if (need := len(ids) + request.max_new_tokens) > context:
        raise ValueError(
            f"{need} tokens needed ({len(ids)} of prompt, {request.max_new_tokens} new), but "
            f"the context holds {context}; shorten the prompt or ask for fewer new tokens"
        )
    placeholders = {modality.placeholder for modality in modalities}
    if min(ids) < 0 or max(set(ids) - placeholders, default=0) >= V:
        raise ValueError(f"the prompt has ids outside [0, {V}), the model's vocabulary")
    if ids[-1] in placeholders:
        raise ValueError("the prompt ends in soft tokens of a file; put text behind it")
    if request.prompt_log_probs and placeholders & set(ids):
        raise ValueError("prompt_log_probs is for prompts of text alone; leave out the media")
    check_media(request.prompt.media, modalities)
