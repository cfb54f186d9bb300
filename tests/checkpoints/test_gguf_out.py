"""GGUF files that are written: what llama.cpp's converter and quantiser write of the same model."""

import json
import os
import subprocess

import numpy as np
import pytest
from stand_in import keep
from tiny_checkpoints import DATA, by_name, random_model, tiny

import gemma_checkpoints as gc
from gemma_checkpoints.gguf.mix import MIXES, tensor_types
from gemma_jax import forward, generate, load, load_tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
QUANT = DATA / "quant"
DIGITS = "checkpoints/digits"
# A Python that has llama_cpp, where the one of the tests has not.
LLAMA = os.environ.get("GEMMA_JAX_LLAMA_CPP_PYTHON", "python")


def silent(line):
    pass


@pytest.fixture(scope="module", params=["g3_q4_0", "g3n_q4_0"])
def both(request, tmp_path_factory):
    """A file of llama.cpp's, and ours of the model in it."""
    theirs = QUANT / f"{request.param}.gguf"
    ours = tmp_path_factory.mktemp("out") / "ours.gguf"
    gc.save_gguf(gc.load_weights(theirs), ours, "q4_0", source=theirs)
    return gguf.GGUFReader(theirs), gguf.GGUFReader(ours)


def test_metadata_is_the_same_key_by_key(both):
    theirs, ours = (reader.fields for reader in both)
    assert ours.keys() == theirs.keys()
    for key, field in theirs.items():
        assert ours[key].types == field.types, key
        assert ours[key].contents() == field.contents(), key


def test_tensors_are_the_same_byte_by_byte(both):
    """Rounding to Q4_0 finds the blocks again that weights were read from. The embedding of the
    Gemma 3 is in float16 in files for which Google trained, and in 8 bits in others."""
    theirs, ours = ({tensor.name: tensor for tensor in reader.tensors} for reader in both)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert list(ours[name].shape) == list(tensor.shape), name
        if tensor.tensor_type.name == "F16" and name == "token_embd.weight":
            assert ours[name].tensor_type.name == "Q8_0"
            continue
        assert ours[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_blocks_that_were_kept_are_written_as_they_were(layout, tmp_path):
    theirs = QUANT / "g3_q4_0.gguf"
    model = gc.load_weights(theirs, layout=layout, keep=keep)
    saved = gc.save_gguf(model, tmp_path / "m.gguf", "q4_0", source=theirs)
    first, second = (
        {t.name: t.data for t in gguf.GGUFReader(path).tensors if t.tensor_type.name == "Q4_0"}
        for path in (theirs, saved)
    )
    assert first.keys() == second.keys() and len(first) == 49
    for name, blocks in first.items():
        np.testing.assert_array_equal(second[name], blocks, err_msg=name)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("name", "arch"), [("gemma-2b", "gemma"), ("gemma2-2b", "gemma2")])
def test_older_generations(name, arch, mix, tmp_path):
    """Read back, they are the same model, rounded."""
    model = random_model(tiny(name, query_pre_attn_scalar=64))
    saved = gc.save_gguf(model, tmp_path / "m.gguf", mix, source=_with_vocabulary(tmp_path, model))
    loaded = gc.load_weights(saved)
    assert loaded.cfg == model.cfg
    ours, found = by_name(model), by_name(loaded)
    for key, value in ours.items():
        coarse = 1e-6 if "norm" in key else 0.2
        assert np.abs(found[key] - value).max() < coarse, key


def _with_vocabulary(folder, model):
    """A folder with the weights of a model and the vocabulary of the shipped checkpoint."""
    saved = gc.save_hf(model, folder / "hf")
    (saved / "tokenizer.model").write_bytes(open(f"{DIGITS}/tokenizer.model", "rb").read())
    return saved


def test_an_untied_head(tmp_path):
    model = random_model(tiny("gemma3-1b", tied_head=False))
    saved = gc.save_gguf(
        model, tmp_path / "m.gguf", "q8_0", source=_with_vocabulary(tmp_path, model)
    )
    assert gc.open_source(saved).tensors["output.weight"].encoding == "Q8_0"
    assert not gc.load_weights(saved).cfg.tied_head


