"""Every command that runs a model takes the same options, or says in one line why not."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
import typer
from test_imports import ROOT

import gemma_jax as gj
from gemma_jax import matformer
from gemma_jax.benchmarks import speed
from gemma_jax.cli.app import app
from gemma_jax.cli.model_options import ModelOptions, flag

FIELDS = tuple(ModelOptions.__dataclass_fields__)
NO_MODEL = {
    "encode-image": "reads what any model would",
    "encode-audio": "reads what any model would",
    "list": "reads no model",
    "experiment": "makes its own models",
    "bench kernels": "compiles attention alone",
}
RUNS = ("generate", "chat", "serve", "score", "forward", "shield", "bench")


def all_but(*taken: str, because: str) -> dict[str, str]:
    return {name: because for name in FIELDS if name not in taken}


REFUSED = {
    **{name: {} for name in (*RUNS, "transcribe", "evaluate", "probe")},
    "forward": {"cache_dtype": "forward keeps no cache"},
    "embed": {
        "cache_dtype": "embed keeps no cache",
        "vision_dtype": "embed is about text",
        "mmproj": "embed is about text",
    },
    "convert": all_but("dtype", "mesh", "mmproj", because="convert runs no model"),
    "merge": all_but("dtype", "mmproj", because="merge runs no model")
    | {"adapter": "merge takes the folder behind the source"},
    "quantise": all_but(because="quantise runs no model"),
    "slice": all_but("dtype", because="slice runs no model"),
    "info": all_but("slice", because="info reads no weights"),
    "tokenize": all_but(because="tokenize reads no weights"),
    "train": all_but("adapter", because="train is told by its config, in [load]"),
    "plan": {
        "vision_dtype": "plan is about text",
        "modalities": "plan reads no weights",
        "adapter": "plan reads no weights",
        "mmproj": "plan is about text",
        "activations": "plan counts products of floats",
        "numerics": "plan follows the roundings of transformers",
        "per_layer_table": "plan puts all weights on the devices",
    },
}
# What a command must be told besides, so that the option alone is wrong.
NEEDED = {
    "forward": ("--model", "x", "--inputs", __file__, "--output", "x"),
    "transcribe": (__file__,),
    "embed": ("x", "--model", "x"),
    "convert": ("x", "y", "--to", "hf"),
    "merge": ("x", "y", "z"),
    "quantise": ("x", "y", "--to", "int4"),
    "slice": ("x", "y"),
    "info": ("x",),
    "tokenize": ("x",),
    "train": ("x",),
    "plan": ("x", "--topology", "v5e:4x4", "--context", "16"),
}


def commands(command=None, name: str = "") -> Iterator[tuple[str, object]]:
    """Name -> every command of the application, and of the groups in it."""
    command = command or typer.main.get_command(app)
    if name:
        yield name, command
    for inner, found in getattr(command, "commands", {}).items():
        yield from commands(found, f"{name} {inner}".strip())


@pytest.mark.parametrize("name, command", [(n, c) for n, c in commands() if n not in NO_MODEL])
def test_every_option_is_taken_or_refused(name, command):
    hidden = {flag: param.hidden for param in command.params for flag in param.opts
              if param.param_type_name == "option"}  # fmt: skip
    assert {flag(field) for field in FIELDS} <= hidden.keys()
    assert {field for field in FIELDS if hidden[flag(field)]} == REFUSED[name].keys()


@pytest.mark.parametrize("name", [name for name, reasons in REFUSED.items() if reasons])
def test_a_refusal_is_one_line(refused, name):
    for field, reason in REFUSED[name].items():
        said = refused(name, *NEEDED[name], flag(field), "x")
        assert said == f"{flag(field)}: {reason}; leave it out"


def test_the_page_names_every_option():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {flag(field) for field in FIELDS} <= set(re.findall(r"^\| `(--[\w-]+)", page, re.M))


def test_values_that_do_not_go_together_are_named_as_they_are_typed(call):
    ran = call("score", "--per-layer-table=host", "--mesh=tensor=2")
    assert ran.error.startswith("--per-layer-table 'host' is for one device")


@pytest.mark.parametrize("name", NO_MODEL)
def test_commands_without_a_model_know_no_such_option(refused, name):
    assert "no such option: --weights" in refused(*name.split(), "--weights", "int8")


@pytest.fixture
def half(tmp_path):
    """A file with the slice of `seer`, whose one layer has 48 channels, that keeps 24."""
    matformer.Slice(ffn_widths=(24,)).write(tmp_path / "half.json")
    return tmp_path / "half.json"


@pytest.fixture
def call(cli, seer, picture, stored, tmp_path, monkeypatch):
    """`call(name, *options)` runs a command on `seer`; benchmarks start no other processes."""
    (tmp_path / "text.txt").write_text("Hi")
    monkeypatch.setattr(speed, "starts", lambda words, repeats, tell: {"started": words})
    monkeypatch.setattr(speed, "import_seconds", lambda repeats, tell: {})
    needed = {
        "generate": ("Hi",),
        "chat": ("--temperature", 0, "--max-new-tokens", 4),
        "score": ("--text-file", tmp_path / "text.txt"),
        "forward": ("--inputs", stored(input_ids=[[2, 5, 6]]), "--output", tmp_path / "out"),
        "shield": (picture("grey.png", level=90), "--policy", "violence", "--json"),
        "serve": ("--port", 0),
        "bench": ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--json"),
    }

    def run(name: str, *options, stdin: bytes = b"Hi\n"):
        return cli(name, *needed[name], "--model", seer, *options, stdin=stdin)

    return run


@pytest.fixture
def asked(monkeypatch):
    """Every `LoadOptions` that a command asks for; no model comes of it."""
    asked = []

    def load_model(source, options, *, progress):
        asked.append(options)
        raise ValueError("as far as this goes")

    monkeypatch.setattr("gemma_jax.loading.load_model", load_model)
    return asked


ALL = ("--dtype=bfloat16", "--weights=int8", "--activations=int8", "--vision-dtype=float32",
       "--numerics=gdm", "--attention-impl=xla")  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_what_is_typed_arrives(name, call, asked, half):
    cache = () if name == "forward" else ("--cache-dtype=int8",)
    for more in (("--mesh", "data=2,tensor=4"), ("--per-layer-table=host", "--slice", half)):
        ran = call(name, *ALL, *cache, *more)
        assert ran.error == "as far as this goes"
    wanted = gj.LoadOptions(
        dtype="bfloat16",
        weights="int8",
        activations="int8",
        vision_dtype="float32",
        cache_dtype="int8" if cache else None,
        numerics="gdm",
        attention_impl="xla",
    )
    assert asked == [
        replace(wanted, mesh={"data": 2, "tensor": 4}),
        replace(wanted, per_layer_table="host", layout="unrolled"),
    ]


def test_modalities_are_names(call, asked):
    call("score", "--modalities", "text, audio")
    assert asked == [gj.LoadOptions(modalities=("text", "audio"))]


def test_modalities_that_a_model_does_not_have_are_refused_in_one_line(call):
    said = call("score", "--modalities", "text,audio").error
    assert "this model reads text and image: it has no audio tower; leave 'audio' out of" in said
    assert "unknown modality smell" in call("score", "--modalities", "text,smell").error


@pytest.mark.parametrize("name", RUNS)
def test_defaults_are_those_of_the_library(name, call, asked):
    call(name)
    writes, own = {"weights": "auto"}, {"forward": {"dtype": "float32"}}
    own |= {"generate": writes, "chat": writes, "serve": writes}
    assert asked == [gj.LoadOptions(**own.get(name, {}))]


def test_chat_as_in_python(call, seer):
    options = {"dtype": "bfloat16", "numerics": "gdm", "attention_impl": "reference"}
    words = [f"{flag(name)}={value}" for name, value in options.items()]
    ran = call("chat", *words)
    assert (ran.code, ran.err) == (0, "")
    conversation = gj.Conversation(*gj.load(seer, **options), sampling=gj.Sampling())
    assert ran.out.rstrip("\n") == "".join(conversation.stream("Hi", max_new_tokens=4)).rstrip("\n")


def test_shield_sees_in_a_dtype_of_its_own_and_judges_with_a_slice(call, seer, half, tmp_path):
    ran = call("shield", "--slice", half, "--vision-dtype", "bfloat16", "--cache-dtype", "int8")
    assert (ran.code, ran.err) == (0, "")
    model, tok = gj.load(seer, layout="unrolled", vision_dtype="bfloat16", cache_dtype="int8")
    view = matformer.at(model, matformer.Slice.read(half))
    verdicts = gj.shield(view, tok, tmp_path / "grey.png", ["violence"])
    assert json.loads(ran.out) == {name: asdict(verdict) for name, verdict in verdicts.items()}


def test_bench_measures_a_slice_on_a_mesh(call, half):
    mesh = "sequence=4,tensor=2"
    options = ("--cache-dtype", "int8", "--numerics", "gdm", "--slice", str(half), "--mesh", mesh)
    ran = call("bench", *options)
    assert ran.code == 0 and "run 1 of 1: prefill " in ran.err
    result = json.loads(ran.out)
    assert result["started"][2:] == list(options)
    assert (result["slice"], result["mesh"]) == (str(half), mesh)
    assert result["numerics"] == "gdm"
    assert (result["dtype"], result["cache_dtype"]) == ("float32", "int8")
    assert result["decode_tokens_per_s"]["median"] > 0


def test_generate_sees_in_a_dtype_of_its_own(call, picture):
    words = ("--image", picture("seen.png", level=30), "--max-new-tokens", 1, "--json")
    runs = [call("generate", *words, "--vision-dtype", d).out for d in ("float32", "bfloat16")]
    wide, narrow = (json.loads(out)["log_probs"] for out in runs)
    np.testing.assert_allclose(narrow, wide, rtol=0.05)
    assert narrow != wide
