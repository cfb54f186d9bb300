"""`gemma-jax list`, `--version`, and the module as a command."""

import json
import subprocess
import sys

import gemma_jax as gj
from gemma_checkpoints.catalog import CATALOG


def test_every_name_is_listed(cli):
    ran = cli("list", "--json")
    assert (ran.code, ran.err) == (0, "")
    models = {row["name"]: row for row in json.loads(ran.out)["models"]}
    assert list(models) == list(CATALOG)
    assert models["gemma3-1b-pt"]["parameters"] == 999_885_952  # of its Hugging Face page
    terms = {name: row["terms"].partition(",")[0] for name, row in models.items()}
    apache = {name for name in models if name.startswith("gemma4-")}
    assert len(apache) == 4
    assert {n for n in terms if terms[n] == "Apache License 2.0"} == apache
    assert all(terms[name] == "Gemma Terms of Use" for name in models.keys() - apache)


def test_what_is_on_this_machine(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "gemma3-270m  " in cli("list").out and " here " not in cli("list").out
    file = tmp_path / "gemma-jax" / "weights" / CATALOG["gemma3-270m"].file
    file.parent.mkdir(parents=True)
    file.touch()
    (here,) = (row for row in json.loads(cli("list", "--json").out)["models"] if row["path"])
    assert (here["name"], here["path"]) == ("gemma3-270m", str(file))


def test_version(cli):
    assert cli("--version").out == f"gemma-jax {gj.__version__}\n"


def test_a_name_that_is_nearly_one(refused):
    assert "Did you mean 'list'?" in refused("lst")


def test_the_module_runs_with_stdout_closed():
    command = f"exec {sys.executable} -m gemma_jax list >&-"
    ran = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_relatives_say_what_is_verified(cli):
    models = {row["name"]: row for row in json.loads(cli("list", "--json").out)["models"]}
    assert models["gemma3-4b-it"]["verified"] is None
    assert "not been seen" in models["functiongemma-270m-it"]["verified"]
    same = "functiongemma-270m-it", "gemma3-270m-it"
    assert models[same[0]]["parameters"] == models[same[1]]["parameters"]
    assert models["medgemma-27b-text-it"]["parameters"] < models["medgemma-27b-it"]["parameters"]
    assert models["vaultgemma-1b"]["parameters"] is None
    out = cli("list").out
    assert "* verified is the architecture" in out and "functiongemma-270m-it*" in out


def test_a_relative_is_described_without_its_files(cli):
    theirs = json.loads(cli("info", "functiongemma-270m-it", "--json").out)
    ours = json.loads(cli("info", "gemma3-270m-it", "--json").out)
    assert theirs["parameters"] == ours["parameters"]
