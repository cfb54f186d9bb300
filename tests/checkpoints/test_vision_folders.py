"""Models that see: tower and projector in and out, in every spelling, or left out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import vision
from tiny_checkpoints import DATA, by_name, random_model, tiny

import gemma_checkpoints as gc
from gemma_checkpoints import load
from gemma_jax import load_model
from gemma_jax.multimodal.encode import encode_images

SOURCE = DATA / "g3_mm"
WEIGHTS = "model.safetensors"
LAYOUTS = ("scan", "unrolled")
PUBLISHED = ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.")
# What may stand in the place of the three.
SPELLINGS = {
    "in memory": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "in memory, nested": (
        "model.language_model.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    "ShieldGemma 2": (
        "model.model.language_model.model.",
        "model.model.vision_tower.",
        "model.model.multi_modal_projector.",
    ),
}


def respelled(folder, spelling):
    """The stored model with other names, in `folder`."""

    def rename(name):
        old, new = next(pair for pair in zip(PUBLISHED, spelling) if name.startswith(pair[0]))
        return new + name.removeprefix(old)

    folder.mkdir()
    tensors = {rename(name): value for name, value in load_file(SOURCE / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_bytes((SOURCE / "config.json").read_bytes())
    return folder


def same_bytes(a, b, name=WEIGHTS):
    return (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_the_same_file(layout, tmp_path):
    out = gc.save_hf(gc.load_weights(SOURCE, layout=layout), tmp_path / "out", source=SOURCE)
    assert same_bytes(out, SOURCE) and same_bytes(out, SOURCE, "config.json")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_come_out_as_they_were(spelling, tmp_path):
    source = respelled(tmp_path / "source", SPELLINGS[spelling])
    model = gc.load_weights(source)
    assert same_bytes(gc.save_hf(model, tmp_path / "same", source=source), source)
    published = gc.save_hf(model, tmp_path / "published")
    assert same_bytes(published, SOURCE), "without a source, as published"
    assert gc.open_source(published).config == model.cfg


def test_shards_there_and_back(tmp_path):
    model, stored = gc.load_weights(SOURCE), load_file(SOURCE / WEIGHTS)
    shards = gc.save_hf(model, tmp_path / "shards", max_shard_bytes=100_000, source=SOURCE)
    where = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == stored.keys() and len(set(where.values())) > 3
    for name, value in stored.items():
        assert load_file(shards / where[name])[name].tobytes() == value.tobytes()
    again = gc.save_hf(gc.load_weights(shards), tmp_path / "again", source=shards)
    assert same_bytes(again, SOURCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_where_they_belong(layout):
    ours, stored = by_name(gc.load_weights(SOURCE, layout=layout)), load_file(SOURCE / WEIGHTS)
    tower, layer = PUBLISHED[1], PUBLISHED[1] + "encoder.layers.2."
    pairs = {
        "tower.patches.proj.w": stored[tower + "embeddings.patch_embedding.weight"],
        "tower.patches.positions": stored[tower + "embeddings.position_embedding.weight"],
        "tower.blocks.2.attn.k.w": stored[layer + "self_attn.k_proj.weight"].reshape(2, 16, 32),
        "tower.blocks.2.attn.k.bias": stored[layer + "self_attn.k_proj.bias"].reshape(2, 16),
        "tower.blocks.2.attn.o.w": stored[layer + "self_attn.out_proj.weight"].reshape(32, 2, 16),
        "tower.blocks.2.pre_ffn_norm.bias": stored[layer + "layer_norm2.bias"],
        "tower.blocks.2.ffn.down.w": stored[layer + "mlp.fc2.weight"],
        "tower.final_norm.scale": stored[tower + "post_layernorm.weight"],
        "projector.norm.scale": stored[PUBLISHED[2] + "mm_soft_emb_norm.weight"],
        "projector.proj.w": stored[PUBLISHED[2] + "mm_input_projection_weight"].T,
    }
    for name, value in pairs.items():
        np.testing.assert_array_equal(ours["vision." + name], value, err_msg=name)


def test_a_config_of_ours_says_all(tmp_path):
    """Sizes that no stored config has, and 14 pixels a patch where the default is 16."""
    model = random_model(tiny("gemma3-4b", vision=vision()))
    loaded = gc.load_weights(gc.save_hf(model, tmp_path / "out"))
    assert loaded.cfg == model.cfg
    ours, theirs = by_name(model), by_name(loaded)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_dtype_is_said_at_every_depth(tmp_path):
    source = respelled(tmp_path / "source", PUBLISHED)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    out = gc.save_hf(gc.load_weights(source), tmp_path / "out", dtype="float32", source=source)
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["vision_config"]["dtype"] == "float32"
    assert "dtype" not in written["text_config"] and "torch_dtype" not in written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_orbax_there_and_back(layout, tmp_path):
    ours = gc.save_orbax(gc.load_weights(SOURCE), tmp_path / "ours")
    model = gc.load_weights(ours, layout=layout)
    assert same_bytes(gc.save_hf(model, tmp_path / "out"), SOURCE)
    assert gc.load_weights(ours, modalities=("text",)).vision is None


def test_description():
    found = gc.describe(SOURCE)
    stored = load_file(SOURCE / WEIGHTS)
    sizes = [
        sum(value.size for name, value in stored.items() if name.startswith(prefix))
        for prefix in PUBLISHED
    ]
    parts = ("text", "vision.tower", "vision.projector")
    assert found.params_by_part == dict(zip(parts, sizes))
    assert found.num_params == sum(sizes)
    assert found.tensor_bytes == {"BF16": 2 * found.num_params}


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def test_settings_of_the_processor_go_along(tmp_path):
    source = respelled(tmp_path / "source", PUBLISHED)
    for name in PROCESSOR_FILES:
        (source / name).write_text(json.dumps({"processor_class": name}))
    model = gc.load_weights(source)
    for save in (gc.save_hf, gc.save_orbax):
        out = save(model, tmp_path / save.__name__, source=source)
        assert all(same_bytes(out, source, name) for name in PROCESSOR_FILES)
    text = gc.load_weights(source, modalities=("text",))
    out = gc.save_hf(text, tmp_path / "text", source=source)
    assert not any((out / name).exists() for name in PROCESSOR_FILES)


def test_text_alone_neither_reads_nor_allocates_the_tower(monkeypatch):
    source, read, allocated, progress = gc.open_source(SOURCE), [], [], []
    read_rows, make_buffer = source.read, load.make_buffer

    def reading(name, rows, columns):
        read.append(source.spellings[name])
        return read_rows(name, rows, columns)

    def allocating(shape, dtype, sharding):
        allocated.append(int(np.prod(shape)) * dtype.itemsize)
        return make_buffer(shape, dtype, sharding)

    monkeypatch.setattr(source, "read", reading)
    monkeypatch.setattr(load, "make_buffer", allocating)
    model = gc.load_source(
        source, modalities=("text",), progress=lambda done, total: progress.append((done, total))
    )
    stored = load_file(SOURCE / WEIGHTS)
    text = {name for name in stored if name.startswith(PUBLISHED[0])}
    size = sum(stored[name].nbytes for name in text)
    assert set(read) == text
    assert sum(allocated) == size and progress[-1] == (size, size)
    assert model.vision is None and model.cfg.vision is None


def test_text_alone_is_the_decoder(tmp_path):
    model = gc.load_weights(SOURCE, modalities=("text",))
    full = by_name(gc.load_weights(SOURCE))
    assert all(np.array_equal(value, full[name]) for name, value in by_name(model).items())
    out = gc.save_hf(model, tmp_path / "out", source=SOURCE)
    stored, text = load_file(SOURCE / WEIGHTS), load_file(out / WEIGHTS)
    assert len(text) == sum(name.startswith(PUBLISHED[0]) for name in stored)
    assert all(
        value.tobytes() == stored["language_model." + name].tobytes()
        for name, value in text.items()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and "vision_config" not in config
    assert gc.open_source(out).config == model.cfg


@pytest.mark.parametrize("modalities", [None, ("text", "image"), ["image", "text"]])
def test_all_modalities(modalities):
    assert gc.load_weights(SOURCE, modalities=modalities).vision is not None


@pytest.mark.parametrize(
    ("source", "modalities", "message"),
    [
        (SOURCE, ("text", "sound"), "unknown modality sound; choose from text, image"),
        (SOURCE, ("image",), r"modalities=\['image'\] must hold 'text'"),
        (SOURCE, (), r"modalities=\[\] must hold 'text'"),
        (DATA / "g3_text", ("text", "image"), "g3_text: this model reads text alone"),
    ],
)
def test_wrong_modalities(source, modalities, message):
    with pytest.raises(ValueError, match=message) as caught:
        gc.load_weights(source, modalities=modalities)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_placement_sees_the_letters_of_the_tower(layout):
    seen = {}

    def placement(path, dims, shape):
        assert len(shape) == len(dims) + ("blocks" in path)
        seen[".".join(map(str, path[-3:]))] = dims

    gc.load_weights(SOURCE, layout=layout, placement=placement)
    assert seen["patches.proj.w"] == "CUYX" and seen["tower.patches.positions"] == "QC"
    assert seen["projector.proj.w"] == "DC"


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)


@pytest.fixture(scope="module")
def exact(pixels):
    return encode_images(load_model(SOURCE, dtype="float32"), pixels)[0]


@pytest.mark.parametrize(
    ("weights", "stored", "layout", "limit"),
    [("bfloat16", "uint16", "scan", 1e-5), ("int8", "int8", "unrolled", 0.03)],
)
def test_narrow_weights_in_the_tower(weights, stored, layout, limit, pixels, exact):
    """The source is bfloat16, which storing as such leaves alone; int8 loses a few per cent."""
    model = load_model(SOURCE, dtype="float32", weights=weights, layout=layout)
    matrices = (model.vision.tower.patches.proj.w, model.vision.projector.proj.w)
    assert all(jax.tree.leaves(w.get_value())[0].dtype == stored for w in matrices)
    soft, _ = encode_images(model, pixels)
    assert np.linalg.norm(soft - exact) < limit * np.linalg.norm(exact)


def test_a_tower_in_float32_under_a_bfloat16_decoder(pixels, exact):
    wide, _ = encode_images(load_model(SOURCE, dtype="bfloat16", vision_dtype="float32"), pixels)
    narrow, _ = encode_images(load_model(SOURCE, dtype="bfloat16"), pixels)
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(wide, exact, atol=1e-5)
    assert np.abs(np.asarray(narrow, np.float32) - exact).max() > 1e-3


def test_modalities_from_the_short_way_in():
    assert load_model(SOURCE, modalities=("text",)).vision is None
