"""sentence-transformers folders in and out: what they say is used, or refused by name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny_checkpoints import DATA

import gemma_checkpoints as gc
import gemma_jax as gj
from gemma_checkpoints.hf.config import config_from_hf
from gemma_checkpoints.hf.config_out import config_to_hf
from gemma_jax.text_embedding.embed import embed_tokens

SOURCE = DATA / "embedding" / "tiny"
ROWS = [[2, 319, 321, 323, 336, 1], [2, 126, 1]]


@pytest.fixture(scope="module")
def loaded():
    return gj.load(SOURCE, dtype="float32", layout="scan")


@pytest.fixture
def folder(tmp_path):
    """A copy of the stored folder, to be changed."""
    shutil.copytree(SOURCE, tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    """Sets keys of a JSON object, or takes those away that are `...`."""
    said = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: one for key, one in said.items() if one is not ...}))


def test_what_the_folder_says(loaded):
    cfg = loaded[0].cfg
    assert cfg.bidirectional and [spec.window for spec in cfg.layers] == [4] * 5 + [None, 4]
    head = cfg.text_embedding
    assert head.dense == (96, 768) and head.normalise and head.max_tokens == 256
    assert len(head.prompts) == 14 and head.prompt() == ""
    assert head.prompt("STS") == "task: sentence similarity | query: "
    about = gc.describe(SOURCE)
    assert about.num_params == sum(
        tensor.size
        for path in SOURCE.rglob("*.safetensors")
        for tensor in gc_tensors(path).values()
    )


def gc_tensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


# --- and back ------------------------------------------------------------------------------------


def test_a_copy_has_the_same_files(loaded, tmp_path):
    saved = gj.save(*loaded, tmp_path / "copy", format="hf")
    paths = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    assert sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file()) == paths
    for path in paths:
        assert (saved / path).read_bytes() == (SOURCE / path).read_bytes(), path


@pytest.mark.parametrize("changes", [{}, {"normalise": False}, {"default_prompt": "STS"}])
def test_files_of_our_own_say_the_same(loaded, tmp_path, changes):
    model, _ = loaded
    head = replace(model.cfg.text_embedding, **changes)
    model = gj.load_model(
        SOURCE,
        dtype="float32",
        layout="scan",
        config=lambda c: replace(c, text_embedding=head),
    )
    saved = gc.save_hf(model, tmp_path / "copy")
    again = gj.load_model(saved, dtype="float32", layout="scan")
    assert again.cfg == model.cfg
    np.testing.assert_array_equal(embed_tokens(again, ROWS), embed_tokens(model, ROWS))


def test_our_own_files_are_spelt_as_published_ones(loaded, tmp_path):
    saved = gc.save_hf(loaded[0], tmp_path / "copy")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert json.loads((saved / name).read_text()) == json.loads((SOURCE / name).read_text())
    ours = json.loads((saved / "config.json").read_text())
    theirs = json.loads((SOURCE / "config.json").read_text())
    same = set(theirs) - {"_sliding_window_pattern", "dtype", "initializer_range", "use_cache"}
    same -= {"attention_dropout", "transformers_version"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_orbax_keeps_head_and_tokenizer(loaded, tmp_path):
    model, tok = loaded
    saved = gj.save(model, tok, tmp_path / "ours")
    again, tok_again = gj.load(saved, dtype="float32", layout="scan")
    assert again.cfg == model.cfg and tok_again.add_eos
    texts = ["two people at work", "x"]
    np.testing.assert_array_equal(gj.embed(again, tok_again, texts), gj.embed(model, tok, texts))


def test_a_gguf_file_is_refused(loaded, tmp_path):
    with pytest.raises(gc.CheckpointError, match="another architecture in llama.cpp"):
        gc.save_gguf(loaded[0], tmp_path / "x.gguf", source=SOURCE)


@pytest.mark.parametrize("window, written", [(512, 512), (6, 6), (9, 8), (2, 2), (1, 1)])
def test_windows_are_halved_once(window, written):
    """As transformers reads and writes them: an odd one loses its last token, and no other."""
    raw = json.loads((SOURCE / "config.json").read_text()) | {"sliding_window": window}
    cfg = config_from_hf(raw)
    assert cfg.layers[0].window == window // 2 + 1
    out = json.loads(json.dumps(config_to_hf(cfg)))
    assert out["sliding_window"] == written and out["use_bidirectional_attention"] is True
    assert config_from_hf(out) == cfg


def test_other_models_do_not_read_both_ways():
    raw = json.loads((DATA / "g3_text" / "config.json").read_text())
    for said in (None, False):
        assert not config_from_hf(raw | {"use_bidirectional_attention": said}).bidirectional
    gemma2 = config_to_hf(gj.preset("gemma2-2b")) | {"use_bidirectional_attention": True}
    with pytest.raises(ValueError, match="use_bidirectional_attention is set; only gemma3_text"):
        config_from_hf(gemma2)
    with pytest.raises(ValueError, match="Gemma 3 alone"):
        config_to_hf(replace(gj.preset("gemma2-2b"), bidirectional=True))
    with pytest.raises(ValueError, match="models of text alone"):
        replace(gj.preset("gemma3-4b"), bidirectional=True)


# --- spellings and refusals ----------------------------------------------------------------------


def test_the_spelling_of_later_releases(folder, loaded):
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        place = "base" if kind in ("Transformer", "Dense") else "sentence_transformer"
        module["type"] = f"sentence_transformers.{place}.modules.{kind.lower()}.{kind}"
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {"embedding_dimension": 48, "pooling_mode": "mean", "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    inner = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    change(folder / "2_Dense" / "config.json", **inner, use_residual=False)
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    change(
        folder / "sentence_bert_config.json",
        do_lower_case=...,
        transformer_task="feature-extraction",
        modality_config={"text": forward},
        module_output_name="token_embeddings",
    )
    again = gj.load_model(folder, dtype="float32", layout="scan")
    assert again.cfg == loaded[0].cfg
    np.testing.assert_array_equal(embed_tokens(again, ROWS), embed_tokens(loaded[0], ROWS))


MAX = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
REFUSALS = [
    ("1_Pooling/config.json", MAX, r"pooling_mode \['max'\] is not supported"),
    ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pooling_mode .* not supported"),
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt False"),
    ("1_Pooling/config.json", {"word_embedding_dimension": 64}, "the decoder is 48 wide"),
    ("1_Pooling/config.json", {"pooling_mode_new": True}, "pooling_mode_new: unknown here"),
    ("2_Dense/config.json", {"bias": True}, "bias True is not supported"),
    ("2_Dense/config.json", {"bias": ...}, "bias True is not supported"),
    ("2_Dense/config.json", {"activation_function": ...}, "Tanh' is not supported"),
    ("2_Dense/config.json", {"use_residual": True}, "use_residual True"),
    ("2_Dense/config.json", {"in_features": 47}, "in_features is 47"),
    ("3_Dense/config.json", {"out_features": 700}, r"dense.1.linear.weight has shape \[768, 96\]"),
    ("3_Dense/config.json", {"gain": 2}, "gain: unknown here"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case True"),
    ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length must be"),
    ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts must be texts"),
    ("config_sentence_transformers.json", {"default_prompt_name": "no"}, "none of the prompts"),
    ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
    ("config_sentence_transformers.json", {"truncate_dim": 256}, "truncate_dim 256"),
    ("config_sentence_transformers.json", {"scale": 2}, "scale: unknown here"),
]


@pytest.mark.parametrize("name, values, message", REFUSALS)
def test_what_is_not_done_here_is_refused_by_name(folder, name, values, message):
    change(folder / name, **values)
    with pytest.raises(gc.CheckpointError, match=message) as caught:
        gc.describe(folder)
    assert len(str(caught.value).splitlines()) == 1


def change_modules(folder, edit):
    modules = json.loads((folder / "modules.json").read_text())
    edit(modules)
    (folder / "modules.json").write_text(json.dumps(modules))


MODULES = [
    (lambda m: m[2].update(type="sentence_transformers.models.LSTM"), "LSTM' is not supported"),
    (lambda m: m[2].update(type="my.package.Dense"), "my.package.Dense"),
    (lambda m: m.insert(1, m.pop(2)), "modules Transformer, Dense, Pooling"),
    (lambda m: m[2].update(path="../other"), "no name of a folder"),
    (lambda m: m[2].update(path=".."), "no name of a folder"),
    (lambda m: m[2].update(kwargs=["x"]), r"kwargs \['x'\]"),
    (lambda m: m[2].update(speed=1), "speed: unknown here"),
    (lambda m: m.clear(), "modules  are not supported"),
    (lambda m: m[2].update(path="5_Dense"), "5_Dense/config.json: no such file"),
]


@pytest.mark.parametrize("edit, message", MODULES)
def test_other_modules_are_refused(folder, edit, message):
    change_modules(folder, edit)
    with pytest.raises(gc.CheckpointError, match=message):
        gc.describe(folder)


def test_what_is_missing_is_named(folder):
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(gc.CheckpointError, match="2_Dense/model.safetensors: no such file"):
        gc.describe(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(gc.CheckpointError, match="modules.json: not valid JSON"):
        gc.describe(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(gc.CheckpointError, match="modules.json is missing beside it"):
        gc.describe(folder)


def test_eos_is_added_where_the_folder_says_so(folder):
    assert gj.load_tokenizer(folder).add_eos
    change(folder / "tokenizer_config.json", add_eos_token=...)
    assert gj.load_tokenizer(folder).add_eos, "tokenizer.json says it too"
    (folder / "tokenizer.json").unlink()
    assert not gj.load_tokenizer(folder).add_eos, "and tokenizer.model does not"
    change(folder / "tokenizer_config.json", add_eos_token=True)
    assert gj.load_tokenizer(folder).add_eos
