"""Trains the smallest Gemma 3n, and with it the models inside it.

    python -m gemma_jax.experiments.elastic.train OUT

writes a Hugging Face folder to OUT, with the held-out text and `results.json` beside the weights.
About a quarter of an hour on two CPU cores. The text comes with Python (see `corpus.py`).

Every step lowers the mean of three losses on the same rows (MatFormer; Devvrit et al., 2023): that
of the whole model; of the slice that is to it what Gemma 3n's E2B is to E4B; and of the model with
narrower layers, every second time of half their width, else each of a whole, a half or a quarter at
random. Two of the slices are trained on their own as well, on the same rows for as many steps:
`"separate"` in the results.
"""

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gemma_jax as gj
from gemma_checkpoints import save_hf
from gemma_jax.config import AltUpConfig, GemmaConfig, LayerSpec, PerLayerConfig, share_kv
from gemma_jax.experiments.elastic.corpus import digest, documents, split
from gemma_jax.matformer import Slice, at, slice_config, slice_model
from gemma_jax.text import Tokenizer
from gemma_jax.text.train_vocabulary import train_vocabulary
from gemma_jax.training.objectives import elastic
from gemma_jax.training.optimizers import muon
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable

STEPS, BATCH, LENGTH, RATE = 500, 4, 256, 1e-2
LAYERS, D_FF = 10, 256
SLICES = {
    "full": Slice(ffn_widths=(D_FF,) * LAYERS),
    "half": Slice(ffn_widths=(D_FF // 2,) * LAYERS),
    "e2b": Slice(ffn_widths=(D_FF // 2,) * 5, skip_layers=(5, 6, 7, 8, 9)),
    "shared": Slice(ffn_widths=(D_FF,) * 5 + (D_FF // 4,) * 5),  # can share the model's cache
    "quarter": Slice(ffn_widths=(D_FF // 4,) * LAYERS),
}


def train_tokenizer(texts: list[str]) -> bytes:
    """The content of a `tokenizer.model`: 256 bytes, and the commonest pieces of the text."""
    lines = (line for text in texts for line in text.splitlines() if line)
    options = {"character_coverage": 0.999, "allow_whitespace_only_pieces": True}
    return train_vocabulary(lines, 1024, ["\n"], **options)


def config(tokenizer: Tokenizer) -> GemmaConfig:
    """Gemma 3n in small, with all of its parts: two blocks of five layers, the second one sharing.

    Sparse layers keep a fifth of their channels, not a twentieth: a quarter of a layer would be
    left with three.
    """

    def spec(i: int) -> LayerSpec:
        wide = (i + 1) % 5 == 0
        return LayerSpec(
            kind="global" if wide else "local",
            window=None if wide else 64,
            rope_theta=1e6 if wide else 1e4,
            d_ff=D_FF,
            sparsity=0.8 if i < 3 else 0.0,
        )

    return GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        query_pre_attn_scalar=1,
        layers=share_kv([spec(i) for i in range(LAYERS)], 5),
        max_positions=LENGTH,
        qk_norm=True,
        post_norms=True,
        final_soft_cap=30.0,
        optional_final_cap=True,
        scale_plus_one=False,
        v_norm=True,
        altup=AltUpConfig(num_streams=3),
        laurel_rank=8,
        per_layer=PerLayerConfig(width=8, vocab_size=tokenizer.vocab_size),
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Ids of all texts, one after another, each with an end."""
    return np.array([i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]])


def rows(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """All of the text in order, `[rows, LENGTH]`, each row after <bos>; what is left over goes."""
    text_BT = ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)].reshape(-1, LENGTH - 1)
    return np.insert(text_BT, 0, tokenizer.bos_id, axis=1).astype(np.int32)


def random_rows(tokenizer: Tokenizer, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A batch of training, `[BATCH, LENGTH]`: text from anywhere, each row after <bos>."""
    first_B1 = random.integers(0, len(ids) - LENGTH + 2, (BATCH, 1))
    tokens_BT = np.full((BATCH, LENGTH), tokenizer.bos_id, np.int32)
    tokens_BT[:, 1:] = ids[first_B1 + np.arange(LENGTH - 1)]
    return tokens_BT


def train(
    tokenizer: Tokenizer,
    cfg: GemmaConfig,
    ids: np.ndarray,
    steps: int,
    seed: int,
    nested: Slice | None = None,
) -> gj.Gemma:
    """Muon on matrices, Adam on the rest. With `nested`, that slice and narrow layers learn too."""
    model = gj.Gemma(cfg, rngs=nnx.Rngs(seed), layout="unrolled")
    for block in model.blocks[0]:
        # Scores are not divided by anything: sharp ones are for training to find.
        norm = block.attn.q_norm
        norm.scale[...] = norm.scale[...] * cfg.head_dim**-0.5
    rate = optax.warmup_cosine_decay_schedule(0, RATE, steps // 20, steps, RATE / 100)
    trained, frozen, join = trainable(model)
    objective = partial(elastic, submodels=() if nested is None else (nested,))
    init, step = make_step(objective, muon(model, rate), join)
    state, step = init(trained, jax.random.key(seed)), jax.jit(step, donate_argnums=0)

    random, start = np.random.default_rng(seed), time.perf_counter()
    full_L = np.array([spec.d_ff for spec in cfg.layers])
    for i in range(steps):
        tokens_BT = random_rows(tokenizer, ids, random)
        widths_L = full_L // (random.choice([1, 2, 4], len(full_L)) if i % 2 else 2)
        batch = gj.Batch(tokens_BT, ffn_widths_L=None if nested is None else widths_L)
        state, metrics = step(state, frozen, batch)
        if i % 50 == 49:
            seconds = time.perf_counter() - start
            print(f"step {i + 1}: loss {metrics['whole']:.3f}, {seconds:.0f} s", flush=True)
    return join(state.trained, frozen)


def measure(
    model: gj.Gemma, tokenizer: Tokenizer, held_out_BT: np.ndarray, submodel: Slice
) -> dict[str, float]:
    """Loss of a slice on the held-out text, and its size."""
    view, tokens, total = at(model, submodel), held_out_BT[:, 1:].size, 0.0
    # Rows of no weight fill the last batch: one program for all of them.
    filled_BT, weight_BT = (
        np.pad(rows_BT, ((0, -len(held_out_BT) % 16), (0, 0)))
        for rows_BT in (held_out_BT, np.ones_like(held_out_BT))
    )
    for first in range(0, len(filled_BT), 16):
        some_BT, counts_BT = (x[first : first + 16] for x in (filled_BT, weight_BT))
        total += float(gj.loss(view, some_BT, weights_BT=counts_BT)) * counts_BT[:, 1:].sum()
    size = len(tokenizer.decode_bytes(held_out_BT[:, 1:].ravel().tolist()))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(slice_model(model, submodel))),
        "nats_per_token": round(total / tokens, 4),
        "bits_per_byte": round(total / np.log(2) / size, 4),
    }


def agreement(
    model: gj.Gemma, tokenizer: Tokenizer, held_out_BT: np.ndarray, submodels: dict[str, Slice]
) -> dict[str, float]:
    """Share of the model's own next tokens, written greedily, that each slice would write too."""
    prompts = held_out_BT[:64, : LENGTH // 2].tolist()
    done = gj.generate(model, tokenizer, prompts, max_new_tokens=LENGTH // 4, stop_ids=())
    written_BT = np.array([prompt + d.token_ids for prompt, d in zip(prompts, done)], np.int32)

    def share(submodel: Slice) -> float:
        best_BT = gj.forward(at(model, submodel), written_BT).logits.argmax(axis=-1)
        first = len(prompts[0])
        return float((best_BT[:, first - 1 : -1] == written_BT[:, first:]).mean())

    return {
        name: round(share(submodel), 4) for name, submodel in submodels.items() if name != "full"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = documents()
    kept, held_out = split(texts)
    vocabulary = train_tokenizer(kept)
    tokenizer = Tokenizer.from_sentencepiece_bytes(vocabulary)
    cfg, ids = config(tokenizer), encode(tokenizer, kept)
    held_out_BT = rows(tokenizer, encode(tokenizer, held_out))
    print(f"{len(ids):,} tokens to train on, {held_out_BT.size:,} held out")
    start = time.perf_counter()
    nested = train(tokenizer, cfg, ids, args.steps, args.seed, nested=SLICES["e2b"])
    seconds = time.perf_counter() - start
    save_hf(nested, args.out, dtype=jnp.bfloat16)
    (args.out / "tokenizer.model").write_bytes(vocabulary)
    (args.out / "held_out.txt").write_text("\n\n".join(held_out), "utf-8")

    model = gj.load_model(str(args.out), layout="unrolled")
    separate = {}
    for name in ("half", "e2b"):
        print(f"the architecture of {name!r} on its own")
        small = slice_config(cfg, SLICES[name])
        alone = train(tokenizer, small, ids, args.steps, args.seed)
        separate[name] = measure(alone, tokenizer, held_out_BT, Slice.whole(small))
    results = {
        "command": f"python -m gemma_jax.experiments.elastic.train OUT --steps {args.steps} "
        f"--seed {args.seed}",
        "python": platform.python_version(),
        "text": digest(texts),
        "seconds": round(seconds),
        "held_out": {
            name: measure(model, tokenizer, held_out_BT, submodel)
            for name, submodel in SLICES.items()
        },
        "separate": separate,
        "agreement": agreement(model, tokenizer, held_out_BT, SLICES),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
