"""The reader of `config.json` under the name that it had before `hf/` was a folder."""

from .hf.config import config_from_hf

__all__ = ["config_from_hf"]
