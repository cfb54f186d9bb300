"""Conversations out of the package chatterbot-corpus (BSD 3-Clause), as data for training.

Its English files hold 2,000 conversations, most of them questions with an answer. One file repeats
ten of them a hundred times, and questions come with several answers: drawing at random what is held
out would put most of it among what is trained on.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

PACKAGE, LICENCE = "chatterbot-corpus", "BSD-3-Clause"
MISSING = "the conversations need two packages: pip install 'gemma-jax[finetune]'"

Turns = tuple[str, ...]


def conversations() -> list[Turns]:
    """All English ones, once each; a user has the first word, a model the last."""
    try:
        import yaml

        folder = files("chatterbot_corpus").joinpath("data", "english")
    except ImportError:
        raise ImportError(MISSING) from None
    found: dict[Turns, None] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yml"):
            for turns in yaml.safe_load(file.read_text("utf-8"))["conversations"]:
                turns = tuple(str(turn).strip() for turn in turns[: len(turns) // 2 * 2])
                if turns and all(turns):
                    found[turns] = None
    return list(found)


def split(talks: Iterable[Turns], every: int = 10) -> tuple[list[Turns], list[Turns]]:
    """Conversations to train on, and one in ten, by its first question, that is held out.

    What has any turn in common with one that is held out, but for case and signs, is in neither.
    """
    talks = list(talks)
    held_out = [talk for talk in talks if int(digest([talk[0]]), 16) % every == 0]
    seen = {_plain(turn) for talk in held_out for turn in talk}
    return [talk for talk in talks if not seen & {_plain(turn) for turn in talk}], held_out


def digest(texts: Iterable[str]) -> str:
    """Beginning of the SHA-256 of texts, but for case and signs."""
    return hashlib.sha256("\0".join(map(_plain, texts)).encode()).hexdigest()[:16]


def write(folder: Path) -> dict[str, str]:
    """Makes `train.jsonl` and `held_out.jsonl` in a folder; says what they are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    talks = conversations()
    for name, chosen in zip(("train", "held_out"), split(talks)):
        lines = "".join(json.dumps(row(talk), ensure_ascii=False) + "\n" for talk in chosen)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return {
        "package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "licence": LICENCE,
        "digest": digest(turn for talk in talks for turn in talk),
    }


def row(talk: Turns) -> dict[str, list[dict[str, str]]]:
    """One line of a file of examples."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(talk)]}


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
