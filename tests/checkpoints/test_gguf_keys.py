"""Keys of a GGUF header that change the model, as they do in llama.cpp (November 2026).

Sources: `load_hparams` and `load_swa_pattern` in `src/llama-model.cpp`, `load_arch_hparams` in
`src/models/gemma{,2,3,3n}.cpp`, `llama_hparams::set_swa_pattern` in `src/llama-hparams.cpp`.
"""

import math

import numpy as np
import pytest

from gemma_checkpoints.gguf.config import config_from_gguf

SIZES = {
    "block_count": 6, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
    "attention.value_length": 16, "context_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip


def read(arch="gemma3", **keys):
    """The config of a file with these keys; dots are double underscores, `None` leaves one out."""
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    found = {key: value for key, value in (SIZES | changes).items() if value is not None}
    metadata = {f"{arch}.{key}": value for key, value in found.items()}
    return config_from_gguf(metadata | {"general.architecture": arch}, 96)


def kinds(cfg):
    return "".join(spec.kind[0] for spec in cfg.layers)


def ropes(cfg):
    """Kind -> base and scaling of its rope."""
    return {spec.kind: (spec.rope_theta, spec.rope_scale) for spec in cfg.layers}


@pytest.mark.parametrize(
    ("arch", "window", "pattern", "expected"),
    [
        ("gemma3", 8, None, "lllllg"),
        ("gemma3", 8, 3, "llgllg"),
        ("gemma3", 8, 2, "lglglg"),
        ("gemma3", 8, 1, "gggggg"),
        ("gemma3", 8, 0, "llllll"),
        ("gemma3", 8, [1, 1, 0, 0, 1, 0], "llggl" + "g"),
        ("gemma3", 8, [True, False] * 3, "lglglg"),
        ("gemma3", None, None, "gggggg"),
        ("gemma3", 0, None, "gggggg"),
        ("gemma3", None, 3, "gggggg"),
        ("gemma2", 8, None, "lglglg"),
        ("gemma2", None, None, "lglglg"),
        ("gemma2", 8, 3, "llgllg"),
        ("gemma2", 8, [0, 0, 0, 1, 1, 1], "ggglll"),
        ("gemma", None, None, "gggggg"),
    ],
)
def test_which_layers_are_local(arch, window, pattern, expected):
    keys = dict(attention__sliding_window=window, attention__sliding_window_pattern=pattern)
    cfg = read(arch, **keys)
    assert kinds(cfg) == expected
    windows = {spec.window for spec in cfg.layers if spec.kind == "local"}
    assert windows <= {window or 4_096}, "4096 is what gemma2 has by default"


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("gemma3", {}, {"local": (1e4, 1), "global": (1e4, 1)}),
        ("gemma3", {"rope__freq_base": 1e6}, {"local": (1e4, 1), "global": (1e6, 1)}),
        ("gemma3", {"rope__freq_base_swa": 2e5}, {"local": (2e5, 1), "global": (1e4, 1)}),
        ("gemma3", {"rope__scaling__factor": 8.0}, {"local": (1e4, 1), "global": (1e4, 8)}),
        ("gemma3", {"rope__scale_linear": 4.0}, {"local": (1e4, 1), "global": (1e4, 4)}),
        ("gemma3", {"rope__scaling__factor": 0.0}, {"local": (1e4, 1), "global": (1e4, 1)}),
        ("gemma3", {"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0},
         {"local": (1e4, 1), "global": (1e4, 2)}),
        ("gemma2", {"rope__freq_base": 5e5}, {"local": (5e5, 1), "global": (5e5, 1)}),
        ("gemma2", {"rope__freq_base": 5e5, "rope__freq_base_swa": 1e4},
         {"local": (1e4, 1), "global": (5e5, 1)}),
        ("gemma2", {"rope__scaling__factor": 8.0}, {"local": (1e4, 8), "global": (1e4, 8)}),
        ("gemma", {"rope__freq_base": 5e5, "rope__scaling__factor": 2.0,
                   "rope__scaling__type": "linear"}, {"global": (5e5, 2)}),
    ],
)  # fmt: skip
def test_ropes(arch, keys, expected):
    window = {} if arch == "gemma" else {"attention__sliding_window": 8}
    assert ropes(read(arch, **window, **keys)) == expected


def test_without_a_window_every_layer_has_the_global_rope():
    """`freq_base_swa` is not even read then."""
    cfg = read(rope__freq_base=1e6, rope__freq_base_swa=2e5, rope__scaling__factor=8.0)
    assert ropes(cfg) == {"global": (1e6, 8)}


@pytest.mark.parametrize(
    ("arch", "keys", "caps"),
    [
        ("gemma", {}, (None, None)),
        ("gemma2", {}, (50.0, 30.0)),
        ("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0}, (20.0, 9.0)),
        ("gemma3", {}, (None, None)),
        ("gemma3", {"final_logit_softcapping": 30.0}, (None, 30.0)),
        ("gemma3", {"final_logit_softcapping": 0.0}, (None, None)),
    ],
)
def test_soft_caps(arch, keys, caps):
    cfg = read(arch, **keys)
    assert (cfg.attn_soft_cap, cfg.final_soft_cap) == caps


QUANTILE = float(np.float32(1.2815515655446004))  # below it lie nine tenths


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ([QUANTILE] * 2 + [-math.inf] * 4, [0.9] * 2 + [0.0] * 4),
        ([-math.inf] * 6, [0.0] * 6),
        ([0.0] * 6, [0.5] * 6),
        (None, [0.95] * 6),
    ],
)
def test_gemma_3n_says_by_quantiles_how_sparse_it_is(scales, expected):
    """Minus infinity is what the converter makes of no sparsity."""
    cfg = read("gemma3n", **GEMMA3N, activation_sparsity_scale=scales)
    assert [spec.sparsity for spec in cfg.layers] == expected


