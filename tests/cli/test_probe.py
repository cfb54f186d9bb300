"""`gemma-jax probe`: tables, a heat map, JSON."""

import json

import pytest

MODEL = "checkpoints/elastic"


def test_the_command(cli, tmp_path):
    words = ("probe", "--model", MODEL, "--lengths", "200", "--depths", "0", "--tasks", "needle")
    ran = cli(*words, "--plot", tmp_path / "map.png")
    assert ran.code == 0 and "depth 0" in ran.out and "ring caches, 200 tokens" in ran.out
    assert (tmp_path / "map.png").read_bytes()[1:4] == b"PNG"
    told = json.loads(cli(*words, "--json").out)
    assert len(told["questions"]) == 1 and told["ring_caches"][0]["difference"] < 1e-3


@pytest.mark.parametrize(
    "words, message",
    [
        (("--lengths", "many"), "expected numbers"),
        (("--lengths", "0"), "expected 1 to"),
        (("--depths", "2"), "expected 0 to 1"),
        (("--tasks", "needles"), "expected some of needle"),
        (("--lengths", "100000"), "more than the model's context"),
    ],
)
def test_what_is_refused(refused, words, message):
    assert message in refused("probe", "--model", MODEL, *words)
