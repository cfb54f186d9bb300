"""`gemma-jax experiment`: names, and what is wrong with others."""

import json

from gemma_jax.experiments.ablations.names import ABLATIONS


def test_without_a_name_it_says_which_there_are(cli):
    lines = cli("experiment").out.splitlines()
    assert [line.split()[0] for line in lines] == list(ABLATIONS)
    assert json.loads(cli("experiment", "--json").out)["experiments"].keys() == ABLATIONS.keys()


def test_an_unknown_name_gets_the_nearest(refused):
    assert refused("experiment", "local-globl") == (
        "no experiment is named 'local-globl'; did you mean 'local-global'?"
    )
    assert "there are: local-global" in refused("experiment", "x")
