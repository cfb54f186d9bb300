"""Stored ablations are of this code, and their short forms are what it makes."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from gemma_jax.experiments.ablations import results
from gemma_jax.experiments.ablations.ablation import Recipe
from gemma_jax.experiments.ablations.facts import (
    FIRST_FACT,
    FIRST_QUESTION,
    FIRST_VALUE,
    VALUES,
    Facts,
)
from gemma_jax.experiments.ablations.names import ABLATIONS
from gemma_jax.experiments.ablations.recall import (
    FAR,
    FIRST_SYMBOL,
    FIRST_WORD,
    NEAR,
    TEXT,
    Recall,
)  # fmt: skip
from gemma_jax.experiments.ablations.run import run_ablation

RUN_LONG = True  # programs of this module: see compile_effort


def assert_same(made, stored, rel):
    assert made.keys() == stored.keys()
    for name, row in stored.items():
        assert made[name]["parameters"] == row["parameters"]
        assert made[name]["cached"] == row["cached"]
        for metric, values in row["metrics"].items():
            assert made[name]["metrics"][metric] == pytest.approx(values, rel=rel), (name, metric)


@pytest.mark.parametrize("name", ABLATIONS)
def test_stored_results_are_of_this_code(name):
    stored = results.stored(name)
    assert stored["digest"] == ABLATIONS[name].digest()
    assert stored["command"] == f"gemma-jax experiment {name} --out OUT"
    assert stored["rows"].keys() == ABLATIONS[name].variants.keys()
    assert len(stored["seeds"]) >= 3
    for row in stored["rows"].values():
        assert all(len(values) == len(stored["seeds"]) for values in row["metrics"].values())


@pytest.mark.nightly
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_short_form_is_what_is_stored(name):
    """Three steps: other processors round differently, which has no time to grow."""
    short = ABLATIONS[name].short()
    assert_same(run_ablation(short, (0,)), results.stored(name)["short"], rel=1e-3)


def test_another_config_is_another_digest():
    ablation = ABLATIONS["local-global"]
    name, cfg = next(iter(ablation.variants.items()))
    changed = {**ablation.variants, name: replace(cfg, norm_eps=1e-5)}
    assert replace(ablation, variants=changed).digest() != ablation.digest()
    assert replace(ablation, recipe=replace(ablation.recipe, steps=7)).digest() != ablation.digest()


def test_another_default_is_another_digest():
    @dataclass(frozen=True)
    class Faster(Recipe):
        rate: float = 1e-2

    ablation = ABLATIONS["local-global"]
    assert ablation.recipe == Recipe()
    assert replace(ablation, recipe=Faster()).digest() != ablation.digest()


def test_passages_come_twice_as_far_apart_as_said():
    task = Recall()
    tokens_BT, kinds_BT = task.draw(np.random.default_rng(3), 20)
    for tokens, kinds in zip(tokens_BT, kinds_BT):
        for kind, (least, most) in ((NEAR, task.near), (FAR, task.far)):
            (places,) = np.nonzero(kinds == kind)
            assert len(places) == task.passage and (np.diff(places) == 1).all()
            copy = tokens[places[0] - 1 : places[-1] + 1].tolist()  # with its mark
            found = [
                d for d in range(1, places[0]) if places[0] - 1 >= d
                and tokens[places[0] - 1 - d : places[-1] + 1 - d].tolist() == copy
            ]  # fmt: skip
            assert [d for d in found if least <= d <= most] == found and len(found) == 1
            assert min(copy[1:]) >= FIRST_SYMBOL
        words = tokens[kinds == TEXT]
        assert ((words >= FIRST_WORD) & (words < FIRST_SYMBOL)).all()


def test_facts_are_asked_for_as_far_on_as_said():
    task = Facts()
    tokens_BT, kinds_BT = task.draw(np.random.default_rng(3), 20)
    for tokens, kinds in zip(tokens_BT, kinds_BT):
        for kind, (least, most) in ((NEAR, task.near), (FAR, task.far)):
            (places,) = np.nonzero(kinds == kind)
            assert len(places) == 4
            for place in places:
                key = tokens[place - 1] - FIRST_QUESTION
                (facts,) = np.nonzero(
                    (tokens >= FIRST_FACT) & ((tokens - FIRST_FACT) // VALUES == key)
                )
                assert len(facts) == 1 and least <= place - 1 - facts[0] <= most
                assert tokens[place] - FIRST_VALUE == (tokens[facts[0]] - FIRST_FACT) % VALUES
        words = tokens[kinds == TEXT]
        assert ((words >= FIRST_WORD) & (words < FIRST_QUESTION)).all()


def test_rows_have_room_for_facts():
    tokens_BT, _ = Facts(length=48).draw(np.random.default_rng(0), 50)
    assert tokens_BT.shape == (50, 48)
    with pytest.raises(ValueError, match="length=47 must be at least 48"):
        Facts(length=47)


def test_rows_are_drawn_the_same_again():
    one, two = (Recall().draw(np.random.default_rng(5), 4) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, two))


def test_what_is_written_is_read_again(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'gemma-jax[train]'")
    found = results.stored("local-global")
    paths = results.write(found, tmp_path, "local-global")
    assert [path.name for path in paths] == ["local-global.json", "local-global.png"]
    assert json.loads(paths[0].read_text("utf-8")) == found
    assert len(results.table(found)) == len(found["rows"])
