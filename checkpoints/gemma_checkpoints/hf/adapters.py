"""Reads the adapters of PEFT folders: `adapter_config.json` and `adapter_model.safetensors`.

Keys are matched to the rows of the table of tensors, whatever stands in front of them: transformers
has spelled the same module in several ways, and a model that sees has the modules of its decoder.
What a folder asks for is done in full, or it is refused: a factor that fits nothing would be
ignored, and the adapter seem to work.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gemma_jax.adapters import TABLE, Adapter, Factors, adapt
from gemma_jax.decoder.model import Gemma

from ..errors import CheckpointError
from ..name_table import dropped
from ..params import named_slots
from ..rearrange import shape as side_shape
from ..safetensors_file import SafetensorsFile
from .modules import (
    EMBEDDING_PATH,
    HEAD_PATH,
    TOWERS,
    WEIGHT,
    Module,
    modules_of,
    prefix_of,
    tensor_rows,
)
from .names import EMBEDDING, HEAD, hf_table, short_name
from .peft_config import CONFIG, WEIGHTS, read_config
from .peft_rules import PeftRules

ROOT = "base_model.model."
_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
_COPY = re.compile(r".+\.base_layer\.(weight|bias)")  # of the base weights: PEFT writes some
_KINDS = {
    "lora_A": "a", "lora_B": "b", "lora_embedding_A": "b", "lora_embedding_B": "a",
    "lora_magnitude_vector": "magnitude",
}  # fmt: skip


@dataclass
class _Found:
    """What the keys of a file are.

    Attributes:
      factors: Short path of a module -> kind -> array, as the file has it.
      whole: Short name of a tensor -> array.
      prefixes: Short path -> what stands in front of it.
      problems: Keys that fit nothing, a line each.
      unused: Keys of layers that share another's keys and values.
    """

    factors: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    whole: dict[str, np.ndarray] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_adapter(model: Gemma, folder: str | Path, *, only_decoder: bool = False) -> Gemma:
    """Puts the adapter of a PEFT folder into a model, which shares all its arrays.

    Keys may be spelled as any transformers since 4.40 has spelled them, and those of a decoder
    alone fit a model that sees or hears, and back. Layers of Gemma 3n that share keys and values
    have none of their own: factors that old folders hold for them are ignored, with a warning.

    Args:
      folder: With `adapter_config.json` and `adapter_model.safetensors`.
      only_decoder: Leaves out what the folder has for towers that the model does not have.

    Raises:
      CheckpointError: With everything that is wrong: settings that are not supported, keys that
        fit nothing in this model, and modules that the config means and the file has nothing for.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.load_adapter(gc.load_weights("checkpoints/digits"), "checkpoints/digits")
      Traceback (most recent call last):
      gemma_checkpoints.errors.CheckpointError: ...digits: no PEFT adapter: ...
    """
    return adapt(model, read_adapter(model, folder, only_decoder=only_decoder))


def read_adapter(model: Gemma, folder: str | Path, *, only_decoder: bool = False) -> Adapter:
    """What a PEFT folder holds for a model, by our names; see `load_adapter`."""
    folder = Path(folder)
    rules, raw = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(folder, f"{WEIGHTS} is missing beside {CONFIG}")
    modules, tying = modules_of(model), bool(raw.get("ensure_weight_tying"))
    found = _sorted(SafetensorsFile(folder / WEIGHTS), model, modules, only_decoder)
    if tying and model.cfg.tied_head:
        _tie(found)
    factors, misfits = _factors(found, modules, rules, bool(raw.get("use_dora")))
    whole, misshapen = _whole(found, model)
    problems = found.problems + misfits + misshapen
    problems += _unlike_config(found, rules, model, modules, tying)
    if not problems and not factors and not whole:
        problems = [f"{WEIGHTS} holds nothing for this model"]
    if problems:
        raise CheckpointError(folder, problems)
    _warn_of_unused(folder, found.unused)
    own_head = model.cfg.tied_head and not tying and (TABLE in factors or TABLE in whole)
    return Adapter(factors, whole, own_head)


def _sorted(
    file: SafetensorsFile, model: Gemma, modules: Mapping[str, Module], only_decoder: bool
) -> _Found:
    """Every key of a file, as what it is."""
    found, rows, table = _Found(), tensor_rows(model), hf_table(model.cfg)
    towers: dict[str, list[str]] = {}
    for key in file.tensors:
        inner, factor = key.removeprefix(ROOT), _FACTOR.fullmatch(key.removeprefix(ROOT))
        named = inner if factor is None else factor["path"] + WEIGHT
        short = short_name(named)
        path = short.removesuffix(WEIGHT)
        if key == inner or not jnp.issubdtype(file.tensors[key].dtype, jnp.floating):
            found.problems.append(f"{key}: no tensor of a PEFT adapter, {ROOT}... in floats")
        elif factor is not None and path in modules:
            kind, array = factor["kind"], file.read(key).astype(np.float32)
            array = array.T if "embedding" in kind else array
            found.factors.setdefault(path, {})[_KINDS[kind]] = array
            found.prefixes[path] = named.removesuffix(short)
        elif factor is None and _COPY.fullmatch(inner):
            continue
        elif factor is None and short in rows:
            found.whole[short] = file.read(key)
            found.prefixes[short] = named.removesuffix(short)
        elif (tower := _missing_tower(short, model)) is not None:
            towers.setdefault(tower, []).append(key)
        elif dropped(table, [short]):
            found.unused.append(key)
        else:
            found.problems.append(f"{key}: this model has nothing that it fits")
    if not only_decoder:
        found.problems += [
            f"{keys[0]} and {len(keys) - 1} more are for the {tower} tower, which this model does "
            f"not have: load it with the modality {tower!r}, or leave these out by only_decoder"
            for tower, keys in towers.items()
        ]
    return found


def _missing_tower(short: str, model: Gemma) -> str | None:
    """The modality of a tower that a tensor belongs to, if the model does not have it."""
    if not short.startswith(TOWERS):
        return None
    audio = short.startswith(("audio_tower.", "embed_audio."))
    name, part = ("audio", model.cfg.audio) if audio else ("image", model.cfg.vision)
    return name if part is None else None


def _tie(found: _Found) -> None:
    """Takes away what the file holds for the head, as it shall be that of the embedding."""
    pairs = [
        (found.factors.get(EMBEDDING_PATH), found.factors.pop(HEAD_PATH, {})),
        ({"whole": found.whole.get(EMBEDDING)}, {"whole": found.whole.pop(HEAD, None)}),
    ]
    found.problems += [
        f"{HEAD_PATH} {kind} differs from that of embed_tokens, though ensure_weight_tying ties it"
        for table, head in pairs
        for kind, array in head.items()
        if array is not None and not np.array_equal(array, (table or {}).get(kind))
    ]


def _factors(
    found: _Found, modules: Mapping[str, Module], rules: PeftRules, dora: bool
) -> tuple[dict[str, Factors], list[str]]:
    factors, problems = {}, []
    for path, arrays in found.factors.items():
        module, spelled = modules[path], found.prefixes[path] + path
        if problem := _misfit(module, arrays, rules.rank(spelled), dora):
            problems.append(f"{spelled}: {problem}")
            continue
        magnitude = arrays.get("magnitude")
        factors[module.name] = Factors(
            module.ours(arrays["a"], output=False),
            module.ours(arrays["b"], output=True),
            rules.scale(spelled),
            None if magnitude is None else module.ours(magnitude, output=True),
        )
    return factors, problems


def _misfit(module: Module, arrays: Mapping[str, np.ndarray], rank: int, dora: bool) -> str | None:
    """What is wrong with the factors of one module, if anything."""
    if dora and module.is_table:
        return "DoRA of a table of rows is not supported"
    outputs, inputs = module.shape
    expected: dict[str, tuple[int, ...]] = {"a": (rank, inputs), "b": (outputs, rank)}
    if dora:
        expected["magnitude"] = (outputs,)
    if expected.keys() != arrays.keys():
        given = ", ".join(sorted(arrays))
        return f"has {given}; expected {', '.join(sorted(expected))}"
    for kind, shape in expected.items():
        if arrays[kind].shape != shape:
            return f"{kind} has shape {list(arrays[kind].shape)}; expected {list(shape)}"
    return None


def _whole(found: _Found, model: Gemma) -> tuple[dict[str, np.ndarray], list[str]]:
    rows, slots, whole, problems = tensor_rows(model), named_slots(model), {}, []
    for short, array in found.whole.items():
        name, row = rows[short]
        slot = slots.get(name) or slots[TABLE]  # the head of a tied model
        shape = slot.shape if row.parsed is None else side_shape(row.parsed.left, slot.sizes)
        if array.shape != shape:
            problems.append(f"{short} has shape {list(array.shape)}; expected {list(shape)}")
        else:
            whole[name] = array if row.parsed is None else row.parsed(array, slot.sizes)
    return whole, problems


def _unlike_config(
    found: _Found, rules: PeftRules, model: Gemma, modules: Mapping[str, Module], tying: bool
) -> list[str]:
    """Modules that the config means and the file has nothing for, and the other way round."""
    spelled = _Spelling(found, model)
    problems = []
    for path in found.factors:
        if not any(map(rules.targets, spelled.all(path))) and not (tying and path == HEAD_PATH):
            problems.append(f"{spelled(path)}: the file has factors, but {CONFIG} means no such")
    for path in modules:
        if spelled.has(path) and rules.targets(spelled(path)) and path not in found.factors:
            problems.append(f"{spelled(path)}: {CONFIG} means it, but the file has no factors")
    for short in found.whole:
        if not any(map(rules.saves, spelled.all(short))) and not (tying and short == HEAD):
            problems.append(f"{spelled(short)}: whole in the file, but not in modules_to_save")
    for short in tensor_rows(model):
        inside = short.rpartition(".")[0]
        if spelled.has(short) and inside and rules.saves(spelled(short).rpartition(".")[0]):
            if short not in found.whole:
                problems.append(f"{spelled(short)}: in modules_to_save, but not in the file")
    return problems


class _Spelling:
    """How a file spells the paths of modules that it may lack."""

    def __init__(self, found: _Found, model: Gemma):
        decoder, self._model, self._given = Counter(), model, found.prefixes
        for path, prefix in found.prefixes.items():
            if not path.startswith(TOWERS) and not path.startswith(HEAD_PATH):
                decoder[prefix] += 1
        default = prefix_of(EMBEDDING_PATH, model.cfg)
        self._decoder = decoder.most_common(1)[0][0] if decoder else default
        self._of_towers = {p: found.prefixes[p] for p in found.prefixes if p.startswith(TOWERS)}

    def __call__(self, path: str) -> str:
        """The path, spelled."""
        if path in self._given:
            return self._given[path] + path
        if path.startswith(HEAD_PATH):
            return path
        if not path.startswith(TOWERS):
            return self._decoder + path
        tower = path.partition(".")[0]
        same = (self._of_towers[p] for p in self._of_towers if p.partition(".")[0] == tower)
        return next(same, "model.") + path

    def has(self, path: str) -> bool:
        """Whether the model that the file was made for has such a module, as its decoder tells."""
        return not path.startswith(TOWERS) or "language_model" in self._decoder

    def all(self, path: str) -> set[str]:
        """The path in every spelling: the config of an old folder may have the newer one."""
        spellings = ("", "model.", "model.language_model.", "language_model.model.")
        return {self(path)} | {prefix + path for prefix in spellings}


def _warn_of_unused(folder: Path, keys: list[str]) -> None:
    if keys:
        first, *more = keys
        also = f" and {len(more)} more" if more else ""
        warnings.warn(
            f"{folder}: {first}{also} ignored: no model computes with these",
            stacklevel=4,
        )
