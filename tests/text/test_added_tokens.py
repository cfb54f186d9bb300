"""Tokens that were added to a vocabulary, their flags, and what the files beside it say."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from text_samples import TEXTS, patient

from gemma_jax.text import Tokenizer
from gemma_jax.text.added_tokens import FLAGS

ADDED = ["<|im_start|>", "<|im_end|>", "<dog>", "dog", "over the", "\u2581\u2581x", "a\nb"]
SNIPPETS = [*ADDED, " ", "\n", "\t", "the ", "dogs", "_", "x", ".", "<bos>", "\u2581", "\u2581the"]
SPICED = st.one_of(TEXTS, st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join))


def with_tokens(tiny, *tokens):
    root = json.loads(tiny.json.read_text(encoding="utf-8"))
    first = len(root["model"]["vocab"])
    root["added_tokens"] += [{"id": first + i, **token} for i, token in enumerate(tokens)]
    return root


@patient
@given(data=st.data())
def test_flags_find_what_hugging_face_finds(tiny, data):
    """tokenizers 0.23: `find_matches` of src/tokenizer/added_vocabulary.rs."""
    flags = st.fixed_dictionaries({name: st.booleans() for name in (*FLAGS, "special")})
    chosen = data.draw(st.lists(st.sampled_from(ADDED), unique=True, min_size=1))
    root = with_tokens(tiny, *({"content": c, **data.draw(flags)} for c in chosen))
    ours = Tokenizer.from_hf_json(json.dumps(root))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(root))
    for text in data.draw(st.lists(SPICED, min_size=3, max_size=3)):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def folder(tiny, path, **files):
    (path / "tokenizer.model").write_bytes(tiny.model.read_bytes())
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def entry(content, special=True, **flags):
    return {**dict.fromkeys(FLAGS, False), "content": content, "special": special, **flags}


def test_tokens_beside_a_tokenizer_model(tiny, tokenizer, tmp_path):
    """transformers 5.24, `PreTrainedTokenizerBase._from_pretrained`: both files add tokens."""
    size = tokenizer.vocab_size
    path = folder(
        tiny,
        tmp_path,
        added_tokens={"<|im_start|>": size, "<tool>": size + 3},
        tokenizer_config={
            "added_tokens_decoder": {
                str(size): entry("<|im_start|>"),
                str(size + 1): entry("<|im_end|>", lstrip=True),
            },
            "eos_token": "<|im_end|>",
        },
    )
    found = Tokenizer.from_folder(path)
    text = "<|im_start|>the dog <tool>   <|im_end|>"
    ids = found.encode(text)
    assert ids[0] == size and ids[-1] == size + 1 and size + 3 in ids
    assert found.decode(ids) == "<|im_start|>the dog <tool><|im_end|>", "lstrip took the spaces"
    assert found.decode(ids, skip_special=True) == "the dog <tool>", "which is not special"
    assert found.eos_id == size + 1 and set(found.stop_ids) > {1, size + 1}
    assert found.decode([size + 2]) == "" and found.vocab_size == size + 4


def test_an_unused_piece_may_be_renamed(tiny, tokenizer, tmp_path):
    i = tokenizer.id_of("<unused0>")
    path = folder(tiny, tmp_path, tokenizer_config={"added_tokens_decoder": {i: entry("<call>")}})
    found = Tokenizer.from_folder(path)
    assert found.encode("<call>") == [i] and found.decode([i]) == "<call>"


BAD_FILES = [
    (dict(added_tokens={"<new>": "x"}), r"added_tokens\.json.*'<new>'"),
    (dict(added_tokens={"<new>": 1 << 40}), "near 5"),
    (dict(added_tokens={"<bos>": 900}), "'<bos>' has id 900, in the vocabulary 2"),
    (dict(added_tokens={"<new>": 400}), "id 400 is .*'<new>'"),
    (dict(added_tokens=[1]), "JSON object"),
    (dict(tokenizer_config={"added_tokens_decoder": {"x": {}}}), "ids to tokens"),
    (dict(tokenizer_config={"added_tokens_decoder": {"900": {}}}), "content"),
    (dict(tokenizer_config={"eos_token": "<nonesuch>"}), "'<nonesuch>' has no piece"),
    (dict(tokenizer_config={"additional_special_tokens": ["<no>"]}), "'<no>' has no piece"),
    (dict(tokenizer_config={"add_eos_token": True}), "add_eos_token is True"),
    (dict(tokenizer_config={"clean_up_tokenization_spaces": True}), "clean_up_tokenization"),
    (dict(tokenizer_config={"auto_map": {"AutoTokenizer": "x.Y"}}), "auto_map"),
    (dict(tokenizer_config={"reverse_text": True}), "'reverse_text' is not known"),
    (dict(tokenizer_config={"chat_template": 3}), "chat_template must be a text"),
]


@pytest.mark.parametrize("files, message", BAD_FILES)
def test_what_cannot_be_honoured_is_refused(tiny, tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_folder(folder(tiny, tmp_path, **files))
    assert str(tmp_path) in str(caught.value)


# google/gemma-3-4b-it and google/gemma-2-2b-it, without what is in the tests above.
PUBLISHED = {
    "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": ["<end_of_turn>"],
    "boi_token": "<start_of_image>", "bos_token": "<bos>", "clean_up_tokenization_spaces": False,
    "eoi_token": "<end_of_image>", "eos_token": "<eos>", "extra_special_tokens": {},
    "image_token": "<image_soft_token>", "model_max_length": 1000000000000000019884624838656,
    "pad_token": "<pad>", "processor_class": "Gemma3Processor", "sp_model_kwargs": None,
    "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>", "use_default_system_prompt": False,
}  # fmt: skip


def test_published_keys_are_known(tiny, tokenizer, tmp_path):
    specials = {key: entry("<bos>") for key in ("bos_token",)} | {"eos_token": "<eos>"}
    path = folder(tiny, tmp_path, tokenizer_config=PUBLISHED, special_tokens_map=specials)
    found = Tokenizer.from_folder(path)
    assert found.encode("the dog", bos=True) == tokenizer.encode("the dog", bos=True)
    assert found.stop_ids == tokenizer.stop_ids and found.add_bos


def test_a_prompt_without_bos(tiny, tmp_path):
    path = folder(tiny, tmp_path, tokenizer_config={"add_bos_token": False})
    assert not Tokenizer.from_folder(path).add_bos
