"""Output heads in files: equal to the embedding, of their own, under either name alone, absent."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import by_name, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc
from gemma_checkpoints import heads
from gemma_checkpoints.hf.config import config_from_hf
from gemma_jax.config import AltUpConfig, PerLayerConfig
from gemma_jax.encoder_config import VisionConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOWER = VisionConfig(
    d_tower=24, d_ff=40, num_layers=2, num_heads=2, image_size=56, patch_size=14,
    num_soft_tokens=4, image_token=90, start_token=91, end_token=92,
)  # fmt: skip
CONFIGS = {
    "gemma-2b": {}, "gemma2-2b": {}, "gemma3-1b": {},
    "gemma3n-e2b": dict(
        query_pre_attn_scalar=1, per_layer=PerLayerConfig(width=8, vocab_size=96),
        modality_vocabularies=(), altup=AltUpConfig(num_streams=2),
    ),
}  # fmt: skip


def edit_tensors(folder, **changes):
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in (load_file(file) | changes).items() if v is not None}
    save_file(tensors, file)


def other_head(folder):
    """One value of the last row differs."""
    head = load_file(folder / "model.safetensors")[EMBEDDING].copy()
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize("declared", [True, False, None])
def test_a_head_that_differs_is_used_whatever_the_config_says(declared, hf_folder, edit_config):
    """`PreTrainedModel.tie_weights` of transformers 5.24: both are stored, and they differ."""
    edit_config(tie_word_embeddings=declared)
    head = other_head(hf_folder)
    edit_tensors(hf_folder, **{HEAD: head})
    model = gc.load_weights(hf_folder)
    assert not model.cfg.tied_head
    np.testing.assert_array_equal(by_name(model)["embed.head"], head)
    with_head = gc.describe(hf_folder).num_params
    edit_tensors(hf_folder, **{HEAD: None})
    edit_config(tie_word_embeddings=True)
    assert with_head == gc.describe(hf_folder).num_params + head.size


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_a_head_that_equals_the_embedding_is_tied(declared, dtype, hf_folder, edit_config):
    edit_config(tie_word_embeddings=declared)
    table = load_file(hf_folder / "model.safetensors")[EMBEDDING]
    edit_tensors(hf_folder, **{HEAD: table.astype(dtype)})
    assert gc.load_weights(hf_folder).cfg.tied_head


def test_heads_are_compared_in_blocks_to_the_last_row(hf_folder, monkeypatch):
    monkeypatch.setattr(heads, "BLOCK", 72 * 7)
    edit_tensors(hf_folder, **{HEAD: other_head(hf_folder)})
    assert not gc.open_source(hf_folder).config.tied_head


def test_untied_without_a_head_is_refused(edit_config):
    """transformers 5.24 fills such a head with random numbers."""
    with pytest.raises(gc.CheckpointError, match="tie_word_embeddings is false, but no file holds"):
        gc.open_source(edit_config(tie_word_embeddings=False))


def test_one_table_under_the_name_of_the_head_is_both(hf_folder, edit_config):
    """`tie_weights` of transformers 5.24 swaps them where only the target is stored."""
    before = by_name(gc.load_weights(hf_folder))
    table = load_file(hf_folder / "model.safetensors")[EMBEDDING]
    edit_tensors(hf_folder, **{EMBEDDING: None, HEAD: table})
    after = by_name(gc.load_weights(hf_folder))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(gc.CheckpointError, match="embed_tokens.weight is missing"):
        gc.load_weights(edit_config(tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (np.zeros((10, 72), np.float32), r"lm_head.weight has shape \[10, 72\], but the config"),
        (np.zeros((320, 72), np.int8), "lm_head.weight is stored as I8"),
    ],
)
def test_a_head_that_is_none_is_refused(head, message, hf_folder):
    edit_tensors(hf_folder, **{HEAD: head})
    with pytest.raises(gc.CheckpointError, match=message):
        gc.load_weights(hf_folder)


def test_a_bias_of_the_head_is_refused(hf_folder):
    edit_tensors(hf_folder, **{"lm_head.bias": np.zeros(320, np.float32)})
    with pytest.raises(gc.CheckpointError, match="lm_head.bias is surplus"):
        gc.load_weights(hf_folder)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("save", ["save_hf", "save_orbax"])
def test_there_and_back(name, save, tmp_path):
    model = random_model(tiny(name, tied_head=False, **CONFIGS[name]))
    out = getattr(gc, save)(model, tmp_path / "out")
    loaded = gc.load_weights(out)
    assert loaded.cfg == model.cfg and not loaded.cfg.tied_head
    ours, theirs = by_name(model), by_name(loaded)
    assert ours.keys() == theirs.keys() and "embed.head" in ours
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "spelling", ["language_model.lm_head.weight", "lm_head.weight", "model.lm_head.weight"]
)
def test_there_and_back_with_a_tower(spelling, tmp_path):
    """The published spelling is written; those of transformers from 4.52 on are read as well."""
    model = random_model(tiny("gemma3-4b", tied_head=False, vision=TOWER))
    out = gc.save_hf(model, tmp_path / "out")
    file = out / "model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("language_model.lm_head.weight")
    save_file(tensors | {spelling: head}, file)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    for modalities in (None, ("text",)):
        loaded = gc.load_weights(out, modalities=modalities)
        np.testing.assert_array_equal(by_name(loaded)["embed.head"], head)


@pytest.mark.parametrize("declared", [True, False])
def test_an_export_says_what_its_head_is(declared, hf_folder, edit_config, tmp_path):
    """The source's config goes along, with the truth about the head."""
    edit_config(tie_word_embeddings=declared)
    table = load_file(hf_folder / "model.safetensors")[EMBEDDING]
    for i, (head, tied) in enumerate(((other_head(hf_folder), False), (table.copy(), True))):
        edit_tensors(hf_folder, **{HEAD: head})
        model = gc.load_weights(hf_folder)
        out = gc.save_hf(model, tmp_path / str(i), source=hf_folder)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert (HEAD in load_file(out / "model.safetensors")) is not tied
        assert gc.load_weights(out).cfg == model.cfg


