"""Bytes in and out: where weights come from, how they become a model, how a model becomes files.

Importing this package imports nothing heavy; names are looked up when they are used.
"""

from importlib import import_module

_HOMES = {
    "CATALOG": "catalog",
    "CheckpointError": "errors",
    "Description": "description",
    "Source": "source",
    "GenerationDefaults": "generation_config",
    "describe": "description",
    "generation_defaults": "generation_config",
    "load_adapter": "hf.adapters",
    "load_weights": "api",
    "load_source": "load",
    "open_source": "formats",
    "resolve": "catalog",
    "save_adapter": "hf.adapters_out",
    "TrainingStates": "orbax.training_state",
    "save_gguf": "gguf.write",
    "save_hf": "export",
    "save_orbax": "orbax.folder",
    "stored_bytes": "description",
    "stated_in_json": "generation_config",
    "tensor_names": "export",
    "tensors_by_name": "export",
    "tokenizer_path": "api",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
