"""Blocks of MobileNetV5 as timm writes them, `uir_r1_a3_k5_s2_e6_c24`, and as our configs do.

The part in front of the first `_` is the kind; each other one is a letter and a number. `r` repeats
the block; only its first copy has the stride `s`.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from gemma_jax.encoder_config import AttentionBlock, FusedBlock, InvertedBlock, MobileNetBlock

Stages = tuple[tuple[MobileNetBlock, ...], ...]

# Kind -> class, the letters it must have, and those it may have besides, with their fields.
# `r` and `s` stand in all of them.
_FIELDS = {
    "er": (FusedBlock, {"k": "kernel", "e": "expansion", "c": "channels"}, {}),
    "uir": (
        InvertedBlock,
        {"k": "middle_kernel", "e": "expansion", "c": "channels"},
        {"a": "start_kernel"},
    ),
    "mqa": (
        AttentionBlock,
        {"k": "kv_kernel", "h": "num_heads", "d": "head_dim", "c": "channels"},
        {"v": "kv_stride"},
    ),
}
_TOKEN = re.compile(r"([a-z]+)(\d+(?:\.\d+)?)")


def blocks_from_timm(arch_def: Sequence[Sequence[str]]) -> Stages:
    """The blocks of each stage.

    Raises:
      ValueError: A kind or a part that is not known, or one that timm would build otherwise than
        it reads.
    """
    return tuple(
        tuple(block for i, text in enumerate(stage) for block in _parse(text, first=i == 0))
        for stage in arch_def
    )


def blocks_to_timm(stages: Stages) -> list[list[str]]:
    """The same as timm reads it; `blocks_from_timm` gives `stages` back.

    Raises:
      ValueError: A stage that timm would build otherwise.
    """
    texts = [[_write(block) for block in stage] for stage in stages]
    if blocks_from_timm(texts) != stages:
        raise ValueError("these blocks have numbers that timm's notation cannot tell")
    return texts


def _parse(text: str, *, first: bool) -> list[MobileNetBlock]:
    kind, *parts = text.split("_")
    if kind not in _FIELDS:
        raise ValueError(f"{text}: unknown block {kind!r}; expected {', '.join(_FIELDS)}")
    made, needed, optional = _FIELDS[kind]
    known = needed | optional
    values: dict[str, float] = {}
    for part in parts:
        token = _TOKEN.fullmatch(part)
        if token is None or token[1] not in {*known, "r", "s"} or token[1] in values:
            raise ValueError(f"{text}: cannot use {part!r}; expected {_form(kind)}")
        values[token[1]] = float(token[2]) if token[1] == "e" else _whole(token[2], text)
    if missing := {*needed, "r", "s"} - values.keys():
        raise ValueError(f"{text}: {', '.join(sorted(missing))} missing; expected {_form(kind)}")
    fields = {known[letter]: value for letter, value in values.items() if letter in known}
    stride, repeats = values["s"], values["r"]
    if repeats < 1 or fields["channels"] % 8:
        raise ValueError(f"{text}: r must be at least 1, and c a multiple of 8")
    # timm counts a stage for its fusion where the next one begins with a stride, and ignores
    # strides elsewhere.
    if stride != (2 if first else 1):
        wanted = "2 in the first block of a stage" if first else "1 after the first of a stage"
        raise ValueError(f"{text}: s must be {wanted}")
    block = made(**fields)
    if kind == "mqa":
        if first:
            raise ValueError(f"{text}: a stage must begin with a stride, which attention has not")
        return [block] * repeats
    return [replace(block, stride=stride), *[replace(block, stride=1)] * (repeats - 1)]


def _whole(number: str, text: str) -> int:
    if not number.isdigit():
        raise ValueError(f"{text}: {number} must be an integer")
    return int(number)


def _form(kind: str) -> str:
    """`er_r#_k#_s#_e#_c#`"""
    _, needed, optional = _FIELDS[kind]
    return "_".join([kind, *(f"{letter}#" for letter in ("r", *optional, *needed, "s"))])


def _write(block: MobileNetBlock) -> str:
    kind = next(kind for kind, (made, *_) in _FIELDS.items() if isinstance(block, made))
    _, needed, optional = _FIELDS[kind]
    values = {letter: getattr(block, name) for letter, name in (optional | needed).items()}
    values |= {"r": 1, "s": block.stride}
    order = [letter for letter in "rakhvsedc" if letter in values]
    return "_".join([kind, *(f"{letter}{values[letter]:g}" for letter in order)])
