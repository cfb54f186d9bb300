"""Quantised GGUF tensors that stay as they are: every type, every layout, bit for bit."""

import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly
from parity.goldens import assert_close, case
from safetensors.numpy import load_file
from stand_in import Kept, keep
from tiny_checkpoints import DATA, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc
from gemma_checkpoints.gguf import source as gguf_source
from gemma_checkpoints.gguf.blocks import FORMS, to_blocks
from gemma_checkpoints.gguf.decode import decode
from gemma_jax import forward, load_model
from gemma_jax.sharding import TRAINING, Partition, make_mesh
from gemma_jax.weights.tree import flat_params
from gemma_kernels.quantized_matmul import nbytes, quantized_matmul

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
Type = gguf.GGMLQuantizationType
# Made by ggml's own C code: two rows each, one quantised, one of random bits.
BLOCKS = load_file(DATA / "quant" / "blocks.safetensors")
TYPES = sorted(name.removeprefix("in.") for name in BLOCKS if name.startswith("in."))
QUIET = dict(keep=keep, notify=lambda line: None)


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bytes below 60 make every f16 scale finite, whatever its place in the block."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    shape = (rows, columns // block_size * block_bytes)
    return np.random.default_rng(len(kind) + rows).integers(0, 60, shape, np.uint8)


def file_in(kinds, path, cfg=None, **extra):
    """A tiny Gemma 3; `kinds`: name of a tensor -> type of it, `None` for float32."""
    stored = {}

    def encode(name, array):
        kind = kinds(name)
        if kind is None or name.endswith("norm.weight"):
            return array, None
        stored[name] = random_blocks(kind, *array.shape)
        return stored[name], Type[kind]

    cfg = cfg or tiny("gemma3-1b")
    return write_gguf(path, random_model(cfg), "gemma3", encode, **extra), stored


def few_layers(cfg):
    """Two local ones, which are stacked, and a global one; a file lists their kinds one by one."""
    return replace(cfg, layers=(*cfg.layers[:2], cfg.layers[5]))


def matrices(model) -> dict[str, Kept]:
    values = {path: param.get_value() for path, param in flat_params(model).items()}
    kept = {path: value for path, value in values.items() if isinstance(value, Kept)}
    return {".".join(map(str, path)): value for path, value in kept.items()}


