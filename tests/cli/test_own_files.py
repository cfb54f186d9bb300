"""What a checkpoint's own files say reaches the commands: where an answer ends, its chat template,
how to choose tokens."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import gemma_jax as gj
from gemma_checkpoints import save_hf

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def own(talker, tmp_path):
    """`own(**files)` is the tiny talker with these files beside it."""

    def write(**files):
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(talker, folder)
        for name, content in files.items():
            is_text = isinstance(content, str)
            path = folder / (f"{name}.jinja" if is_text else f"{name}.json")
            path.write_text(content if is_text else json.dumps(content))
        return folder

    return write


def first_token(cli, source, *more):
    ran = cli("generate", "Hi", "--model", source, "--max-new-tokens", 8, "--json", *more)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_stop_ids_of_a_generation_config(cli, own, talker):
    free = first_token(cli, talker)["token_ids"]
    end = free[4]
    for ids in (end, [1, end]):
        folder = own(generation_config={"eos_token_id": ids})
        done = first_token(cli, folder)
        assert done["token_ids"] == free[: free.index(end) + 1]
        assert done["finish_reason"] == "stop"
        told = json.loads(cli("info", folder, "--json").out)
        assert told["stop_ids_from"] == "generation_config.json"
        assert told["stop_ids"] == sorted({ids} if isinstance(ids, int) else set(ids))


def test_a_stop_text_may_be_a_special_token(cli, talker, refused):
    model, tokenizer = gj.load(str(talker))
    names = tokenizer.special_ids
    free = gj.generate(model, tokenizer, "Hi", max_new_tokens=8, stop_ids=())
    swapped = tokenizer.with_stop_ids([], "nobody")
    swapped.special_ids = names | {"<|im_end|>": free.token_ids[3]}
    done = gj.generate(model, swapped, "Hi", max_new_tokens=8, stop=["<|im_end|>"])
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]
    told = refused("generate", "Hi", "--model", talker, "--stop", "x<end_of_turn>")
    assert "holds the special token <end_of_turn>" in told


def test_sampling_of_a_generation_config_is_that_of_chat(cli, own, talker):
    """A command line has the last word."""
    words = ("chat", "--max-new-tokens", 8)
    greedy = cli(*words, "--model", talker, "--temperature", 0, stdin=b"Hi\n").out
    folder = own(generation_config={"do_sample": False, "eos_token_id": [1, 5]})
    assert gj.load_sampling(str(folder)) == gj.Sampling()
    assert cli(*words, "--model", folder, stdin=b"Hi\n").out == greedy
    wild = own(generation_config={"do_sample": True, "temperature": 5.0, "eos_token_id": [1, 5]})
    assert cli(*words, "--model", wild, stdin=b"Hi\n").out != greedy
    assert cli(*words, "--model", wild, "--temperature", 0, stdin=b"Hi\n").out == greedy


def test_what_a_generation_config_asks_in_vain_is_named(own, refused):
    told = refused("generate", "Hi", "--model", own(generation_config={"num_beams": 4}))
    assert "generation_config.json" in told and "num_beams is 4" in told


def test_a_template_of_its_own_decides(cli, own, talker):
    folder = own(chat_template=CHATML)
    ids = first_token(cli, folder, "--chat")["prompt_token_ids"]
    tokenizer = gj.load_tokenizer(str(talker))
    assert ids == tokenizer.encode("[user] Hi\n[assistant] "), "no more <bos> than it says"
    told = json.loads(cli("info", folder, "--json").out)["chat_template"]
    assert told == "its own, run by jinja2 (chat_template.jinja)"


@pytest.mark.parametrize("text, anew", [(CHATML, 0), ("{{ messages | length }}" + CHATML, 2)])
def test_a_conversation_in_a_template_of_its_own(own, monkeypatch, text, anew):
    """The cache is kept, unless earlier turns are written otherwise than before."""
    cleared, clear = [], gj.Session.clear
    monkeypatch.setattr(
        gj.Session, "clear", lambda *args, **how: (cleared.append(1), clear(*args, **how))
    )
    model, tokenizer = gj.load(str(own(chat_template=text)))
    chat = gj.Conversation(model, tokenizer, system="Be", max_len=256, sampling=gj.Sampling())
    answers = [chat.say(said, max_new_tokens=4) for said in ("Hi", "capital", "France")]
    assert len(cleared) == anew
    history = [{"role": "system", "content": "Be"}, *chat.messages[:-1]]
    fresh = gj.generate(model, tokenizer, [history], max_new_tokens=4)[0]
    assert fresh.prompt_token_ids == gj.encode_chat(tokenizer, history)
    if anew:
        assert fresh.text == answers[-1]


def parrot(folder, token, **sizes):
    """A model that says `token` whatever comes: no layer adds anything, and its row is longest."""
    save_hf(tiny.model(tiny.gemma3(layers=1, **sizes)), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, array in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "model.norm.weight")):
            array[:] = 0
        elif "embed_tokens" in name:
            array[:] = np.abs(array)
            array[token] = 50 * array.mean(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_rows_without_a_piece_are_no_text(cli, tmp_path, vocabulary):
    """A model that chooses a row beyond the vocabulary goes on: transformers 5.24 decodes it to
    nothing. Alone, in a batch, as a stream, in a conversation."""
    folder = parrot(tmp_path / "hf", 350, vocab_size=352)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    done = first_token(cli, folder)
    assert (done["token_ids"], done["text"]) == ([350] * 8, "")
    ran = cli("generate", "Hi", "--model", folder, "--max-new-tokens", 3)
    assert (ran.code, ran.out) == (0, "\n")
    assert cli("chat", "--model", folder, "--max-new-tokens", 3, stdin=b"Hi\nHi\n").code == 0
    loaded, tokenizer = gj.load(str(folder))
    assert [c.text for c in gj.generate(loaded, tokenizer, ["Hi", "a"], max_new_tokens=2)] == [
        "",
        "",
    ]
    assert gj.generate(loaded, tokenizer, [[2, 351]], max_new_tokens=1)[0].token_ids == [350]
    with pytest.raises(ValueError, match="outside"):
        gj.generate(loaded, tokenizer, [[2, 352]], max_new_tokens=1)
