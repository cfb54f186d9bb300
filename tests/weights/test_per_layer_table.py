"""Gemma 3n's per-layer table off the device: the same numbers, and never on the device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly
from parity.goldens import DATA

from gemma_checkpoints import CheckpointError, load_weights, save_hf, save_orbax
from gemma_jax import forward, generate, matformer
from gemma_jax.loading import load_model as load
from gemma_jax.weights.off_device import HostTable

CFG = tiny.gemma3n(6, 3)
PLACES = ("host", "disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3n") / "folder"
    return save_hf(tiny.model(CFG), folder)


def table(model):
    return model.per_layer.table.get_value()


@pytest.mark.parametrize("layout, place", [("unrolled", "disk"), *nightly(("scan", "host"))])
def test_the_same_numbers(folder, place, layout):
    """In a pass; ids beyond the table included."""
    here, there = (
        load_weights(folder, layout=layout, per_layer_table=p) for p in ("device", place)
    )
    tokens = tiny.tokens(CFG, 2, 11)
    tokens[0, 3:5] = 90, 95
    capture = ("per_layer_inputs", "layer_outputs")
    ours, theirs = (forward(model, tokens, capture=capture) for model in (here, there))
    chex.assert_trees_all_equal(ours.logits, theirs.logits)
    chex.assert_trees_all_equal(ours.captured, theirs.captured)


@pytest.mark.nightly
@pytest.mark.parametrize("layout, place", [("unrolled", "disk"), ("scan", "host")])
def test_the_same_text(folder, place, layout):
    here, there = (
        load_weights(folder, layout=layout, per_layer_table=p) for p in ("device", place)
    )
    tokens = tiny.tokens(CFG, 2, 11).tolist()
    done = [generate(model, None, tokens, max_new_tokens=6) for model in (here, there)]
    assert done[0] == done[1]


def test_the_host_variant_is_in_the_memory_of_the_host(folder):
    model = load_weights(folder, per_layer_table="host")
    values = table(model).values
    assert values.sharding.memory_kind == "pinned_host"
    assert values.shape == (90, 6, 8)
    lowered = jax.jit(lambda m, ids: forward(m, ids).logits).lower(model, jnp.ones((1, 3), int))
    assert "pinned_host" in lowered.as_text()  # the program takes it from there


@pytest.mark.parametrize("place", PLACES)
def test_the_table_is_never_on_the_device(folder, place, monkeypatch):
    """Not while loading, and not while running: no array of its size in device memory."""
    shape, seen = (90, 6, 8), []
    real_put, real_zeros = jax.device_put, jnp.zeros

    def put(array, where=None, **options):
        if np.shape(array) == shape:
            seen.append(getattr(where, "memory_kind", "device"))
        return real_put(array, where, **options)

    def zeros(size, *args, **options):
        if tuple(np.atleast_1d(size)) == shape:
            seen.append("device")
        return real_zeros(size, *args, **options)

    before = {id(array) for array in jax.live_arrays()}
    monkeypatch.setattr(jax, "device_put", put)
    monkeypatch.setattr(jnp, "zeros", zeros)
    model = load_weights(folder, per_layer_table=place)
    assert seen == (["pinned_host"] if place == "host" else [])
    monkeypatch.undo()
    forward(model, tiny.tokens(CFG, 1, 5))
    on_device = [
        array
        for array in jax.live_arrays()
        if id(array) not in before and array.sharding.memory_kind != "pinned_host"
    ]
    assert on_device and all(array.shape != shape for array in on_device)


def test_the_disk_variant_reads_only_what_is_asked_for(folder, monkeypatch):
    from gemma_checkpoints.safetensors_file import SafetensorsFile

    read, original = [], SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile,
        "read",
        lambda self, name, *a: read.append(name) or original(self, name, *a),
    )
    model = load_weights(folder, per_layer_table="disk")
    assert read and "model.embed_tokens_per_layer.weight" not in read
    assert not jax.tree.leaves(table(model))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "options",
    [dict(dtype="float32", weights="bfloat16"), *nightly(dict(dtype="bfloat16"))],
    ids=str,
)
def test_stored_narrower(folder, place, options):
    """The table follows the storage of the weights, and the file is float32."""
    models = [load(str(folder), per_layer_table=p, **options) for p in ("device", place)]
    if place == "host":
        assert table(models[1]).values.dtype == jnp.uint16
    tokens = tiny.tokens(CFG, 1, 7)
    chex.assert_trees_all_equal(*(forward(model, tokens).logits for model in models))


def test_no_program_converts_the_whole_table():
    """A pass over a bfloat16 table in host memory needs less room than a float32 copy of it."""
    import ml_dtypes

    rows = HostTable.of(np.ones((50_000, 64), ml_dtypes.bfloat16))

    def steps(table, ids):
        def add(i, total):
            return total + table.rows(ids).astype(jnp.float32)

        return jax.lax.fori_loop(0, 5, add, jnp.zeros((3, 64)))

    compiled = jax.jit(steps).lower(rows, jnp.arange(3)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 50_000 * 64
    np.testing.assert_array_equal(compiled(rows, jnp.arange(3)), 5.0)


@pytest.mark.parametrize("place", PLACES)
def test_views_of_it(folder, place):
    """Slices that leave layers out, and their parts of the table with them."""
    here, there = (
        load_weights(folder, layout="unrolled", per_layer_table=p) for p in ("device", place)
    )
    submodel = matformer.Slice(ffn_widths=(9,) * 3, skip_layers=(3, 4, 5))
    tokens = tiny.tokens(CFG, 2, 7)
    chex.assert_trees_all_equal(
        *(forward(matformer.at(model, submodel), tokens).logits for model in (here, there))
    )
    with pytest.raises(ValueError, match="viewed, not cut"):
        matformer.slice(there, submodel)


def test_models_and_formats_without(folder, tmp_path):
    with pytest.raises(ValueError, match="no per-layer table"):
        load_weights(DATA / "g3_text", per_layer_table="host")
    orbax = save_orbax(load_weights(folder), tmp_path / "orbax")
    assert load_weights(orbax, per_layer_table="host").cfg == CFG
    with pytest.raises(CheckpointError, match="Orbax checkpoint cannot stay on disk"):
        load_weights(orbax, per_layer_table="disk")


def test_a_table_of_the_wrong_size(folder, tmp_path):
    """The config says how many rows there are; every placement checks."""
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "config.json").read_text())
    config["vocab_size_per_layer_input"] = 91
    (broken / "config.json").write_text(json.dumps(config))
    for place in ("device", *PLACES):
        with pytest.raises(CheckpointError, match=r"embed_tokens_per_layer.weight has shape \[90"):
            load_weights(broken, per_layer_table=place)