def assert_equal_bits(ours, theirs):
    """-0 counts as 0."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal((ours + 0).view(np.uint32), (theirs + 0).view(np.uint32))


def test_the_oracle_has_all_types():
    assert len(TYPES) == 25 and set(FORMS) <= set(TYPES)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in gguf_source.PLAIN])
def test_widened_as_ggml_does(kind):
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks, expected = BLOCKS[f"in.{kind}"], BLOCKS[f"out.{kind}"]
    found = decode(blocks.reshape(-1, block_bytes), kind, block_size)
    assert_equal_bits(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", FORMS)
def test_codes_and_scales_stand_for_what_ggml_makes_of_them(kind):
    _, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = to_blocks(BLOCKS[f"in.{kind}"].reshape(2, -1, block_bytes), kind)
    assert blocks.shape == (2, 512)
    assert_equal_bits(blocks.values(), BLOCKS[f"out.{kind}"])
    assert blocks.form.scale == (np.float32 if kind.endswith("K") else np.float16)
    assert (blocks.form.bits == 4) == kind.startswith("Q4")


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("kind", FORMS)
def test_a_file_of_one_type(kind, layout, tmp_path):
    """Every matrix is kept, in tiles, and stands for what the package decodes."""
    path, stored = file_in(lambda name: kind, tmp_path / "m.gguf")
    told = []
    model = gc.load_weights(path, layout=layout, keep=keep, notify=told.append)
    kept = matrices(model)
    assert not told
    assert sum(nbytes(w.matrix) for w in kept.values()) > 7 * 256 * 256 * 3 / 2
    expected = gguf.dequantize(stored["token_embd.weight"], Type[kind])
    assert_equal_bits(kept["embed.table"].dense(), expected)
    for ours, theirs in {"attn.o": "attn_output", "ffn.down": "ffn_down"}.items():
        tensors = [stored[f"blk.{i}.{theirs}.weight"] for i in range(7)]
        layers = [gguf.dequantize(one, Type[kind]) for one in tensors]
        found = [w for name, w in kept.items() if f"{ours}.w" in name]
        flat = np.concatenate([np.ravel(w.dense()) for w in found])
        assert_equal_bits(np.sort(flat), np.sort(np.ravel(layers)))
        assert all(w.matrix.tiled for w in found)


@pytest.mark.parametrize("kind", FORMS)
def test_the_product_is_that_of_the_widened_matrix(kind, tmp_path):
    path, stored = file_in(lambda name: kind, tmp_path / "m.gguf")
    w = gc.load_weights(path, layout="unrolled", **QUIET).embed.table.get_value().matrix
    x_RI = np.random.default_rng(3).normal(size=(3, 256)).astype(np.float32)
    wide = gguf.dequantize(stored["token_embd.weight"], Type[kind])
    exact = x_RI.astype(np.float64) @ wide.T.astype(np.float64)
    noise = np.abs(np.asarray(jnp.dot(x_RI, wide.T, precision="highest")) - exact).max()
    assert np.abs(np.asarray(quantized_matmul(x_RI, w)) - exact).max() < 2 * noise


def test_rows_where_a_matrix_is_not_made_of_tiles(tmp_path):
    cfg = tiny("gemma3-1b", vocab_size=90)
    path, stored = file_in(lambda name: "Q4_0", tmp_path / "m.gguf", cfg)
    w = gc.load_weights(path, layout="unrolled", **QUIET).embed.table.get_value().matrix
    assert not w.tiled and w.codes.dtype == jnp.int4
    assert_equal_bits(w.dense(), gguf.dequantize(stored["token_embd.weight"], Type.Q4_0))


def test_types_without_a_form_are_widened_and_told(tmp_path):
    kinds = {"blk.2.ffn_up.weight": "Q3_K", "blk.3.ffn_up.weight": "IQ4_NL"}
    path, stored = file_in(lambda name: kinds.get(name, "Q8_0"), tmp_path / "m.gguf")
    told = []
    model = gc.load_weights(path, layout="unrolled", keep=keep, notify=told.append)
    (line,) = told
    assert "1 in IQ4_NL (no form in memory), 1 in Q3_K (no form in memory)" in line
    arrays = {
        name: value
        for path, param in flat_params(model).items()
        if isinstance(value := param.get_value(), jax.Array)
        and (name := ".".join(map(str, path))).endswith("ffn.up.w")
    }
    assert len(arrays) == 2
    expected = gguf.dequantize(stored["blk.2.ffn_up.weight"], Type.Q3_K)
    assert any(
        np.array_equal(np.reshape(value, expected.shape), expected) for value in arrays.values()
    )


def test_layers_of_different_types_are_kept_one_by_one_and_widened_in_a_stack(tmp_path):
    mixed = lambda name: "Q4_K" if name.endswith("1.ffn_down.weight") else "Q6_K"  # noqa: E731
    path, _ = file_in(mixed, tmp_path / "m.gguf")
    told = []
    gc.load_weights(path, layout="unrolled", keep=keep, notify=told.append)
    assert not told
    scanned = matrices(gc.load_weights(path, layout="scan", keep=keep, notify=told.append))
    assert "layers of one stack are of different types" in told[0]
    assert any("ffn.up" in name for name in scanned)
    assert len(told) == 1


def test_types_that_share_a_form_are_stacked(tmp_path):
    """Q5_0 and Q8_0 are both 8-bit codes with a scale per 32."""
    mixed = lambda name: "Q5_0" if name.startswith("blk.1.") else "Q8_0"  # noqa: E731
    path, _ = file_in(mixed, tmp_path / "m.gguf")
    told = []
    gc.load_weights(path, layout="scan", keep=keep, notify=told.append)
    assert not told


def test_each_byte_is_read_once(tmp_path, monkeypatch):
    path, _ = file_in(lambda name: "Q4_0", tmp_path / "m.gguf")
    read, at = [], gguf_source.read_at
    monkeypatch.setattr(
        gguf_source,
        "read_at",
        lambda path, first, out: (read.append((first, first + out.nbytes)), at(path, first, out)),
    )
    source = gc.open_source(path)
    gc.load_source(source, **QUIET)
    tensors = sum(info.nbytes for info in source.tensors.values())
    assert sum(last - first for first, last in read) == tensors
    ends = [0]
    for first, last in sorted(read):
        assert first >= ends[-1]
        ends.append(last)


def test_broken_scales_are_named(tmp_path):
    def encode(name, array):
        if name.endswith("norm.weight"):
            return array, None
        blocks = random_blocks("Q4_0", *array.shape)
        if name == "blk.4.attn_q.weight":
            blocks[3, :2] = 0x00, 0x7E  # a half that is no number
        return blocks, Type.Q4_0

    path = write_gguf(tmp_path / "m.gguf", random_model(tiny("gemma3-1b")), "gemma3", encode)
    with pytest.raises(gc.CheckpointError, match="blk.4.attn_q.weight: 1 scales are NaN or inf"):
        gc.load_weights(path, **QUIET)


@pytest.mark.parametrize("axes", [dict(tensor=2), *nightly(dict(fsdp=4), dict(tensor=2, fsdp=2))])
def test_on_a_mesh_each_device_gets_its_part(axes, tmp_path):
    cfg = few_layers(tiny("gemma3-1b"))
    path, _ = file_in(lambda name: "Q8_0", tmp_path / "m.gguf", cfg)
    whole = matrices(gc.load_weights(path, layout="scan", **QUIET))
    devices = jax.devices()[: math.prod(axes.values())]
    partition = Partition.of(make_mesh(cfg, devices, **axes), TRAINING)
    parts = matrices(gc.load_weights(path, layout="scan", placement=partition.placement, **QUIET))
    assert parts.keys() == whole.keys()
    split = Counter()
    for name, w in parts.items():
        assert_equal_bits(w.dense(), whole[name].dense())
        split[w.matrix.codes.sharding.is_fully_replicated] += 1
    assert split[False] > split[True]


def test_a_mesh_that_splits_groups_widens(tmp_path):
    """Heads of 16 channels: a group of 32 spans two of them."""
    cfg = few_layers(tiny("gemma3-1b", head_dim=16, num_heads=2, num_kv_heads=2))
    path, _ = file_in(lambda name: "Q4_0", tmp_path / "m.gguf", cfg)
    partition = Partition.of(make_mesh(cfg, jax.devices()[:2], tensor=2))
    told = []
    gc.load_weights(path, keep=keep, notify=told.append, placement=partition.placement)
    assert told == ["m.gguf: widened, not kept as stored: 3 in Q4_0 (the mesh splits groups of 32)"]


def test_the_per_layer_table_of_gemma3n():
    """On the device its rows are codes; on disk they stay in the file; on the host it is wide."""
    path, ids = DATA / "quant" / "g3n_q4_0.gguf", jnp.array([[0, 5], [339, 7]])
    wide = gc.load_weights(path, dtype="float32").per_layer.table.get_value()[ids]
    told = []
    for place in ("device", "disk", "host"):
        model = gc.load_weights(
            path, dtype="float32", keep=keep, per_layer_table=place, notify=told.append
        )
        table = model.per_layer.table.get_value()
        assert isinstance(table, Kept) == (place == "device")
        np.testing.assert_array_equal(table.rows(ids), wide)
    (line,) = told
    assert "1 in Q8_0 (a table in the memory of the host)" in line


def test_without_keep_all_is_widened_as_before(tmp_path):
    path, stored = file_in(lambda name: "Q6_K", tmp_path / "m.gguf")
    told = []
    model = gc.load_weights(path, notify=told.append)
    assert not matrices(model) and not told
    table = gguf.dequantize(stored["token_embd.weight"], Type.Q6_K)
    np.testing.assert_array_equal(model.embed.table.get_value(), table)


def test_float_files_hold_nothing_to_keep(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_model(tiny("gemma3-1b")), "gemma3", plain)
    told = []
    assert not matrices(gc.load_weights(path, keep=keep, notify=told.append)) and not told


@pytest.mark.parametrize("name", ["g3_q4_0", *nightly("g3n_q4_0")])
def test_logits_of_files_by_llama_cpp(name):
    """With the blocks as they are: products are summed in another order than of wide matrices."""
    given, expected, tolerance = case("quant", name)
    model = gc.load_weights(DATA / "quant" / f"{name}.gguf", dtype="float32", **QUIET)
    assert len(matrices(model)) > 7
    logits = forward(model, given["input_ids"].astype(np.int32)).logits
    assert_close(logits, expected["logits"], 2 * tolerance["logits"])


@pytest.mark.parametrize("place", ["device", *nightly("host", "disk")])
def test_stored_weights_of_gemma3n_wherever_its_table_lies(place):
    """As users load them: `weights="stored"`."""
    given, expected, tolerance = case("quant", "g3n_q4_0")
    model = load_model(
        str(DATA / "quant" / "g3n_q4_0.gguf"),
        dtype="float32",
        weights="stored",
        per_layer_table=place,
    )
    logits = forward(model, given["input_ids"].astype(np.int32)).logits
    # Off the device rows are bfloat16, as with all weights that are narrower than floats.
    widest = tolerance["logits"] if place == "device" else 2**-9 * np.abs(expected["logits"]).max()
    assert_close(logits, expected["logits"], widest)
