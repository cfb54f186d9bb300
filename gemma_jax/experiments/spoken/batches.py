"""Batches to train on: questions about clips and about pictures, each with its answer.

Local letters: I clips; M mel bands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from gemma_jax.audio.mel import log_mel
from gemma_jax.config import GemmaConfig
from gemma_jax.experiments.digits.scenes import SIDE
from gemma_jax.experiments.digits.scenes import draw as draw_scene
from gemma_jax.experiments.spoken.clips import AT_MOST, RATE, Clip, draw
from gemma_jax.experiments.spoken.espeak import Speaker
from gemma_jax.experiments.spoken.model import ASKED, END_OF_TURN, FORMS, ask
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import PromptReader
from gemma_jax.text import Tokenizer
from gemma_jax.text.chat import render_next

LENGTH = 58  # tokens of a row
FRAMES = 256  # of the longest clip, and a few


@dataclass(frozen=True)
class Heard:
    """A clip to train on, as the model reads it: mel frames `[T, M]`, and what is said."""

    mel_TM: np.ndarray
    digits: tuple[int, ...]

    def answer(self, question: str) -> str:
        return "".join(map(str, self.digits))


def hear(clip: Clip, cfg: GemmaConfig) -> Heard:
    mel_TM = log_mel(clip.samples, cfg.audio.sounds, cfg.audio.num_mels)
    return Heard(mel_TM.astype(np.float16), clip.digits)


def clips_to_train_on(cfg: GemmaConfig, count: int, seed: int) -> list[Heard]:
    """So many, a quarter of them of one digit."""
    random, speaker = np.random.default_rng(seed), Speaker()
    return [hear(draw(random, speaker, count=1 + i % AT_MOST), cfg) for i in range(count)]


class Rows:
    """Draws batches of questions about clips and about pictures."""

    def __init__(self, tokenizer: Tokenizer, cfg: GemmaConfig, clips: Sequence[Heard]):
        self.tokenizer, self.num_mels = tokenizer, cfg.audio.num_mels
        reader = PromptReader(tokenizer, modalities_of(cfg))
        silence = {"audio": (np.zeros(RATE), RATE), "image": np.zeros((SIDE, SIDE), np.uint8)}
        self.prompt = cache(lambda *asked: ask(reader, *asked, silence[asked[-1]]).token_ids)
        self.by_count = [[c for c in clips if len(c.digits) <= n] for n in range(AT_MOST + 1)]

    def ids(
        self, random: np.random.Generator, name: str, answer: Callable[[str], str]
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation of one question or two, and which of them the model says."""
        form, encode = str(random.choice(FORMS)), self.tokenizer.encode
        questions = random.permutation(ASKED[name])[: 2 if name == "image" and form != "raw" else 1]
        ids, said = [], []
        for turn, question in enumerate(questions):
            if turn:  # begins with the end of the answer before
                asked = encode(render_next({"role": "user", "content": question}, first=False))
            else:
                asked = self.prompt(form, str(question), name)
            answered = encode(answer(question))
            ids += asked + answered
            said += [int(turn > 0), *[0] * (len(asked) - 1), *[1] * len(answered)]
        end = self.tokenizer.eos_id if form == "raw" else self.tokenizer.id_of(END_OF_TURN)
        return [*ids, end], [*said, 1]

    def draw(
        self, random: np.random.Generator, at_most: int, sounds: int, pictures: int
    ) -> tuple[np.ndarray, ...]:
        """Tokens, positions and weights `[B, LENGTH]`; mel frames `[I, FRAMES, M]` and how many of
        each clip are real; pixels `[pictures, 3, SIDE, SIDE]`. No item has more digits.
        """
        pool = self.by_count[at_most]
        clips = [pool[i] for i in random.integers(len(pool), size=sounds)]
        scenes = [draw_scene(random, at_most=min(at_most, 3)) for _ in range(pictures)]
        rows = [self.ids(random, "audio", clip.answer) for clip in clips]
        rows += [self.ids(random, "image", scene.answer) for scene in scenes]
        tokens_BT = np.zeros((len(rows), LENGTH), np.int32)
        positions_BT, weights_BT = (
            np.full_like(tokens_BT, -1),
            np.zeros(tokens_BT.shape, np.float32),
        )
        for row, (ids, said) in enumerate(rows):
            tokens_BT[row, : len(ids)] = ids
            positions_BT[row, : len(ids)] = np.arange(len(ids))
            weights_BT[row, : len(ids)] = said
        mel_ITM = np.zeros((sounds, FRAMES, self.num_mels), np.float32)
        for i, clip in enumerate(clips):
            mel_ITM[i, : len(clip.mel_TM)] = clip.mel_TM
        lengths_I = np.array([len(clip.mel_TM) for clip in clips], np.int32)
        pixels = np.stack([np.tile(scene.picture, (3, 1, 1)) for scene in scenes])
        return tokens_BT, positions_BT, weights_BT, mel_ITM, lengths_I, pixels / np.float32(255)
