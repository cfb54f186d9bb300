"""MaskBench on files of our own, and what the stored result says."""

import json
from pathlib import Path

import pytest

from gemma_jax.benchmarks import masks
from gemma_jax.loading import load_tokenizer

RESULT = Path(masks.__file__).parent / "results" / "maskbench-2-cores.json"

CASES = {
    "numbers": ({"type": "integer", "minimum": 3}, [(3, True), (2, False), ("3", False)]),
    "objects": (
        {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
        [({"a": True}, True), ({"a": 1}, False), ({}, False), ({"a": False, "ü": [1, {}]}, True)],
    ),
    "refused": ({"not": {}}, [(1, True)]),
    "untested": ({"type": "string"}, []),
}


@pytest.fixture
def folder(tmp_path):
    for name, (schema, tests) in CASES.items():
        told = [{"data": data, "valid": valid} for data, valid in tests]
        (tmp_path / f"{name}.json").write_text(json.dumps({"schema": schema, "tests": told}))
    return tmp_path


def test_all_instances_are_told_apart_by_both_engines(folder):
    tokenizer = load_tokenizer("checkpoints/digits")
    for _, start, _ in masks.engines(tokenizer):
        files = masks.sample(folder, 10, 0)
        told = masks.measure(start, files, tokenizer.encode).told()
        assert (told["schemas"], told["refused"]) == (4, 1)
        assert (told["valid"], told["valid_accepted"]) == (3, 3)
        assert (told["invalid"], told["invalid_refused"]) == (4, 4)
        assert told["wrong"] == [] and told["compile_ms"]["count"] == 3


def test_what_is_wrong_is_counted(folder):
    wrong = {"schema": {"type": "string"}, "tests": [{"data": 1, "valid": True}]}
    (folder / "untested.json").write_text(json.dumps(wrong))
    tokenizer = load_tokenizer("checkpoints/digits")
    _, start, _ = next(masks.engines(tokenizer))
    told = masks.measure(start, masks.sample(folder, 10, 0), tokenizer.encode).told()
    assert told["wrong"] == ["untested.json:0"]


def test_samples_stand(folder):
    assert masks.sample(folder, 2, 0) == masks.sample(folder, 2, 0)
    with pytest.raises(ValueError, match="expected MaskBench's data"):
        masks.sample(folder / "none", 2, 0)


def test_the_stored_result_shows_no_loss():
    result = json.loads(RESULT.read_text("utf-8"))
    ours, alone = result["engines"]["gemma-jax"], result["engines"]["llguidance"]
    assert result["files"]["sample"] == ours["schemas"] == alone["schemas"] == 800
    for count in ("refused", "valid", "valid_accepted", "invalid", "invalid_refused"):
        assert ours[count] == alone[count]
    assert ours["wrong"] == [] and ours["refused"] < 150
    assert ours["mask_us"]["p50"] < 2 * alone["mask_us"]["p50"]
