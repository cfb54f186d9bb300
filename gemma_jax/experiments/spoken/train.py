"""Trains the smallest Gemma 3n that hears and sees: it writes down spoken digits, and reads others.

    python -m gemma_jax.experiments.spoken.train OUT

writes a folder that `gemma_jax.load` takes to OUT (Orbax: transformers cannot say how long a clip
may be), with `report.json`, sample clips and a picture beside the weights. Needs the extras
`audio`, `notebook` (scikit-learn), `speech` (eSpeak NG) and `vision`.

Each row of a batch is a question about a clip or about a picture of `experiments.digits`, with its
answer; the loss is that of the answers. The first rows have a digit each.

Local letters: I clips; M mel bands.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gemma_jax as gj
from gemma_jax.config import GemmaConfig
from gemma_jax.experiments.spoken.batches import Heard, Rows, clips_to_train_on
from gemma_jax.experiments.spoken.clips import AT_MOST
from gemma_jax.experiments.spoken.measure import measure, save_samples
from gemma_jax.experiments.spoken.model import config, train_tokenizer
from gemma_jax.multimodal.encode import Clips
from gemma_jax.multimodal.placeholders import soft_tokens
from gemma_jax.text import Tokenizer
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.optimizers import muon
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable
from gemma_jax.weights.tree import map_params

STEPS, CLIPS = 1200, 12_000


@dataclass(frozen=True)
class Phase:
    """A stretch of training: how long, next to the first one, how fast, and on which rows."""

    length: float
    rate: float
    sounds: int
    pictures: int
    grows: bool = False


# Pictures are the harder part: a batch needs many before the digits at the sides are told apart.
PHASES = (
    Phase(length=1, rate=5e-3, sounds=24, pictures=16, grows=True),
    Phase(length=0.4, rate=2e-3, sounds=12, pictures=48),
)
HELD_OUT = 240  # clips for the report


def answers(model: gj.Gemma, batch: tuple[jax.Array, ...], key: jax.Array):
    """The objective: next tokens of answers."""
    tokens_BT, positions_BT, weights_BT, mel_ITM, lengths_I, pixels = batch
    inputs = {"audio": Clips(mel_ITM, lengths_I), "image": pixels}
    read = gj.Batch(tokens_BT, positions_BT, soft=soft_tokens(model, tokens_BT, inputs))
    return next_token(model, TrainBatch(read, weights_BT=weights_BT), key)


def train(
    tokenizer: Tokenizer, cfg: GemmaConfig, clips: Sequence[Heard], steps: int, seed: int
) -> gj.Gemma:
    """A model that went through all phases."""
    model = gj.Gemma(cfg, rngs=nnx.Rngs(seed), layout="unrolled")
    for block in model.blocks[0]:
        # Scores are not divided by anything; up to 11, a tiny model can look sharply.
        norm = block.attn.q_norm
        norm.scale[...] = norm.scale[...] * 8**-0.5
    # Else black places are zero in front of every norm, and gradients grow a thousandfold in each.
    bias = model.vision.stem.conv.bias
    bias[...] = 0.1 * jax.random.normal(jax.random.key(seed), bias.shape)
    rows, random = Rows(tokenizer, cfg, clips), np.random.default_rng(seed)
    for phase in PHASES:
        length = max(1, round(phase.length * steps))
        model = learn(model, rows, random, phase, length, seed)
    return model


def learn(
    model: gj.Gemma, rows: Rows, random: np.random.Generator, phase: Phase, steps: int, seed: int
) -> gj.Gemma:
    """Muon on matrices, Adam on the rest; in a phase that grows, single digits come first."""
    schedule = optax.warmup_cosine_decay_schedule(
        0, phase.rate, steps // 20, steps, phase.rate / 100
    )
    trained, frozen, join = trainable(model)
    init, step = make_step(answers, muon(model, schedule), join)
    state, step = init(trained, jax.random.key(seed)), jax.jit(step, donate_argnums=0)

    start = time.time()
    for i in range(steps):
        few = 1 if i < steps // 8 else 2 if i < steps // 4 else AT_MOST
        batch = rows.draw(random, few if phase.grows else AT_MOST, phase.sounds, phase.pictures)
        state, metrics = step(state, frozen, batch)
        if i % 100 == 99:
            seconds = time.time() - start
            print(f"step {i + 1}: loss {metrics['loss']:.3f}, {seconds:.0f} s", flush=True)
    return join(state.trained, frozen)


def publish(
    model: gj.Gemma, tokenizer: Tokenizer, folder: Path, facts: Mapping[str, object], held_out: int
) -> None:
    """Writes the checkpoint, samples, and a report: `facts`, and what is measured of the files."""
    narrow = map_params(model, lambda param: param.get_value().astype(jnp.bfloat16))
    gj.save(narrow, tokenizer, folder)
    save_samples(folder)
    report = json.dumps({**facts, **measure(*gj.load(str(folder)), held_out)}, indent=1)
    (folder / "report.json").write_text(report + "\n", "utf-8")
    print(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="clips for the report")
    args = parser.parse_args()

    tokenizer = Tokenizer.from_sentencepiece_bytes(train_tokenizer())
    cfg = config(tokenizer)
    clips, start = clips_to_train_on(cfg, args.clips, args.seed), time.time()
    model = train(tokenizer, cfg, clips, args.steps, args.seed)
    command = (
        f"python -m gemma_jax.experiments.spoken.train OUT --steps {args.steps} "
        f"--clips {args.clips} --seed {args.seed} --held-out {args.held_out}"
    )
    facts = {"command": command, "training_seconds": round(time.time() - start)}
    publish(model, tokenizer, args.out, facts, args.held_out)


if __name__ == "__main__":
    main()
