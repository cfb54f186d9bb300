"""`gemma-jax bench` on a tiny model. What it measures is checked, how fast it is never."""

import json

import pytest
import tiny

from gemma_checkpoints import save_hf
from gemma_jax.benchmarks import speed as benchmark
from gemma_jax.cli.app import run
from gemma_jax.text.train_vocabulary import train_vocabulary

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")
STARTS = ("cold_start", "warm_start")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("bench") / "hf"
    lines, symbols = ["The capital of France is Paris."] * 3, ["<start_of_turn>", "<end_of_turn>"]
    vocabulary = train_vocabulary(lines, 300, symbols, hard_vocab_limit=False)
    save_hf(tiny.model(tiny.gemma3(layers=3, vocab_size=300)), path)
    (path / "tokenizer.model").write_bytes(vocabulary)
    return path


def bench(folder, capsys, *options: str) -> str:
    words = "--prompt-tokens 40 --new-tokens 8 --weights int8 --batch 2".split()
    assert run(["bench", "--model", str(folder), *words, *options]) == 0
    return capsys.readouterr().out


@pytest.mark.nightly
def test_json_holds_every_figure(folder, capsys):
    result = json.loads(bench(folder, capsys, "--repeats", "1", "--json"))
    figures = [result[name] for name in (*SPEEDS, "import_s")]
    figures += [figure for name in STARTS for figure in result[name].values()]
    for figure in figures:
        assert figure["runs"] == [figure["median"]]
        assert figure["median"] > 0
    assert result["cold_start"]["peak_rss_bytes"]["median"] > 50e6
    assert (result["dtype"], result["weights"], result["batch"]) == ("float32", "int8", 2)
    assert {"cpu", "cores", "jax", "platform", "device"} <= result["machine"].keys()


def test_medians_come_with_all_runs():
    assert benchmark.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "runs": [3.0, 1.0, 2.0]}


def test_table_names_every_figure(folder, capsys, monkeypatch):
    figure = {"median": 1.5, "runs": [1.5]}
    start = {"first_token_s": figure, "peak_rss_bytes": figure}
    monkeypatch.setattr(benchmark, "starts", lambda *_, tell: dict.fromkeys(STARTS, start))
    run(["bench", "--model", str(folder), "--prompt-tokens", "8", "--new-tokens", "4"])
    table, told = capsys.readouterr()
    assert told.count("\n") == 7  # compilation, three speeds, three imports
    for word in ("prefill", "decode", "first token", "peak memory", "import", "tokens/s"):
        assert word in table


def test_decoding_takes_as_many_steps_as_asked():
    model = tiny.model(tiny.gemma3(layers=2))
    seconds, tokens = benchmark.decode(model, benchmark.random_rows(model, 3, 5), 4)
    assert seconds > 0
    assert [len(row) for row in tokens] == [5] * 3  # the first is chosen before the clock starts


def test_failing_start_says_why(tmp_path):
    with pytest.raises(ValueError, match="generate failed with code 2"):
        benchmark.starts(["--model", str(tmp_path)], repeats=1)


@pytest.mark.parametrize("option", ["--prompt-tokens", "--new-tokens", "--repeats", "--batch"])
def test_sizes_must_be_positive(folder, option, capsys):
    assert run(["bench", "--model", str(folder), option, "0"]) == 2
    assert option in capsys.readouterr().err


@pytest.fixture
def nothing_starts(monkeypatch):
    """No process starts and no model is loaded: arguments are wrong before."""
    monkeypatch.setattr(benchmark, "starts", None)
    monkeypatch.setattr("gemma_jax.loading.load_model", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--prompt-tokens 5000",
            "--prompt-tokens 5000 and a token after it take 5,001 places; the model's context has",
        ),
        (
            "--prompt-tokens 8 --new-tokens 5000",
            "--new-tokens 5000 after a prompt of 8 take 5,009 places; the model's context has",
        ),
        ("--slice e2b", "slice 'e2b' is made for the 35 layers of E4B"),
        ("--attention-impl fast", "--attention-impl 'fast': choose one of: auto, "),
        ("--mesh tensor", "--mesh 'tensor': expected AXIS=N,..."),
        ("--mesh tensor=2 --per-layer-table host", "--per-layer-table 'host' is for one device"),
    ],
)
def test_arguments_are_checked_before_the_first_measurement(
    folder, refused, nothing_starts, options, message
):
    assert refused("bench", "--model", folder, *options.split()).startswith(message)


def test_a_line_comes_with_every_start(monkeypatch):
    seconds = iter([3.0, 2.0, 1.0, 0.5])
    monkeypatch.setattr(benchmark, "_start", lambda *_: (next(seconds), 1))
    lines = []
    benchmark.starts([], repeats=2, tell=lines.append)
    assert lines == [
        "run 1 of 2: first token, compile cache empty: 3.00 s",
        "run 1 of 2: first token, compile cache filled: 2.00 s",
        "run 2 of 2: first token, compile cache empty: 1.00 s",
        "run 2 of 2: first token, compile cache filled: 0.50 s",
    ]


def test_a_line_comes_with_every_speed():
    model = tiny.model(tiny.gemma3(layers=1))
    lines = []
    sizes = {"prompt_tokens": 8, "new_tokens": 4, "batch": 1, "repeats": 1}
    benchmark.steady_state(model, **sizes, tell=lines.append)
    assert [line.partition(":")[0] for line in lines] == [
        "compiled prefill and decoding",
        "run 1 of 1",
    ]
