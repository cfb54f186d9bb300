"""A checkpoint's own chat template decides how its conversations are written.

What is expected of those that are not Gemma's is what jinja2 makes in the environment of
transformers 5.24 (`utils/chat_template_utils.py`), here without the sandbox and the process.
"""

import importlib.util
import json

import jinja2
import pytest
from hypothesis import given
from test_chat_format import conversations
from text_samples import DATA, TEXTS, patient

from gemma_jax.text import (
    ChatTemplate,
    Tokenizer,
    encode_chat,
    in_gemma_format,
    render,
    render_chat,
)
from gemma_jax.text import chat_template as module
from gemma_jax.text.chat import GEMMA3_MEDIA, GEMMA3N_MEDIA
from gemma_jax.text.gguf_config import read_gguf_config
from gemma_jax.text.gguf_header import read_header, read_vocabulary
from gemma_jax.text.tokenizer_config import TokenizerConfig
from gemma_jax.text.train_vocabulary import train_vocabulary

PUBLISHED = {
    name: entry["text"]
    for name, entry in json.loads((DATA / "gemma_templates.json").read_text()).items()
}
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "the dog"}


def by_jinja2(text, messages, **variables):
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    variables = {"add_generation_prompt": True, **TOKENS, **variables}
    return environment.from_string(text).render(messages=messages, **variables)


def template(text):
    return ChatTemplate(text, "chat_template.jinja", TOKENS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_known(name):
    text = PUBLISHED[name]
    for spelling in (text, text.removesuffix("\n"), text.replace("\n", "\r\n")):
        assert template(spelling).gemma is not None
    assert template(text + " ").gemma is template(text.replace("model", "modal")).gemma is None


@pytest.mark.parametrize("name", PUBLISHED)
@patient
@given(messages=conversations(contents=TEXTS))
def test_our_code_says_what_a_published_template_says(name, messages):
    ours = template(PUBLISHED[name])
    try:
        expected = by_jinja2(PUBLISHED[name], messages)
    except jinja2.TemplateError as error:
        assert "System role not supported" in str(error)
        with pytest.raises(ValueError, match="has no system role"):
            ours.render(messages)
    else:
        assert ours.render(messages) == expected


@patient
@given(messages=conversations())
def test_items_in_the_templates_of_models_that_see(messages):
    for name, media in ("gemma3", GEMMA3_MEDIA), ("gemma3n", GEMMA3N_MEDIA):
        ours = template(PUBLISHED[name]).render(messages, media=media)
        assert ours == by_jinja2(PUBLISHED[name], messages)


OTHERS = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}",
    "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n"
    "  {{ ns.n }}: {{ m['content'] | upper }}\n{% endfor %}\n{{ messages | length }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('')}}",
]
TALK = [
    {"role": "system", "content": "Short."},
    USER,
    {"role": "assistant", "content": "It ran: <\"'&>."},
    {"role": "user", "content": "Where?  "},
]


@pytest.mark.parametrize("text", OTHERS[:3])
def test_any_other_template_is_run(text):
    assert template(text).render(TALK) == by_jinja2(text, TALK)


def test_what_transformers_adds_to_the_language():
    said = template(OTHERS[3]).render(TALK)
    assert said == "".join(json.dumps(message) for message in TALK[1:])


def test_roles_and_texts_as_templates_expect_them():
    said = template("{{ messages | tojson }}").render(
        [{"role": "user", "content": ["a", "b"], "name": "Ann"}, {"role": "model", "content": "c"}]
    )
    items = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert json.loads(said) == [
        {"role": "user", "content": items, "name": "Ann"},
        {"role": "assistant", "content": "c"},
    ]


def test_a_template_that_shows_no_images_refuses_them():
    messages = [{"role": "user", "content": [{"type": "image"}, "what?"]}]
    with pytest.raises(ValueError, match="no place for images"):
        template(CHATML).render(messages)
    with pytest.raises(ValueError, match="texts, not lists"):
        template(CHATML).render([{"role": "user", "content": ["a", "b"]}])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{ raise_exception('no tools here') }}", "refuses the messages: no tools here"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace(x='ab') %}" + "{% set ns.x = ns.x ~ ns.x %}" * 40, "memory"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than"),
    ],
)
def test_a_template_that_does_wrong_ends_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        template(text).render([USER])
    assert "chat_template.jinja" in str(caught.value)


