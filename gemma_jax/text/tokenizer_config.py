"""What the files beside a vocabulary say: `tokenizer_config.json`, `special_tokens_map.json`,
`added_tokens.json`, and the chat template, in whichever file it lies.

Which of them counts is transformers' rule (5.24, `PreTrainedTokenizerBase._from_pretrained`). What
they say is used, listed below as irrelevant, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .added_tokens import AddedToken
from .chat_template import ChatTemplate

CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
JINJA, LEGACY, PROCESSOR = "chat_template.jinja", "chat_template.json", "processor_config.json"
MODULES = "modules.json"  # of sentence-transformers
_MAX_FILE = 1 << 26

USED = frozenset(
    "bos_token eos_token unk_token additional_special_tokens extra_special_tokens "
    "added_tokens_decoder add_bos_token add_eos_token chat_template "
    "clean_up_tokenization_spaces add_prefix_space do_lower_case split_special_tokens".split()
)
# Key -> why it changes no ids and no text here.
IRRELEVANT: Mapping[str, str] = {
    **dict.fromkeys(
        ("tokenizer_class", "processor_class", "tokenizer_file", "vocab_file", "use_fast",
         "backend", "tokenizer_type", "fast_tokenizer", "slow_tokenizer_class"),
        "names a class or a file of transformers; the vocabulary itself is read and checked",
    ),
    **dict.fromkeys(
        ("padding_side", "pad_token", "pad_token_id", "pad_token_type_id", "pad_to_multiple_of",
         "pad_to_max_length"),
        "rows are padded by position, not by a token",
    ),
    **dict.fromkeys(
        ("model_max_length", "max_len", "max_length", "truncation_side", "truncation_strategy",
         "stride", "model_input_names", "verbose", "return_tensors"),
        "a text is never cut off; the context of the model is the bound",
    ),
    **dict.fromkeys(
        ("mask_token", "cls_token", "sep_token", "boi_token", "eoi_token", "image_token",
         "boa_token", "eoa_token", "audio_token", "model_specific_special_tokens"),
        "names a piece that the vocabulary marks itself, or that no decoder asks for",
    ),
    **dict.fromkeys(
        ("sp_model_kwargs", "legacy", "spaces_between_special_tokens", "use_default_system_prompt",
         "from_slow", "name_or_path", "is_local", "local_files_only", "special_tokens_map_file",
         "trust_remote_code", "transformers_version", "revision", "device_map", "errors",
         "clean_text", "response_schema"),
        "an option of transformers' loading; Gemma's tokenizer class does not act on it",
    ),
}  # fmt: skip
# Key -> values that change nothing.
_NEUTRAL = {
    "auto_map": (None, {}),  # code of its own, which would be run in the place of Gemma's
    "add_eos_token": (None, False),
    "clean_up_tokenization_spaces": (None, False),
    "add_prefix_space": (None, False),
    "do_lower_case": (None, False),
    "split_special_tokens": (None, False),
    "unk_token": (None, "<unk>"),
}

# What `GemmaTokenizer` of transformers calls them in a folder that does not say.
_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class TokenizerConfig:
    """What a vocabulary does not say itself.

    Attributes:
      bos_token, eos_token: Pieces; `None` for <bos> and <eos>.
      specials: Pieces that are special, whatever the vocabulary says of them.
      added: Id -> token, of those that were added to the vocabulary or have flags.
      add_bos: Whether a prompt of plain text begins with `bos_token`.
      add_eos: Whether a text ends with `eos_token`, as those that are embedded do; `None`: as the
        vocabulary's file says. A folder that is no sentence-transformers one must not say so:
        nothing can be written after it.
      chat_template: The checkpoint's own.
    """

    bos_token: str | None = None
    eos_token: str | None = None
    specials: tuple[str, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    add_bos: bool = True
    add_eos: bool | None = False
    chat_template: ChatTemplate | None = None


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """What the files of a Hugging Face folder say.

    Raises:
      ValueError: A file that is broken, or says what this library does not do; the message names
        both.
    """
    config = read_object(folder / CONFIG)
    legacy = "added_tokens_decoder" not in config
    named = {**config, **(_checked(folder / SPECIALS) if legacy else {})}
    embeds = (folder / MODULES).is_file()
    where = folder / CONFIG
    try:
        _refuse(config, embeds)
        bos, eos = (_name(named.get(key)) for key in ("bos_token", "eos_token"))
        specials = [name for name in (bos, eos) if name is not None]
        more = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
        more = list(more.values()) if isinstance(more, Mapping) else more
        if not isinstance(more, list):
            raise ValueError("additional_special_tokens must be a list")
        specials += [name for name in map(_name, more) if name is not None]
        added = _decoder(config.get("added_tokens_decoder") or {})
        where = folder / ADDED
        added = {**_encoder(read_object(where), specials, added), **added}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    template = _template(folder, config)
    return TokenizerConfig(
        bos_token=bos,
        eos_token=eos,
        specials=tuple(specials),
        added=added,
        add_bos=config.get("add_bos_token") is not False,
        add_eos=config.get("add_eos_token") if embeds else False,
        chat_template=template and ChatTemplate(*template, _tokens(named)),
    )


def read_object(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file; ValueError if it is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_FILE:
        raise ValueError(f"{path}: expected at most {_MAX_FILE} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _checked(path: Path) -> dict:
    values = read_object(path)
    if unknown := [key for key in values if key not in USED and key not in IRRELEVANT]:
        raise ValueError(f"{path}: {unknown[0]!r} is no special token that is known here")
    return values


def _refuse(config: dict, embeds: bool) -> None:
    for key, value in config.items():
        if key == "add_eos_token" and embeds and value is True:
            continue
        if key in _NEUTRAL:
            token = key == "unk_token" and isinstance(value, Mapping)
            name = _name(value) if token else value
            if name not in _NEUTRAL[key]:
                raise ValueError(f"{key} is {name!r}, which is not supported; expected it unset")
        elif value is not None and key not in USED and key not in IRRELEVANT:
            raise ValueError(f"{key!r} is not known here: it may change how texts are read")


def _name(value: object) -> str | None:
    """The text of a token that is written as text or as an object."""
    content = value.get("content") if isinstance(value, Mapping) else value
    if content is not None and not isinstance(content, str):
        raise ValueError(f"expected a token as text, got {value!r:.200}")
    return content or None


def _tokens(named: dict) -> dict[str, str]:
    """What a template may ask for by name (transformers' `special_tokens_map`)."""
    names = {key: value for key, value in (_TOKENS | named).items() if key.endswith("_token")}
    return {
        key: content
        for key, value in names.items()
        if isinstance(content := value.get("content") if isinstance(value, dict) else value, str)
    }


def _decoder(entries: object) -> dict[int, AddedToken]:
    if not isinstance(entries, dict) or not all(str(i).isdigit() for i in entries):
        raise ValueError("added_tokens_decoder must be an object from ids to tokens")
    return {int(i): AddedToken.read(entry) for i, entry in entries.items()}


def _encoder(
    ids: dict, specials: list[str], known: Mapping[int, AddedToken]
) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for content, i in ids.items():
        if not isinstance(i, int) or isinstance(i, bool) or not content:
            raise ValueError(f"expected ids of tokens, got {content!r}: {i!r:.80}")
        if i in added or (i in known and known[i].content != content):
            other = known[i] if i in known else added[i]
            raise ValueError(f"id {i} is both {other.content!r} and {content!r}")
        special = content in specials
        added[i] = AddedToken(content, special=special, normalized=not special)
    return added


def _template(folder: Path, config: dict) -> tuple[str, str] | None:
    """Text and file. A file of its own comes before a key; a processor's before a tokenizer's."""
    if (folder / JINJA).is_file():
        try:
            return (folder / JINJA).read_text(encoding="utf-8"), JINJA
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / JINJA}: expected UTF-8: {error.reason}") from None
    for name in (PROCESSOR, LEGACY, CONFIG):
        values = config if name == CONFIG else read_object(folder / name)
        if values.get("chat_template") is not None:
            try:
                return default_template(values["chat_template"]), name
            except ValueError as error:
                raise ValueError(f"{folder / name}: {error}") from None
    return None


def default_template(value: object) -> str:
    """The template out of one, a list of named ones, or an object of named ones.

    Raises:
      ValueError: None of these, or none that is named "default".
    """
    if isinstance(value, list):
        pairs = [v for v in value if isinstance(v, dict) and {"name", "template"} <= v.keys()]
        if len(pairs) != len(value):
            raise ValueError("chat_template must list objects with a name and a template")
        value = {str(pair["name"]): pair["template"] for pair in pairs}
    if isinstance(value, dict):
        if "default" not in value:
            raise ValueError(
                f"chat_template has none that is named 'default', only {', '.join(value)}"
            )
        value = value["default"]
    if not isinstance(value, str):
        raise ValueError(f"chat_template must be a text, got {type(value).__name__}")
    return value
