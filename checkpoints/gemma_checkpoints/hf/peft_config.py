"""`adapter_config.json` of PEFT (0.21): what of it is used, and what is refused by name."""

from pathlib import Path

from ..errors import CheckpointError
from ..json_values import Json, flag, read_json
from .peft_rules import PeftRules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that say how an adapter was begun or trained, or how PEFT runs it, and change no result.
SILENT = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_type peft_version "
    "lora_dropout init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    "megatron_core runtime_config qalora_group_size".split()
)
USED = frozenset(
    "r lora_alpha target_modules exclude_modules modules_to_save layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern use_rslora use_dora ensure_weight_tying".split()
)
# Beginnings that leave the base weights alone. Others change them as well (PiSSA, LoftQ, ...).
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_config(folder: Path) -> tuple[PeftRules, Json]:
    """The rules, and the whole config.

    Raises:
      CheckpointError: With all that is wrong with it, or asks for what is not done here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(folder, f"no PEFT adapter: {CONFIG} is missing")
    raw = read_json(path)
    problems = _unknown(raw)
    try:
        rules = _rules(raw)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise CheckpointError(path, problems)
    return rules, raw


def _unknown(raw: Json) -> list[str]:
    """What a config says that would change results, and is not used."""
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type {raw.get('peft_type')!r} is not supported: expected 'LORA'")
    if raw.get("bias", "none") != "none":
        problems.append(f"bias {raw['bias']!r} is not supported: trained biases; expected 'none'")
    begun = raw.get("init_lora_weights")
    if begun not in PLAIN_BEGINNINGS:
        problems.append(
            f"init_lora_weights {begun!r} is not supported: it changes the base weights as well; "
            "let PEFT convert the adapter (path_initial_model_for_weight_conversion)"
        )
    return problems + [
        f"{name} {value!r} is not supported: leave it at its default"
        for name, value in raw.items()
        if name not in SILENT | USED | {"bias"} and value not in (None, False, "", [], {}, ())
    ]


def _rules(raw: Json) -> PeftRules:
    rules = PeftRules(
        r=_number(raw, "r", 8, int),
        lora_alpha=_number(raw, "lora_alpha", 8, float),
        target_modules=_names(raw, "target_modules"),
        exclude_modules=_names(raw, "exclude_modules"),
        modules_to_save=_listed(raw, "modules_to_save"),
        layers_to_transform=_layers(raw),
        layers_pattern=_names(raw, "layers_pattern"),
        rank_pattern=_pattern(raw, "rank_pattern", int),
        alpha_pattern=_pattern(raw, "alpha_pattern", float),
        use_rslora=flag(raw, "use_rslora", default=False),
    )
    flag(raw, "use_dora", default=False)
    flag(raw, "ensure_weight_tying", default=False)
    rules.check()
    return rules


def _number(values: Json, key: str, default, kind: type):
    value = values.get(key, default)
    kinds = int if kind is int else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1e9:
        what = "positive whole number" if kind is int else "positive number"
        raise ValueError(f"{key} must be a {what}, got {value!r}")
    return value


def _names(raw: Json, key: str) -> str | list[str] | None:
    value = raw.get(key)
    return value if isinstance(value, str) else _listed(raw, key) or None


def _listed(raw: Json, key: str) -> list[str]:
    value = raw.get(key)
    if value is not None and not (
        isinstance(value, list) and all(isinstance(one, str) for one in value)
    ):
        raise ValueError(f"{key} must be a list of names, got {value!r}")
    return value or []


def _layers(raw: Json) -> list[int] | int | None:
    value = raw.get("layers_to_transform")
    each = value if isinstance(value, list) else [value]
    if value is not None and any(not isinstance(i, int) or isinstance(i, bool) for i in each):
        raise ValueError(f"layers_to_transform must be whole numbers, got {value!r}")
    return value


def _pattern(raw: Json, key: str, kind: type) -> Json:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    named = {f"{key}.{name}": number for name, number in value.items()}
    for name in named:
        _number(named, name, None, kind)
    return value
