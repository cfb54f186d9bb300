"""Trains the smallest Gemma 3n that hears and sees: it writes down spoken digits, and reads others.

    python -m gemma_jax.experiments.spoken.train OUT

writes a Hugging Face folder to OUT, with `report.json`, sample clips and a picture beside the
weights. Needs the extras `audio`, `notebook` (scikit-learn), `speech` (eSpeak NG) and `vision`.

Each row of a batch is a question about a clip or about a picture of `experiments.digits`, with its
answer; the loss is that of the answers. The first rows have a digit each.

Local letters: I clips; M mel bands.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gemma_jax as gj
from gemma_checkpoints import save_hf
from gemma_jax.audio.mel import log_mel
from gemma_jax.config import GemmaConfig
from gemma_jax.experiments.digits.scenes import QUESTIONS, SIDE
from gemma_jax.experiments.digits.scenes import draw as draw_scene
from gemma_jax.experiments.spoken.clips import AT_MOST, RATE, SECONDS, Clip, draw
from gemma_jax.experiments.spoken.espeak import Speaker
from gemma_jax.experiments.spoken.measure import measure, save_samples
from gemma_jax.experiments.spoken.model import (
    ASKED,
    END_OF_TURN,
    FORMS,
    ask,
    config,
    train_tokenizer,
)
from gemma_jax.multimodal.encode import Clips
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import soft_tokens
from gemma_jax.multimodal.prompts import PromptReader
from gemma_jax.text import Tokenizer
from gemma_jax.text.chat import render_next
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.optimizers import muon
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable

STEPS, CLIPS, RATE_OF_LEARNING = 1200, 12_000, 5e-3
SOUNDS, PICTURES, LENGTH = 24, 16, 58  # rows of a batch of either kind, and their tokens
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
    """Draws batches: questions about clips, and as many about pictures as `PICTURES`."""

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

    def draw(self, random: np.random.Generator, at_most: int) -> tuple[np.ndarray, ...]:
        """Tokens, positions and weights `[B, LENGTH]`; mel frames `[I, FRAMES, M]` and how many of
        each clip are real; pixels `[PICTURES, 3, SIDE, SIDE]`. No item has more digits.
        """
        pool = self.by_count[at_most]
        clips = [pool[i] for i in random.integers(len(pool), size=SOUNDS)]
        scenes = [draw_scene(random, at_most=min(at_most, 3)) for _ in range(PICTURES)]
        rows = [self.ids(random, "audio", clip.answer) for clip in clips]
        rows += [self.ids(random, "image", scene.answer) for scene in scenes]
        tokens_BT = np.zeros((len(rows), LENGTH), np.int32)
        positions_BT, weights_BT = np.full_like(tokens_BT, -1), np.zeros(tokens_BT.shape, np.float32)
        for row, (ids, said) in enumerate(rows):
            tokens_BT[row, : len(ids)] = ids
            positions_BT[row, : len(ids)] = np.arange(len(ids))
            weights_BT[row, : len(ids)] = said
        mel_ITM = np.zeros((SOUNDS, FRAMES, self.num_mels), np.float32)
        for i, clip in enumerate(clips):
            mel_ITM[i, : len(clip.mel_TM)] = clip.mel_TM
        lengths_I = np.array([len(clip.mel_TM) for clip in clips], np.int32)
        pixels = np.stack([np.tile(scene.picture, (3, 1, 1)) for scene in scenes])
        return tokens_BT, positions_BT, weights_BT, mel_ITM, lengths_I, pixels / np.float32(255)


def answers(model: gj.Gemma, batch: tuple[jax.Array, ...], key: jax.Array):
    """The objective: next tokens of answers."""
    tokens_BT, positions_BT, weights_BT, mel_ITM, lengths_I, pixels = batch
    inputs = {"audio": Clips(mel_ITM, lengths_I), "image": pixels}
    read = gj.Batch(tokens_BT, positions_BT, soft=soft_tokens(model, tokens_BT, inputs))
    return next_token(model, TrainBatch(read, weights_BT=weights_BT), key)


def train(
    tokenizer: Tokenizer, cfg: GemmaConfig, clips: Sequence[Heard], steps: int, seed: int
) -> gj.Gemma:
    """Muon on matrices, Adam on the rest; single digits first, then more and more."""
    model = gj.Gemma(cfg, rngs=nnx.Rngs(seed), layout="unrolled")
    for block in model.blocks[0]:
        # Scores are not divided by anything; up to 11, a tiny model can look sharply.
        norm = block.attn.q_norm
        norm.scale[...] = norm.scale[...] * 8**-0.5
    # Else black places are zero in front of every norm, and gradients grow a thousandfold in each.
    bias = model.vision.stem.conv.bias
    bias[...] = 0.1 * jax.random.normal(jax.random.key(seed), bias.shape)
    schedule = optax.warmup_cosine_decay_schedule(
        0, RATE_OF_LEARNING, steps // 20, steps, RATE_OF_LEARNING / 100
    )
    trained, frozen, join = trainable(model)
    init, step = make_step(answers, muon(model, schedule), join)
    state, step = init(trained, jax.random.key(seed)), jax.jit(step, donate_argnums=0)

    rows, random, start = Rows(tokenizer, cfg, clips), np.random.default_rng(seed), time.time()
    for i in range(steps):
        at_most = 1 if i < steps // 8 else 2 if i < steps // 4 else AT_MOST
        state, metrics = step(state, frozen, rows.draw(random, at_most))
        if i % 20 == 19:
            print(f"step {i + 1}: loss {metrics['loss']:.3f}, {time.time() - start:.0f} s", flush=True)
    return join(state.trained, frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=800, help="clips for the report")
    args = parser.parse_args()

    vocabulary = train_tokenizer()
    tokenizer = Tokenizer.from_sentencepiece_bytes(vocabulary)
    cfg = config(tokenizer)
    clips, start = clips_to_train_on(cfg, args.clips, args.seed), time.time()
    save_hf(train(tokenizer, cfg, clips, args.steps, args.seed), args.out, dtype=jnp.bfloat16)
    seconds = round(time.time() - start)
    (args.out / "tokenizer.model").write_bytes(vocabulary)
    save_samples(args.out)
    command = " ".join(
        f"--{name} {getattr(args, name.replace('-', '_'))}"
        for name in ("steps", "clips", "seed", "held-out")
    )
    report = {
        "command": f"python -m gemma_jax.experiments.spoken.train OUT {command}",
        "seconds": seconds,
        **measure(*gj.load(str(args.out)), args.held_out),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