def test_a_folder_becomes_a_file_that_says_the_same(tmp_path):
    """Vocabulary and all. Its scores are scaled otherwise than llama.cpp takes for granted, which
    goes into the norm of queries."""
    model = gc.load_weights(DIGITS, modalities=("text",), dtype="float32")
    assert model.cfg.query_pre_attn_scalar != model.cfg.head_dim
    told = []
    saved = gc.save_gguf(
        gc.load_weights(DIGITS), tmp_path / "d.gguf", "q8_0", source=DIGITS, notify=told.append
    )
    assert told == ["d.gguf: the decoder alone; towers go into files of their own"]
    tokens = np.arange(2, 18)[None]
    logits = [forward(one, tokens).logits for one in (model, gc.load_weights(saved))]
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[0]).max()
    text = "Which digit is left? Which is  larger?\n"
    first, second = load_tokenizer(DIGITS), load_tokenizer(str(saved))
    assert first.encode(text, bos=True) == second.encode(text, bos=True)
    assert second.decode(second.encode(text)) == text


def test_what_a_folder_says_of_texts_goes_along(tmp_path):
    """Sampling, ids that end an answer, and the chat template."""
    model = random_model(tiny("gemma3-1b", num_layers=1, vocab_size=384))
    folder = _with_vocabulary(tmp_path, model)
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    said = {"do_sample": True, "temperature": 0.7, "top_k": 64, "eos_token_id": [1, 40]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    (folder / "chat_template.jinja").write_text(template)
    saved = gc.save_gguf(model, tmp_path / "m.gguf", source=folder)
    first, second = gc.generation_defaults(folder), gc.generation_defaults(saved)
    assert second.sampling == first.sampling and first.sampling.temperature == 0.7
    assert load_tokenizer(str(saved)).stop_ids == load_tokenizer(str(folder)).stop_ids == (1, 40)
    assert (
        load_tokenizer(str(saved)).chat_template.text
        == "{{ bos_token }}{{ messages[0]['content'] }}"
    )
    again = gc.save_gguf(model, tmp_path / "again.gguf", source=saved)
    assert gc.generation_defaults(again) == second
    said["eos_token_id"] = [1, 40, 41, 42]
    (folder / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(gc.CheckpointError, match="more than a GGUF file can say"):
        gc.save_gguf(model, tmp_path / "more.gguf", source=folder)


def test_the_types_that_llama_cpp_would_choose_where_the_package_can():
    """Of Gemma 3 270M, against its published Q4_K_M."""
    shapes = {"token_embd.weight": (262_144, 640), "output_norm.weight": (640,)}
    sizes = {
        "attn_q": (1024, 640), "attn_k": (256, 640), "attn_v": (256, 640),
        "attn_output": (640, 1024), "ffn_gate": (2048, 640), "ffn_up": (2048, 640),
        "ffn_down": (640, 2048),
    }  # fmt: skip
    shapes |= {f"blk.{i}.{k}.weight": s for i in range(18) for k, s in sizes.items()}
    types = tensor_types(shapes, MIXES["q4_k_m"])
    more = [0, 1, 4, 7, 10, 13, 15, 16, 17]  # layers of the published file with more bits
    assert [i for i in range(18) if types[f"blk.{i}.attn_v.weight"] == "Q8_0"] == more
    assert [i for i in range(18) if types[f"blk.{i}.ffn_down.weight"] == "Q8_0"] == more
    assert types["blk.2.attn_q.weight"] == types["blk.2.ffn_down.weight"] == "Q5_0"
    assert types["token_embd.weight"] == "Q8_0" and types["output_norm.weight"] == "F32"


@pytest.mark.nightly
def test_the_published_mix_of_the_270m(real_gguf):
    tensors = gc.open_source(real_gguf).tensors
    types = tensor_types({n: info.shape for n, info in tensors.items()}, MIXES["q4_k_m"])
    instead = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
    assert types == {n: instead.get(i.encoding, i.encoding) for n, i in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="silu"), "cannot say this model's activation"),
        (dict(v_norm=True), "cannot say this model's v_norm"),
        (dict(attn_soft_cap=50.0), "cannot say this model's attn_soft_cap"),
    ],
)
def test_what_the_format_cannot_say_is_refused(change, message, tmp_path):
    model = random_model(tiny("gemma3-1b", num_layers=1, **change))
    with pytest.raises(gc.CheckpointError, match=message):
        gc.save_gguf(model, tmp_path / "m.gguf", source=DIGITS)
    assert not list(tmp_path.iterdir())


