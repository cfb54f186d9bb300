"""`gemma-jax bench kernels`."""

import json

import pytest

from gemma_kernels.attention.tpu import tuning


@pytest.mark.nightly
def test_a_row_of_the_table(cli, monkeypatch, tmp_path):
    """One kernel, planned with the table's tiles and with others."""
    pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")
    other = dict(q=256, k=256, piece=128, fetch=1)
    monkeypatch.setitem(tuning.CANDIDATES, ("forward", True), [other])
    table = tmp_path / "table.json"
    choice = ("--chip", "v5e", "--shape", "270M, 1B local", "--kind", "forward")
    ran = cli("bench", "kernels", *choice, "--tune", "--table", table, "--json")
    assert ran.code == 0, ran.err
    (row,) = json.loads(ran.out)["rows"]
    assert 0.3 < row["useful"] < 1 and row["cycles"] > row["copy_cycles"] > 0
    assert [r["blocks"] for r in json.loads(table.read_text())["rows"]] == [row["blocks"]]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--chip", "v9"), "unknown TPU 'v9'; choose from: v5e, v5p, v6e, tpu7x"),
        (("--shape", "5B"), "unknown shape '5B'; choose from: 270M"),
        (("--kind", "sideways"), "unknown kind 'sideways'; choose from: forward, backward"),
        (("--table", "x.json"), "--table is what --tune writes; give both"),
    ],
)
def test_bad_options(refused, options, message):
    assert message in refused("bench", "kernels", *options)