def test_a_template_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="takes"):
        template(loops).render([USER])


def test_without_jinja2_the_template_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"chat_template\.jinja.*gemma-jax\[chat\]"):
        template(CHATML).render([USER])
    assert template(PUBLISHED["gemma3"]).render([USER]) == render([USER])


# --- where it comes from -------------------------------------------------------------------------


def written(tiny, folder, **files):
    (folder / "tokenizer.model").write_bytes(tiny.model.read_bytes())
    for name, content in files.items():
        path = folder / (f"{name}.jinja" if isinstance(content, str) else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer.from_folder(folder)


def config(value):
    return {"chat_template": value}


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
PLACES = [
    (dict(tokenizer_config=config("C")), "C"),
    (dict(tokenizer_config=config(NAMED)), "D"),
    (dict(tokenizer_config=config({"default": "D", "rag": "R"})), "D"),
    (dict(chat_template=config("J"), tokenizer_config=config("C")), "J"),
    (dict(processor_config=config("P"), tokenizer_config=config("C")), "P"),
    (dict(tokenizer_config=config(None)), None),
]


@pytest.mark.parametrize("files, expected", PLACES)
def test_where_a_template_is_found(tiny, tmp_path, files, expected):
    found = written(tiny, tmp_path, **files).chat_template
    assert (found and found.text) == expected


def test_a_file_of_its_own_comes_first(tiny, tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps(config("J")))
    found = written(tiny, tmp_path, chat_template="X", tokenizer_config=config("C"))
    assert found.chat_template.text == "X"


def test_named_templates_without_a_default_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="'default', only tool_use"):
        written(tiny, tmp_path, tokenizer_config=config(NAMED[:1]))


def test_ids_are_those_of_apply_chat_template(tiny, tmp_path, tokenizer):
    """Which encodes what the template says, and adds nothing: no <bos> that is not there."""
    found = written(tiny, tmp_path, chat_template=CHATML)
    ids = encode_chat(found, [USER])
    assert ids == tokenizer.encode(by_jinja2(CHATML, [USER])) and found.bos_id not in ids
    gemma = written(tiny, tmp_path, chat_template=PUBLISHED["gemma3"])
    assert encode_chat(gemma, [USER]) == encode_chat(tokenizer, [USER])
    assert render_chat(gemma, [USER]) == render([USER])


def test_a_template_may_ask_for_tokens_that_no_file_names(tiny, tmp_path):
    """`GemmaTokenizer` of transformers 5.24 calls them so, without a tokenizer_config.json."""
    found = written(tiny, tmp_path, chat_template="{{ bos_token }}{{ eos_token }}{{ unk_token }}")
    assert render_chat(found, [USER]) == "<bos><eos><unk>"
    found = written(tiny, tmp_path, tokenizer_config={"bos_token": None})
    assert render_chat(found, [USER]) == "<eos><unk>"


def test_a_gguf_file_brings_its_own(tiny):
    """llama.cpp begins every prompt with <bos> where the file asks for it, and never twice."""
    header = read_header(tiny.gguf)
    header["tokenizer.chat_template"] = CHATML.encode()
    header["tokenizer.ggml.bos_token_id"] = 2
    found = Tokenizer.from_gguf_header(header)
    ids = encode_chat(found, [USER])
    assert ids == [2, *found.encode(by_jinja2(CHATML, [USER]))]
    header["tokenizer.ggml.add_bos_token"] = False
    assert encode_chat(Tokenizer.from_gguf_header(header), [USER]) == ids[1:]
    header["tokenizer.chat_template"] = ("{{ bos_token }}" + CHATML).encode()
    del header["tokenizer.ggml.add_bos_token"]
    assert encode_chat(Tokenizer.from_gguf_header(header), [USER]) == ids