def test_targets_and_mixes_that_are_none(tmp_path):
    model = random_model(tiny("gemma3-1b", num_layers=1))
    (tmp_path / "taken.gguf").write_text("")
    with pytest.raises(gc.CheckpointError, match="exists already"):
        gc.save_gguf(model, tmp_path / "taken.gguf", source=DIGITS)
    with pytest.raises(gc.CheckpointError, match="parent folder does not exist"):
        gc.save_gguf(model, tmp_path / "no" / "m.gguf", source=DIGITS)
    with pytest.raises(ValueError, match="mix='q3' must be one of: q4_0, q8_0, q4_k_m"):
        gc.save_gguf(model, tmp_path / "m.gguf", "q3", source=DIGITS)
    bare = gc.save_hf(model, tmp_path / "bare")
    with pytest.raises(gc.CheckpointError, match="has no tokenizer"):
        gc.save_gguf(model, tmp_path / "m.gguf", source=bare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "taken.gguf"]


def test_rows_that_are_no_blocks_stay_in_half_precision(tmp_path):
    narrow = random_model(tiny("gemma3-1b", num_layers=1, head_dim=20, num_heads=2))
    saved = gc.save_gguf(narrow, tmp_path / "m.gguf", "q4_0", source=DIGITS)
    kinds = {name: info.encoding for name, info in gc.open_source(saved).tensors.items()}
    assert kinds["blk.0.attn_output.weight"] == "F16"  # rows of 40
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"


GENERATE = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, ids = sys.argv[1], json.loads(sys.argv[2])
model = Llama(path, n_ctx=64, n_threads=1, logits_all=True, verbose=False)
model.eval(ids)
rows = model.scores[: len(ids)].tolist()
for _ in range(8):
    ids.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(ids[-1:])
print(json.dumps([rows, ids]))
"""


@pytest.fixture
def in_llama_cpp():
    """`run(path, ids)`: logits of these ids, and ids with 8 more that llama.cpp chooses."""
    if subprocess.run([LLAMA, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama_cpp is not installed; GEMMA_JAX_LLAMA_CPP_PYTHON may name a Python")

    def run(path, ids):
        command = [LLAMA, "-c", GENERATE, str(path), json.dumps(ids)]
        done = subprocess.run(command, capture_output=True, check=True)
        logits, chosen = json.loads(done.stdout.splitlines()[-1])
        return np.array(logits), chosen

    return run


@pytest.mark.nightly
def test_llama_cpp_reads_a_tiny_one(in_llama_cpp, tmp_path):
    """It rounds activations to 8 bits: choices are the same where ours is clearer than that."""
    given = QUANT / "g3_q4_0.gguf"
    saved = gc.save_gguf(gc.load_weights(given), tmp_path / "m.gguf", "q4_0", source=given)
    ids = np.random.default_rng(0).integers(4, 350, 40).tolist()
    theirs, _ = in_llama_cpp(saved, ids)
    ours = np.asarray(forward(gc.load_weights(saved), np.array([ids])).logits[0])
    assert (
        np.abs(ours - theirs).max() < 0.3
        and np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.998
    )
    second, first = np.sort(ours, axis=-1)[:, -2:].T
    clear = first - second > 0.3
    assert clear.sum() > 8
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.mark.nightly
def test_llama_cpp_says_what_we_say(in_llama_cpp, real_gguf, tmp_path):
    saved = gc.save_gguf(gc.load_weights(real_gguf), tmp_path / "m.gguf", "q8_0", source=real_gguf)
    model, tok = load(str(saved), dtype="float32")
    ids = tok.encode("The capital of France is", bos=True)
    _, theirs = in_llama_cpp(saved, ids)
    (ours,) = generate(model, tok, ["The capital of France is"], max_new_tokens=8)
    assert tok.decode(theirs[len(ids) :]) == ours.text
