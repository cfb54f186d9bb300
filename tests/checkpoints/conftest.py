"""Fixtures of this room."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoints import DATA, plain, random_model, tiny, write_gguf


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A writable copy of a tiny text-only Gemma 3."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DATA / "g3_text" / name, folder)
    return folder


@pytest.fixture
def edit_config(hf_folder):
    """`edit_config(key=value)` changes `config.json`; `None` removes the key."""

    def edit(**changes) -> Path:
        path = hf_folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return hf_folder

    return edit


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", random_model(tiny("gemma3-4b")), "gemma3", plain)
