"""Log-probabilities in the two forms of the API."""

from collections.abc import Sequence

from gemma_jax.serving.text_track import Token, spelled
from gemma_jax.text import Tokenizer

LOWEST = -9999.0  # what the API has for -inf, which JSON cannot hold


def chat_content(tokenizer: Tokenizer, tokens: Sequence[Token], top: int) -> list[dict]:
    """Of chat: one entry per token."""
    return [
        {
            **_entry(tokenizer, token.id, token.log_prob),
            "top_logprobs": [_entry(tokenizer, i, value) for i, value in token.top[:top]],
        }
        for token in tokens
    ]


def completion_lists(
    tokenizer: Tokenizer, tokens: Sequence[Token], top: int, offset: int
) -> dict[str, list]:
    """Of completions: parallel lists; `offset` is where the text of the answer begins."""
    lists: dict[str, list] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
    for token in tokens:
        text, _ = spelled(tokenizer, token.id)
        lists["tokens"].append(text)
        lists["text_offset"].append(max(0, offset + token.begin))  # BOS is no part of a text
        if token.log_prob is None:
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            continue
        lists["token_logprobs"].append(_finite(token.log_prob))
        pairs = [(spelled(tokenizer, i)[0], _finite(value)) for i, value in token.top[:top]]
        lists["top_logprobs"].append(dict(reversed(pairs)))  # of texts met twice, the likelier
    return lists


def _entry(tokenizer: Tokenizer, token: int, log_prob: float) -> dict:
    text, data = spelled(tokenizer, token)
    return {"token": text, "logprob": _finite(log_prob), "bytes": data}


def _finite(value: float) -> float:
    return value if value > LOWEST else LOWEST
