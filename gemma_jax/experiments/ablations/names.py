"""The ablations by name. A new one is a few configs; notebook 05 shows one."""

from dataclasses import replace

from gemma_jax.config import AltUpConfig, GemmaConfig, LayerSpec, PerLayerConfig
from gemma_jax.experiments.ablations import facts
from gemma_jax.experiments.ablations.ablation import Ablation, Recipe
from gemma_jax.experiments.ablations.facts import Facts
from gemma_jax.experiments.ablations.recall import VOCABULARY

LAYERS, WINDOW, D_FF = 6, 16, 128
NEAR_THETA, FAR_THETA = 1e4, 1e6


def layers(
    ratio: int | None,
    *,
    window: int | None = WINDOW,
    theta: float = FAR_THETA,
    scale: float = 1.0,
    d_ff: int = D_FF,
    count: int = LAYERS,
) -> tuple[LayerSpec, ...]:
    """`ratio` local layers, then a global one, and so on; `None`: local ones alone. Without a
    window the local layers see everything, too."""
    near = LayerSpec(
        kind="local" if window else "global", window=window, rope_theta=NEAR_THETA, d_ff=d_ff
    )
    far = LayerSpec(kind="global", rope_theta=theta, rope_scale=scale, d_ff=d_ff)
    return tuple(
        far if ratio is not None and (i + 1) % (ratio + 1) == 0 else near for i in range(count)
    )


BASE = GemmaConfig(
    vocab_size=VOCABULARY,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    layers=layers(5),
    max_positions=1024,
    qk_norm=True,
    post_norms=True,
)
SMALL = replace(
    BASE,
    vocab_size=facts.VOCABULARY,
    d_model=32,
    num_heads=2,
    num_kv_heads=1,
    layers=layers(5, d_ff=64),
)
ASKED = Recipe(steps=600, batch=16, task=Facts())
NORMS = {
    "QK norm": SMALL,
    "soft caps": replace(SMALL, qk_norm=False, attn_soft_cap=50.0, final_soft_cap=30.0),
    "neither": replace(SMALL, qk_norm=False),
}
PARTS = {
    "altup": AltUpConfig(num_streams=2),
    "laurel_rank": 8,
    "per_layer": PerLayerConfig(width=8, vocab_size=facts.VOCABULARY),
}

ABLATIONS: dict[str, Ablation] = {
    "local-global": Ablation(
        "layers that see a window of 16 tokens, to each that sees everything",
        {
            "all global": replace(BASE, layers=layers(0)),
            "1:1": replace(BASE, layers=layers(1)),
            "2:1": replace(BASE, layers=layers(2)),
            "5:1": BASE,
        },
    ),
    "window": Ablation(
        "how many tokens the local layers see, at five of them to a global one",
        {
            **{str(n): replace(SMALL, layers=layers(5, window=n, d_ff=64)) for n in (4, 8, 16, 32)},
            "full": replace(SMALL, layers=layers(5, window=None, d_ff=64)),
        },
        ASKED,
    ),
    "qk-norm": Ablation(
        "norms of queries and keys, soft caps on scores and logits, or neither, at two rates",
        {**NORMS, **{f"{name}, rate x 10": cfg for name, cfg in NORMS.items()}},
        ASKED,
        {f"{name}, rate x 10": replace(ASKED, rate=6e-2) for name in NORMS},
    ),
    "gemma3n-parts": Ablation(
        "AltUp, LAuReL and per-layer embeddings: none of them, each alone, all",
        {
            "none": SMALL,
            "AltUp": replace(SMALL, altup=PARTS["altup"]),
            "LAuReL": replace(SMALL, laurel_rank=PARTS["laurel_rank"]),
            "per-layer": replace(SMALL, per_layer=PARTS["per_layer"]),
            "all": replace(SMALL, **PARTS),
        },
        ASKED,
    ),
}
