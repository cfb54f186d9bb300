"""`gemma-jax evaluate`, and the model of lm-eval behind it. The numbers are asked for elsewhere
(evaluation/test_continuations.py, parity/test_scores_270m.py)."""

import json
import sys

import pytest

import gemma_jax as gj
from gemma_jax.cli import evaluate

DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
"""
CHOICES = """
task: colours
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""
TEXTS = """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
WRITTEN = """
task: written
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""
DOCUMENTS = [
    {"question": "The sky is", "choices": ["blue", "green", "red"], "answer": 0},
    {"question": "A leaf is", "choices": ["blue", "green"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of three tasks about two documents, and no way out to the network."""
    pytest.importorskip("lm_eval", reason="evaluate needs lm-eval: pip install 'gemma-jax[eval]'")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = evaluate._manager  # lm-eval's own 13,000 files take long to read
    monkeypatch.setattr(
        evaluate, "_manager", lambda paths, defaults: manager(paths, defaults=False)
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    for name, text in (("colours", CHOICES), ("texts", TEXTS), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text((DATA + text) % {"data": json.dumps(str(data))})
    return folder


def test_figures_are_those_of_the_library(cli, talker, tasks):
    ran = cli("evaluate", "--model", talker, "--include-path", tasks, "--json", "--log-samples",
              "--tasks", "colours,texts,written")  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    model, tok = gj.load(str(talker))
    bits, correct = 0.0, 0
    for sample, document in zip(told["samples"]["colours"], DOCUMENTS, strict=True):
        found = [response[0][0] for response in sample["resps"]]
        for choice, total in zip(document["choices"], found, strict=True):
            ids = tok.encode(f"{document['question']} {choice}", bos=True)
            start = len(tok.encode(document["question"], bos=True))
            expected = gj.score(model, ids)[start - 1 :].sum()
            assert float(total) == pytest.approx(expected, abs=1e-4)
        correct += found.index(max(found)) == document["answer"]
    assert told["results"]["colours"]["acc,none"] == correct / 2
    texts = [document["question"] for document in DOCUMENTS]
    bits = -sum(gj.score(model, tok.encode(text, bos=True)).sum() for text in texts)
    figure = told["results"]["texts"]["bits_per_byte,none"]
    assert figure == pytest.approx(bits / 0.6931472 / sum(map(len, texts)), rel=1e-5)
    written = gj.generate(model, tok, texts, max_new_tokens=5, stop=["\n"])
    for sample, done in zip(told["samples"]["written"], written, strict=True):
        assert sample["resps"] == [[done.text]]
    assert told["n_samples"]["colours"] == {"original": 2, "effective": 2}


def test_a_table_for_people(cli, talker, tasks):
    words = ("evaluate", "--model", talker, "--tasks", tasks / "colours.yaml", "--limit", 1)
    ran = cli(*words)
    assert (ran.code, ran.err) == (0, "")
    assert "|colours|" in ran.out and "acc" in ran.out
    asked = cli(*words, "--chat", "--system", "Be brief.", "--num-fewshot", 0, "--json",
                "--log-samples")  # fmt: skip
    prompt = json.loads(asked.out)["samples"]["colours"][0]["arguments"][0][0]
    assert prompt == (
        "<bos><start_of_turn>user\nBe brief.\n\nThe sky is<end_of_turn>\n<start_of_turn>model\n"
    )


def test_what_is_no_task(refused, talker, tasks):
    words = ("evaluate", "--model", talker, "--include-path", tasks, "--tasks")
    assert "--tasks colour: no such task; did you mean colours" in refused(*words, "colour")
    wrong = tasks / "wrong.yaml"
    wrong.write_text("task: [unclosed")
    assert f"{wrong} is no YAML" in refused(*words, "colours")
    wrong.write_text("- a list")
    assert f"{wrong} is no task" in refused(*words, "colours")
    wrong.write_text((tasks / "colours.yaml").read_text().replace("colours", "w") + "\nodd: 1\n")
    assert "--tasks w: lm-eval cannot make a task of it" in refused(*words, "w")
    wrong.write_text((tasks / "texts.yaml").read_text().replace("documents.jsonl", "none.jsonl"))
    (tasks / "texts.yaml").unlink()
    assert "--tasks texts: lm-eval cannot make a task of it" in refused(*words, "texts")
    assert "names none" in refused(*words, ",")


def test_wrong_requests(refused, talker, tasks):
    words = ("evaluate", "--model", talker, "--include-path", tasks, "--tasks", "written")
    assert "max_gen_toks" in refused(*words, "--window", 5)
    assert "--window" in refused(*words, "--window", 0)
    assert "must lie between 1 and 512" in refused(*words, "--window", 513)
    assert "--system needs --chat" in refused(*words, "--system", "x")
    assert "--log-samples needs --json" in refused(*words, "--log-samples")
    text = (tasks / "written.yaml").read_text().replace("do_sample: false", "num_beams: 3")
    (tasks / "written.yaml").write_text(text)
    assert "generation_kwargs: 'num_beams' is not known" in refused(*words)


def test_lm_eval_finds_the_model_by_its_name(talker, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from gemma_jax.harness import GemmaJax

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    args = {"tasks": ["colours"], "task_manager": manager, "bootstrap_iters": 0}
    by_name = lm_eval.simple_evaluate("gemma-jax", model_args=f"model={talker}", **args)
    loaded = lm_eval.simple_evaluate(GemmaJax(*gj.load(str(talker))), **args)
    assert by_name["results"] == loaded["results"]
    with pytest.raises(ValueError, match="device='cpu'"):
        GemmaJax(str(talker), device="cpu")


def test_without_lm_eval_one_line_says_so(refused, talker, monkeypatch):
    monkeypatch.delitem(sys.modules, "gemma_jax.harness", raising=False)
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused("evaluate", "--model", talker, "--tasks", "arc_easy")
    assert said == 'evaluate needs lm-eval: pip install "gemma-jax[eval]"'
