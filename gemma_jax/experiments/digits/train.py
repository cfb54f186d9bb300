"""Trains the smallest Gemma 3 that sees: handwritten digits, and questions about them.

    python -m gemma_jax.experiments.digits.train OUT

writes a Hugging Face folder to OUT, with `results.json` and sample pictures beside the weights.
About ten minutes on two CPU cores. Needs the extra `notebook` (scikit-learn, Pillow).

Each row of a batch is one picture and three of the questions in random order, each with its answer;
the loss is that of the answers. The same decoder is trained on the same rows without their pictures
(`"blind"` in the results): what it reaches can be said without looking.

Local letters: Q patches of an image.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from flax import nnx

import gemma_jax as gj
from gemma_checkpoints import save_hf
from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.encoder_config import VisionConfig
from gemma_jax.experiments.digits.scenes import QUESTIONS, SIDE, Scene, draw
from gemma_jax.multimodal.image_prompt import MARKER, PLACEHOLDER, expand
from gemma_jax.multimodal.placeholders import soft_tokens
from gemma_jax.text import Tokenizer
from gemma_jax.text.train_vocabulary import train_vocabulary
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.optimizers import muon
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable

STEPS, BATCH, TURNS, LENGTH = 1200, 64, 3, 56
END_OF_IMAGE = "<end_of_image>"


def train_tokenizer() -> bytes:
    """The content of a `tokenizer.model`: 256 bytes, the words of the questions, and the digits."""
    lines = [f"{question}\n" for question in QUESTIONS] * 30
    symbols = [MARKER, END_OF_IMAGE, PLACEHOLDER, "\n", *"0123456789"]
    return train_vocabulary(lines, 360, symbols, hard_vocab_limit=False)


def config(tokenizer: Tokenizer) -> GemmaConfig:
    """Gemma 3 in small: two local layers and a global one; patches of 4 pixels, 4 x 4 tokens."""
    local = LayerSpec(kind="local", window=512, d_ff=256)
    wide = LayerSpec(kind="global", rope_theta=1e6, d_ff=256)
    return GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=64,
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        query_pre_attn_scalar=8,  # scores up to 11: a tiny model has to be able to look sharply
        layers=(local, local, wide),
        max_positions=1024,
        qk_norm=True,
        post_norms=True,
        vision=VisionConfig(
            d_tower=64,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            image_size=SIDE,
            patch_size=4,
            num_soft_tokens=16,
            image_token=tokenizer.id_of(PLACEHOLDER),
            start_token=tokenizer.id_of(MARKER),
            end_token=tokenizer.id_of(END_OF_IMAGE),
        ),
    )


def sincos_positions(grid: int, width: int) -> jax.Array:
    """`[grid * grid, width]`: waves along both sides, to begin with places told apart."""
    frequencies = 100.0 ** -np.linspace(0, 1, width // 4)
    y_Q1, x_Q1 = np.mgrid[:grid, :grid].reshape(2, -1, 1)
    waves = [f(at * frequencies) for at in (x_Q1, y_Q1) for f in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(waves, axis=1), jnp.float32)


def rows(
    random: np.random.Generator, tokenizer: Tokenizer, cfg: GemmaConfig, at_most: int
) -> tuple[np.ndarray, ...]:
    """Tokens, positions and loss weights `[BATCH, LENGTH]`, and pixels `[BATCH, 3, SIDE, SIDE]`."""
    tokens = np.zeros((BATCH, LENGTH), np.int32)
    positions, weights = np.full_like(tokens, -1), np.zeros_like(tokens, np.float32)
    pixels = np.zeros((BATCH, 3, SIDE, SIDE), np.float32)
    for row in range(BATCH):
        scene = draw(random, at_most=at_most)
        questions = random.permutation(list(QUESTIONS))[:TURNS]
        ids, answers = _conversation(questions, scene, tokenizer, cfg)
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
        weights[row, : len(ids)] = answers
        pixels[row] = scene.picture / np.float32(127.5) - 1
    return tokens, positions, weights, pixels


def _conversation(questions, scene: Scene, tokenizer: Tokenizer, cfg: GemmaConfig):
    """Ids, and which of them belong to an answer."""
    ids, answers = [], []
    for turn, question in enumerate(questions):
        if turn:
            asked = tokenizer.encode("\n" + question)
        elif cfg.vision is None:
            asked = tokenizer.encode(question, bos=True)
        else:
            asked = expand(tokenizer, MARKER + question, [0], cfg.vision)
        answer = [*tokenizer.encode(scene.answer(question)), tokenizer.eos_id]
        ids += asked + answer
        answers += [0] * len(asked) + [1] * len(answer)
    return ids, answers


def answers(model: gj.Gemma, batch: tuple[jax.Array, ...], key: jax.Array):
    """The objective: next tokens of answers, of a model that sees the pictures if it can."""
    tokens, positions, weights, pixels = batch
    soft = None if model.cfg.vision is None else soft_tokens(model, tokens, pixels)
    read = gj.Batch(tokens, positions, soft=soft)
    return next_token(model, TrainBatch(read, weights_BT=weights), key)


def train(tokenizer: Tokenizer, cfg: GemmaConfig, steps: int, seed: int) -> gj.Gemma:
    """Muon on matrices, Adam on the rest; single digits first, then up to three."""
    model = gj.Gemma(cfg, rngs=nnx.Rngs(seed), layout="unrolled")
    if cfg.vision is not None:
        patches = model.vision.tower.patches
        patches.positions[...] = sincos_positions(cfg.vision.grid, cfg.vision.d_tower)
    rate = optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 20, steps, 4e-5)
    trained, frozen, join = trainable(model)
    init, step = make_step(answers, muon(model, rate), join)
    state, step = init(trained, jax.random.key(seed)), jax.jit(step, donate_argnums=0)

    random, start = np.random.default_rng(seed), time.perf_counter()
    for i in range(steps):
        at_most = 1 if i < steps // 8 else 3
        state, metrics = step(state, frozen, rows(random, tokenizer, cfg, at_most))
        if i % 100 == 99:
            seconds = time.perf_counter() - start
            print(f"step {i + 1}: loss {metrics['loss']:.3f}, {seconds:.0f} s", flush=True)
    return join(state.trained, frozen)


def accuracy(
    model: gj.Gemma, tokenizer: Tokenizer, scenes: list[Scene], sees: bool = True
) -> dict[str, float]:
    """Question -> share of scenes answered exactly, greedily, each in a prompt of its own."""
    images = [[scene.picture] for scene in scenes] if sees else None
    return {
        question: float(np.mean([d.text == s.answer(question) for d, s in zip(done, scenes)]))
        for question in QUESTIONS
        for done in [
            gj.generate(model, tokenizer, [question] * len(scenes), images=images, max_new_tokens=8)
        ]
    }


def held_out(count: int) -> list[Scene]:
    random = np.random.default_rng(1)
    return [draw(random, held_out=True) for _ in range(count)]


def save_samples(folder: Path) -> None:
    """`one.png`, `two.png` and `three.png`: the first held-out pictures with so many digits."""
    scenes = held_out(100)
    for count, name in enumerate(("one", "two", "three"), start=1):
        scene = next(scene for scene in scenes if len(scene.digits) == count)
        PIL.Image.fromarray(scene.picture).save(folder / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=500, help="held-out pictures for the results")
    args = parser.parse_args()

    vocabulary = train_tokenizer()
    tokenizer = Tokenizer.from_sentencepiece_bytes(vocabulary)
    cfg = config(tokenizer)
    save_hf(train(tokenizer, cfg, args.steps, args.seed), args.out, dtype=jnp.bfloat16)
    (args.out / "tokenizer.model").write_bytes(vocabulary)
    save_samples(args.out)

    print("the same decoder without pictures")
    blind = train(tokenizer, dataclasses.replace(cfg, vision=None), args.steps // 4, args.seed)
    scenes = held_out(args.scenes)
    results = {
        "command": f"python -m gemma_jax.experiments.digits.train OUT --steps {args.steps} "
        f"--seed {args.seed} --scenes {args.scenes}",
        "accuracy": accuracy(*gj.load(str(args.out)), scenes),
        "blind": accuracy(blind, tokenizer, scenes, sees=False),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