GEMMA3N = dict(attention__sliding_window=8, embedding_length_per_layer_input=4)


def test_what_gemma_3n_has_besides():
    keys = GEMMA3N | dict(altup__num_inputs=3, altup__active_idx=1)
    cfg = read("gemma3n", **keys, attention__shared_kv_layers=1)
    assert [spec.kv for spec in cfg.layers] == ["own"] * 3 + ["lent", "own", "shared"]
    assert kinds(cfg) == "llll" + "gl" and cfg.final_soft_cap == 30
    assert (cfg.per_layer.width, cfg.per_layer.vocab_size) == (4, 96)
    assert (cfg.altup.num_streams, cfg.altup.active) == (3, 1)
    assert (cfg.query_pre_attn_scalar, cfg.v_norm, cfg.scale_plus_one) == (1, True, False)
    without = read("gemma3n", **GEMMA3N, block_count=25)
    assert [spec.kv for spec in without.layers].count("shared") == 5, "all but 20 in llama.cpp"


def test_lengths_of_heads_have_defaults():
    lengths = dict(attention__key_length=None, attention__value_length=None)
    cfg = read(**lengths, attention__head_count_kv=None)
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.query_pre_attn_scalar) == (16, 4, 16)


def test_one_value_or_one_for_each_layer():
    cfg = read(
        feed_forward_length=[96, 64, 96, 64, 96, 64],
        attention__head_count=[4] * 6,
        attention__head_count_kv=[2] * 6,
    )
    assert [spec.d_ff for spec in cfg.layers] == [96, 64] * 3
    assert (cfg.num_heads, cfg.num_kv_heads) == (4, 2)


@pytest.mark.parametrize("key", ["attention.scale", "use_parallel_residual", "expert_count_x"])
def test_keys_that_llama_cpp_does_not_read_for_gemma_are_refused(key):
    with pytest.raises(ValueError, match=f"^gemma3.{key}: unknown here"):
        read(**{key.replace(".", "__"): 0.5})


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("gemma", {"attention__sliding_window": 8}, "gemma.attention.sliding_window: unknown"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping: unknown"),
        ("gemma3", {"attention__causal": False}, "causal is False; only True is supported"),
        ("gemma3", {"rope__dimension_count": 8}, "dimension_count is 8; only 16 is supported"),
        ("gemma3", {"attention__key_length_swa": 8}, "key_length_swa is 8; only 16"),
        ("gemma3", {"rope__scaling__attn_factor": 2.0}, "attn_factor is 2.0; only 1.0"),
        ("gemma3", {"expert_count": 8}, "expert_count is 8; only 0"),
        ("gemma3", {"rope__scaling__type": "longrope"}, "'longrope' is not 'none' or 'linear'"),
        ("gemma3", {"rope__scaling__type": "none", "rope__scaling__factor": 8.0}, "type is 'none'"),
        ("gemma3", {"attention__head_count_kv": [2, 2, 1, 2, 2, 2]}, "differs from layer to layer"),
        ("gemma3", {"feed_forward_length": [96] * 5}, "lists 5 values for 6 layers"),
        ("gemma3", {**{"attention__sliding_window": 8},
                    "attention__sliding_window_pattern": [1, 0]}, "0 or 1 for each of 6 layers"),
        ("gemma3", {**{"attention__sliding_window": 8},
                    "attention__sliding_window_pattern": -1}, "must be a positive number"),
        ("gemma3n", {}, "gemma3n.attention.sliding_window must be a positive number, got None"),
        ("gemma3n", {"attention__sliding_window": 8, "activation_sparsity_scale": [1.0]},
         "activation_sparsity_scale must hold 6 numbers"),
        ("gemma3n", {"attention__sliding_window": 8,
                     "activation_sparsity_scale": [math.inf] * 6}, "6 numbers below infinity"),
        ("gemma3n", {"attention__sliding_window": 8, "attention__shared_kv_layers": -1},
         "shared_kv_layers must be a positive number, got -1"),
        ("gemma3n", {"attention__sliding_window": 8, "attention__shared_kv_layers": 6},
         "layer before them has keys"),
        ("gemma3n", {"attention__sliding_window": 8, "altup__active_idx": 4}, "active=4 must lie"),
        ("gemma3", {"altup__num_inputs": 4}, "gemma3.altup.num_inputs: unknown here"),
    ],
)  # fmt: skip
def test_what_the_model_here_cannot_be_is_refused(arch, keys, message):
    with pytest.raises(ValueError, match=message):
        read(arch, **keys)


def test_other_kinds_of_file_are_refused():
    metadata = {f"gemma3.{key}": value for key, value in SIZES.items()}
    for kind in ("adapter", "mmproj", "imatrix"):
        names = {"general.architecture": "gemma3", "general.type": kind}
        with pytest.raises(ValueError, match=f"general.type is '{kind}'; expected a 'model'"):
            config_from_gguf(metadata | names, 96)
