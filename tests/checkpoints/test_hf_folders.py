"""Hugging Face folders in and out, byte for byte."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import DATA, by_name, random_model, tiny

import gemma_checkpoints as gc
from gemma_checkpoints.name_table import expand
from gemma_checkpoints.params import depths
from gemma_jax.decoder.forward import forward
from gemma_jax.sharding import TRAINING, Partition, make_mesh
from gemma_jax.weights.tree import flat_params

LAYOUTS = ("scan", "unrolled")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_the_same_file(layout, tmp_path):
    source = DATA / "g3_text"
    out = gc.save_hf(gc.load_weights(source, layout=layout), tmp_path / "out", source=source)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_where_they_belong(layout):
    model = gc.load_weights(DATA / "g3_text", layout=layout)
    stored = load_file(DATA / "g3_text" / "model.safetensors")
    ours = by_name(model)
    q = stored["model.layers.4.self_attn.q_proj.weight"].reshape(4, 24, 72)
    np.testing.assert_array_equal(ours["blocks.4.attn.q.w"], q)
    norm = stored["model.layers.6.post_feedforward_layernorm.weight"]
    np.testing.assert_array_equal(ours["blocks.6.post_ffn_norm.scale"], norm)
    assert {a.dtype.name for a in ours.values()} == {"bfloat16"}


def test_logits_from_loaded_weights():
    model = gc.load_weights(DATA / "g3_text", dtype="float32")
    case = load_file(DATA / "g3_text" / "forward.safetensors")
    logits = jax.jit(forward)(model, jnp.asarray(case["in.input_ids"], jnp.int32)).logits
    np.testing.assert_allclose(logits, case["out.logits"], atol=5e-5)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes_of_all_times(prefix, hf_folder):
    file = hf_folder / "model.safetensors"
    before = by_name(gc.load_weights(hf_folder))
    renamed = {prefix + k.removeprefix("model."): v for k, v in load_file(file).items()}
    save_file(renamed, file)
    after = by_name(gc.load_weights(hf_folder))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_tied_copies_are_dropped(hf_folder):
    file = hf_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, file)
    assert gc.load_weights(hf_folder).cfg.vocab_size == 320


def test_shards_with_an_index(tmp_path):
    model, reference = (
        gc.load_weights(DATA / "g3_text"),
        load_file(DATA / "g3_text/model.safetensors"),
    )
    out = gc.save_hf(model, tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == reference.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in reference.values())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 110_000 for f in files)
    stored = {name: value for file in files for name, value in load_file(file).items()}
    assert all(stored[name].tobytes() == value.tobytes() for name, value in reference.items())
    again = gc.save_hf(gc.load_weights(out), tmp_path / "again", source=DATA / "g3_text")
    single = (again / "model.safetensors").read_bytes()
    assert single == (DATA / "g3_text" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["gemma-2b", "gemma2-2b", "gemma3-4b"])
def test_every_generation(name, tmp_path):
    model = random_model(tiny(name))
    out = gc.save_hf(model, tmp_path / "out", dtype="bfloat16")
    loaded = gc.load_weights(out)
    assert loaded.cfg == model.cfg
    ours, theirs = by_name(model), by_name(loaded)
    for key, value in ours.items():
        np.testing.assert_array_equal(value.astype(theirs[key].dtype), theirs[key], err_msg=key)


def test_the_config_of_a_changed_model_is_its_own(tmp_path):
    """The source's config.json is copied only if it describes the model."""
    model = random_model(tiny("gemma3-4b"))
    out = gc.save_hf(model, tmp_path / "out", source=DATA / "g3_text")
    assert gc.open_source(out).config == model.cfg


@pytest.mark.parametrize("layout", LAYOUTS)
def test_straight_to_a_device(layout):
    """With a sharding, arrays are filled on the device instead of adopted from host memory."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    seen = []

    def placement(path, dims, shape):
        seen.append((path, dims))
        assert len(shape) == len(dims) + (path[0] == "blocks")
        return sharding

    placed = gc.load_weights(DATA / "g3_text", layout=layout, dtype="float32", placement=placement)
    adopted = gc.load_weights(DATA / "g3_text", layout=layout, dtype="float32")
    for name, value in by_name(placed).items():
        np.testing.assert_array_equal(value, by_name(adopted)[name])
    assert (("embed", "table"), "VD") in seen


def test_transform_sees_each_param_once_and_complete():
    seen = []

    def negated(model):
        params = flat_params(model)

        def negate(path, array):
            seen.append((params[path].dims, array.shape))
            assert array.shape == params[path].get_value().shape
            return jnp.asarray(-np.asarray(array))

        return negate

    model = gc.load_weights(DATA / "g3_text", transform=negated)
    plain = gc.load_weights(DATA / "g3_text")
    expected = [(p.dims, p.get_value().shape) for p in flat_params(plain).values()]
    assert sorted(seen) == sorted(expected)
    for name, value in by_name(plain).items():
        np.testing.assert_array_equal(-value, by_name(model)[name])


def test_progress_ends_at_the_total():
    calls = []
    gc.load_weights(DATA / "g3_text", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] == 641_264 - 8 - _header_bytes()


def _header_bytes() -> int:
    head = (DATA / "g3_text" / "model.safetensors").read_bytes()[:8]
    return int.from_bytes(head, "little")


def test_description(hf_folder):
    (hf_folder / "tokenizer.json").write_text("{}")
    found = gc.describe(hf_folder)
    assert found.format == "Hugging Face" and found.config.d_model == 72
    assert found.tensor_bytes == {"BF16": 2 * found.num_params}
    assert found.tokenizer == gc.tokenizer_path(hf_folder) == hf_folder / "tokenizer.json"


def test_tokenizer_files_go_along(hf_folder, tmp_path):
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
    for name in names:
        (hf_folder / name).write_text(name)
    out = gc.save_hf(gc.load_weights(hf_folder), tmp_path / "out", source=hf_folder)
    assert all((out / name).read_text() == name for name in names)


@pytest.mark.parametrize("name", ["g3_text", "g3n_text"])
@pytest.mark.parametrize("axes", [dict(tensor=4), dict(fsdp=2, tensor=2)])
def test_straight_into_shards(name, axes):
    """Each device gets its part, and every byte that the model needs is read once."""
    plain = gc.load_weights(DATA / name, dtype="float32")
    mesh = make_mesh(plain.cfg, jax.devices()[:4], **axes)
    partition = Partition.of(mesh, TRAINING)
    seen = []
    split = gc.load_weights(
        DATA / name,
        dtype="float32",
        placement=lambda path, dims, shape: partition.sharding(dims, shape),
        progress=lambda done, total: seen.append((done, total)),
    )
    stored = gc.open_source(DATA / name)
    used = {row.theirs for row in expand(stored.table, depths(stored.config)).values()}
    size = sum(info.nbytes for name, info in stored.tensors.items() if name in used)
    assert seen[-1] == (size, size)
    params = flat_params(plain)
    for path, param in flat_params(split).items():
        array = param.get_value()
        assert array.sharding == partition.sharding(param.dims, array.shape)
        np.testing.assert_array_equal(array, params[path].get_value())
