"""Writes adapters as PEFT folders, with the keys that PEFT (0.21) writes itself."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from gemma_jax.adapters import TABLE, Factors, factors_of
from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import layer_names
from gemma_jax.training.lora import Lora, chosen_by_name
from gemma_jax.weights.tree import ParamPath, flat_params

from ..export import host_array
from ..folders import new_folder
from ..json_values import Json
from ..name_table import Row
from ..params import Slot, named_slots
from ..safetensors_file import write_safetensors
from .adapters import ROOT
from .modules import HEAD_PATH, Module, modules_of, prefix_of, tensor_rows
from .new_adapters import chosen_by_peft, rules_of, saves
from .peft_config import CONFIG, WEIGHTS
from .peft_rules import PeftRules

# What PEFT writes besides, in the order of its file.
DEFAULTS: Json = dict.fromkeys(
    "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules "
    "kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config "
    "megatron_config monteclora_config revision target_parameters trainable_token_indices "
    "use_bdlora velora_config".split()
) | {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
    "use_qalora": False,
}


def save_adapter(
    model: Gemma,
    folder: str | Path,
    settings: Lora | None = None,
    *,
    base: str | None = None,
) -> Path:
    """Saves the adapters of a model as a new PEFT folder, which appears whole or not at all.

    Keys are those of the class of transformers for the model: with a tower that it has, those of
    `...ForConditionalGeneration`, else of `...ForCausalLM`. Copies of base weights, which PEFT puts
    beside the factors of an embedding, are left out: nobody reads them.

    Args:
      model: With adapters.
      folder: Must not exist, or be empty.
      settings: By which the adapters were made: they say what was trained whole, and by which names
        the modules are meant. Default: nothing whole, and what the model holds.
      base: Name or path of the base model, as a note for PEFT.

    Raises:
      CheckpointError: The folder is taken or cannot be written.
      ValueError: The model has no adapters; one is beside a parameter that transformers has not.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.save_adapter(gc.load_weights("checkpoints/digits"), "new")
      Traceback (most recent call last):
      ValueError: the model has no adapters to save
    """
    factors, modules = factors_of(model), modules_of(model)
    whole = _saved_whole(model, settings)
    if not factors and not whole:
        raise ValueError("the model has no adapters to save")
    tied = model.cfg.tied_head and TABLE in factors
    arrays = _of_factors(model, factors, modules)
    paths = {module.name: path for path, module in modules.items()}
    by_path = {paths[name]: one for name, one in factors.items()}
    config = _config(by_path, modules, model.cfg, settings, tied, base)
    config["modules_to_save"], saved = _whole_tensors(model, whole, settings)
    arrays |= saved
    if tied:
        arrays |= _of_tied_head(factors[TABLE])
    target, arrays = Path(folder), dict(sorted(arrays.items()))
    with new_folder(target, needed=sum(a.nbytes for a in arrays.values())) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        header = {name: (a.shape, a.dtype) for name, a in arrays.items()}
        for _ in write_safetensors(part / WEIGHTS, header, arrays.values()):
            pass
    return target


def trained_by_key(model: Gemma, trained: Mapping[ParamPath, jax.Array]) -> dict[str, np.ndarray]:
    """What a run trains by the keys of an adapter's file: parameters, or their gradients.

    Args:
      model: Of `join`, by which ranks are known.
      trained: See `training.lora.train_adapters`.
    """
    ranks = {name: one.rank for name, one in factors_of(model).items()}
    factors: dict[str, Factors] = {}
    arrays, rows = {}, {name: (theirs, row) for theirs, (name, row) in tensor_rows(model).items()}
    for path in flat_params(model):
        parts = {p[-1]: v for p, v in trained.items() if p[:-1] == path}
        for name, i in layer_names(path, model):
            ours = {kind: np.asarray(v if i is None else v[i]) for kind, v in parts.items()}
            if name in ranks and {"a", "b"} <= ours.keys():
                a, b = ours["a"][: ranks[name]], ours["b"][..., : ranks[name]]
                factors[name] = Factors(a, b, 1.0, ours.get("magnitude"))
            elif path in trained:
                theirs, row = rows[name]
                whole = np.asarray(trained[path] if i is None else trained[path][i])
                key = ROOT + prefix_of(theirs, model.cfg) + theirs
                arrays[key] = _as_theirs(whole, row, named_slots(model)[name])
    return _of_factors(model, factors, modules_of(model)) | arrays


def _of_factors(
    model: Gemma, factors: Mapping[str, Factors], modules: Mapping[str, Module]
) -> dict[str, np.ndarray]:
    """Key -> array."""
    paths, arrays = {module.name: path for path, module in modules.items()}, {}
    if strange := sorted(factors.keys() - paths.keys()):
        raise ValueError(
            f"{strange[0]} (and {len(strange) - 1} more): PEFT has no place for an adapter there; "
            "merge it, and save the model"
        )
    for name, one in factors.items():
        path = paths[name]
        arrays |= _tensors(modules[path], prefix_of(path, model.cfg) + path, one)
    return arrays


def _as_theirs(array: np.ndarray, row: Row, slot: Slot) -> np.ndarray:
    return _float32(array if row.parsed is None else row.parsed.inverse(array, slot.sizes))


def _tensors(module: Module, spelled: str, one: Factors) -> dict[str, np.ndarray]:
    a, b = module.theirs(one.a, output=False), module.theirs(one.b, output=True)
    path = ROOT + spelled
    if module.is_table:
        arrays = {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
    else:
        arrays = {"lora_A.weight": a, "lora_B.weight": b}
    if one.magnitude is not None:
        arrays["lora_magnitude_vector"] = module.theirs(one.magnitude, output=True)
    return {f"{path}.{name}": _float32(array) for name, array in arrays.items()}


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _of_tied_head(table: Factors) -> dict[str, np.ndarray]:
    """The factors of the embedding once more, as PEFT has them where `ensure_weight_tying` is."""
    path = ROOT + HEAD_PATH
    return {
        f"{path}.lora_A.weight": _float32(table.a),
        f"{path}.lora_B.weight": _float32(table.b),
    }


def _config(
    factors: Mapping[str, Factors],
    modules: Mapping[str, Module],
    cfg: GemmaConfig,
    settings: Lora | None,
    tied: bool,
    base: str | None,
) -> Json:
    rslora = settings is not None and settings.rslora
    spelled = {path: prefix_of(path, cfg) + path for path in modules}
    ranks = {spelled[path]: one.rank for path, one in factors.items()}
    alphas = {
        spelled[path]: _tidy(one.scale * (one.rank**0.5 if rslora else one.rank))
        for path, one in factors.items()
    }
    r, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 8
                for values in (ranks, alphas))  # fmt: skip
    return DEFAULTS | {
        "base_model_name_or_path": base,
        "ensure_weight_tying": tied,
        "lora_alpha": alpha,
        "peft_version": "0.21.2",
        "r": r,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {path: one for path, one in alphas.items() if one != alpha},
        "target_modules": _targets(ranks.keys(), spelled.values(), settings),
        "use_dora": any(one.magnitude is not None for one in factors.values()),
        "use_rslora": rslora,
    }


def _tidy(alpha: float) -> float | int:
    """Scales are float32: what is a whole number but for its rounding is one."""
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-6 * abs(alpha) else alpha


def _targets(adapted, known, settings: Lora | None) -> list[str] | str:
    """How a config means just these modules: as settings do, by their last names, or in full."""
    adapted, known = set(adapted), set(known)
    if settings is not None and settings.target_modules is not None:
        given = settings.target_modules
        rules = replace(rules_of(settings), layers_to_transform=None)
        if {path for path in known if rules.targets(path)} == adapted:
            return given if isinstance(given, str) else sorted(given)
    names = sorted({path.rpartition(".")[2] for path in adapted})
    by_name = PeftRules(1, 1, target_modules=names)
    if {path for path in known if by_name.targets(path)} == adapted:
        return names
    return sorted(adapted)


def _saved_whole(model: Gemma, settings: Lora | None) -> set[str]:
    if settings is None or not settings.whole:
        return set()
    chosen = chosen_by_name if settings.target_modules is None else chosen_by_peft
    return chosen(model, settings)[1]


def _whole_tensors(
    model: Gemma, whole: set[str], settings: Lora | None
) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """Modules that are saved whole, and all their tensors."""
    rows, slots, params = tensor_rows(model), named_slots(model), flat_params(model)
    if settings is not None and settings.target_modules is not None:
        names = sorted(settings.whole)
    else:
        theirs = [theirs for theirs, (name, _) in rows.items() if name in whole]
        names = sorted({prefix_of(one, model.cfg) + one.rpartition(".")[0] for one in theirs})
    rules, arrays = PeftRules(1, 1, modules_to_save=names), {}
    for theirs, (name, row) in rows.items():
        if name not in slots or not saves(rules, theirs, model):
            continue
        array = _as_theirs(host_array(params[slots[name].path], slots[name].row), row, slots[name])
        arrays[ROOT + prefix_of(theirs, model.cfg) + theirs] = array
    return names or None, arrays
