"""Small files of examples, and models to read them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import tiny

from gemma_jax.text import Tokenizer

DATA = Path(__file__).parent / "data"
WORDS = "the quick brown fox jumps over the lazy dog and does not mind".split()


@cache
def tokenizer() -> Tokenizer:
    """Of 520 pieces, with Gemma 3's markers."""
    return Tokenizer.from_file(DATA / "tokenizer.json")


def reader_cfg():
    return tiny.gemma3(layers=3, vocab_size=540)


def seer_cfg():
    """Images are 4 soft tokens, the windows 3 tokens wide."""
    tok = tokenizer()
    ids = {"start_token": tok.id_of("<start_of_image>"), "end_token": tok.id_of("<end_of_image>")}
    vision = tiny.vision(image_token=530, **ids)
    return tiny.gemma3(layers=3, window=3, vocab_size=540, vision=vision)


def write(path: Path, rows) -> str:
    """The name of a file of these rows: objects, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def picture(path: Path, seed: int = 0, size=(56, 56)) -> str:
    """The name of a file of noise beside the rows."""
    levels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(levels).save(path)
    return path.name


def chat(*texts, **more):
    """A row of turns, the user's first."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts)], **more}


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng([seed, count]).choice(WORDS, count))
