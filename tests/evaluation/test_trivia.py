"""The task of trivia: the same everywhere, and scored with the real 270M."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import gemma_jax as gj
from gemma_jax.evaluation import trivia
from gemma_jax.evaluation.answerer import Answerer

pytest.importorskip("chatterbot_corpus", reason=trivia.MISSING)


def test_the_questions_are_the_same_everywhere():
    found = trivia.documents()
    assert len(found) > 240 and found == trivia.documents()
    assert found[0]["question"] == "Who was the 37th President of the United States?"
    for one in found:
        assert len(set(one["choices"])) == trivia.CHOICES and one["question"]
    assert {one["answer"] for one in found} == set(range(trivia.CHOICES))
    assert found[0]["choices"][found[0]["answer"]] == "Richard Nixon"


@pytest.mark.nightly
def test_figures_of_the_real_model_are_those_of_each_pair_alone(real_gguf, tmp_path):
    """With lm-eval where it is installed, else by the same requests."""
    model, tok = gj.load(real_gguf)
    found = trivia.documents()[:6]
    asked = [
        (f"Question: {one['question']}\nAnswer:", f" {choice}")
        for one in found
        for choice in one["choices"]
    ]
    alone = []
    for context, continuation in asked:
        count = len(tok.encode(context + continuation, bos=True)) - len(
            tok.encode(context, bos=True)
        )
        ids = tok.encode(context + continuation, bos=True)
        alone.append(float(gj.score(model, ids)[-count:].sum(dtype="float64")))
    requests = [SimpleNamespace(args=pair) for pair in asked]
    totals = [total for total, _ in Answerer(model, tok).loglikelihood(requests)]
    assert totals == pytest.approx(alone, abs=1e-4)
    pytest.importorskip("lm_eval", reason="evaluate needs lm-eval: pip install 'gemma-jax[eval]'")
    trivia.write(tmp_path)
    words = ["evaluate", "--model", str(real_gguf), "--include-path", str(tmp_path), "--tasks",
             "trivia", "--limit", "6", "--json", "--log-samples"]  # fmt: skip
    command = [sys.executable, "-m", "gemma_jax", *words]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    said = [float(response[0][0]) for one in told["samples"]["trivia"] for response in one["resps"]]
    assert said == pytest.approx(alone, abs=1e-4)