# --- where an answer ends, in a GGUF file --------------------------------------------------------

STOPS = [
    ({}, {"<eos>", "<end_of_turn>"}),
    ({"eos_token_id": 5}, {5, "<end_of_turn>"}),
    ({"eos_token_id": 1, "fim_pad_token_id": 9}, {1, 9, "<end_of_turn>"}),
    ({"eos_token_id": 1, "eot_token_id": 7, "eom_token_id": 8}, {1, 7, 8, "<end_of_turn>"}),
]


@pytest.mark.parametrize("keys, expected", STOPS)
def test_stop_ids_of_a_gguf_file(tiny, tokenizer, keys, expected):
    """llama.cpp, src/llama-vocab.cpp: the three keys, and pieces of well-known names."""
    header = read_header(tiny.gguf) | {f"tokenizer.ggml.{key}": i for key, i in keys.items()}
    _, stops = read_gguf_config(header, read_vocabulary(header))
    assert stops == {tokenizer.id_of(i) if isinstance(i, str) else i for i in expected}
    found = Tokenizer.from_gguf_header(header)
    assert set(found.stop_ids) == stops and found.stop_ids_from == "the GGUF header"


@pytest.mark.parametrize("value", [-1, 1 << 40, 1.5, True, b"x"])
def test_a_stop_id_that_is_no_piece_is_refused(tiny, value):
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.eot_token_id must be the id"):
        Tokenizer.from_gguf_header(read_header(tiny.gguf) | {"tokenizer.ggml.eot_token_id": value})


# --- what else a GGUF file says of its vocabulary ------------------------------------------------

OF_NO_ACCOUNT = {
    "ggml.pre": b"default",
    "ggml.padding_token_id": 0,
    "ggml.prefix_token_id": 67,  # CodeGemma
    "ggml.add_sep_token": False,
    "ggml.remove_extra_whitespaces": False,
    "chat_template.tool_use": b"T",
    "chat_templates": [b"tool_use"],
}


def test_keys_of_no_account_change_nothing(tiny, tokenizer):
    header = read_header(tiny.gguf)
    more = {f"tokenizer.{key}": value for key, value in OF_NO_ACCOUNT.items()}
    found = Tokenizer.from_gguf_header(header | more)
    assert found.encode("a b", bos=True) == tokenizer.encode("a b", bos=True)
    assert found.chat_template is None


@pytest.mark.parametrize(
    "key, value",
    [("ggml.foo", b"x"), ("foo", 1), ("ggml.add_sep_token", True), ("rwkv.world", b"x"),
     ("ggml.normalizer.lowercase", True), ("ggml.suppress_tokens", [3])],
)  # fmt: skip
def test_keys_that_may_change_ids_are_refused_by_name(tiny, key, value):
    """The keys are those of `LLM_KV_TOKENIZER_*` in llama.cpp's src/llama-arch.cpp."""
    with pytest.raises(ValueError, match=rf"tokenizer\.{key} is "):
        Tokenizer.from_gguf_header(read_header(tiny.gguf) | {f"tokenizer.{key}": value})


def test_a_tokenizer_of_gemma_4_needs_its_own_template(tmp_path):
    """Its turns are not those of Gemma 3, so no format of ours is put in the place of its own."""
    lines, path = ["the dog is here\n"] * 3, tmp_path / "tokenizer.model"
    turns = ["<|turn>", "<turn|>"]
    path.write_bytes(train_vocabulary(lines, 300, [*turns, "\n"], hard_vocab_limit=False))
    tokenizer = Tokenizer.from_file(path, TokenizerConfig(specials=tuple(turns)))
    with pytest.raises(
        ValueError, match=r"marks turns by <\|turn>, as Gemma 4 does, .*no chat tem"
    ):
        encode_chat(tokenizer, [USER])
    assert not in_gemma_format(tokenizer)
    tokenizer.chat_template = template(
        "{% for m in messages %}<|turn>{{ m['content'] }}{% endfor %}"
    )
    assert render_chat(tokenizer, [USER]) == "<|turn>the dog"