@pytest.mark.parametrize(
    ("name", "arch"), [("gemma-2b", "gemma"), ("gemma2-2b", "gemma2"), ("gemma3-4b", "gemma3")]
)
def test_the_output_of_a_gguf(name, arch, tmp_path):
    """llama.cpp, `src/models/gemma3.cpp`: `output.weight` is the head where there is one."""
    model = random_model(tiny(name, tied_head=False))
    loaded = gc.load_weights(write_gguf(tmp_path / "own.gguf", model, arch, plain))
    assert loaded.cfg == model.cfg and not loaded.cfg.tied_head
    np.testing.assert_array_equal(by_name(loaded)["embed.head"], by_name(model)["embed.head"])
    tied = random_model(tiny(name))
    copy = {"output.weight": by_name(tied)["embed.table"]}
    path = write_gguf(tmp_path / "tied.gguf", tied, arch, plain, **copy)
    assert gc.load_weights(path).cfg == tied.cfg


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [({}, {}, True), ({"tie_word_embeddings": False}, {}, True),
     ({}, {"tie_word_embeddings": False}, False), ({"tie_word_embeddings": True}, {}, True)],
)  # fmt: skip
def test_shieldgemma_believes_its_text_config(outer, inner, tied):
    """`ShieldGemma2Config.__post_init__` of transformers 5.24."""
    raw = {"model_type": "shieldgemma2", "text_config": inner} | outer
    assert config_from_hf(raw, modalities=()).tied_head is tied


def test_of_other_models_with_a_tower_the_outer_config_counts():
    """`Gemma3ForConditionalGeneration` of transformers 5.24 asks `config.tie_word_embeddings`."""
    inner = {"tie_word_embeddings": False}
    raw = {"model_type": "gemma3", "text_config": inner}
    assert config_from_hf(raw, modalities=()).tied_head
    assert not config_from_hf(raw | inner, modalities=()).tied_head
