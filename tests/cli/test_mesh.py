"""`--mesh`: the commands that run a model do so on eight devices as on one."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

DATA = Path(__file__).parent.parent / "parity" / "data"
SOURCE = str(DATA / "g3_text")
MESH = ("--mesh", "data=2,tensor=4")


def test_forward(cli, tmp_path):
    batch = str(DATA / "g3_text" / "batch_right_pad.safetensors")
    ran = cli("forward", "--model", SOURCE, "--inputs", batch, "--output", tmp_path / "out", *MESH)
    assert ran.code == 0, ran.err
    stored = load_file(batch)
    real = stored["in.attention_mask"] > 0
    logits = load_file(tmp_path / "out")["logits"]
    np.testing.assert_allclose(logits[real], stored["out.logits"][real], atol=5e-5)


def test_score(cli, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([2, *range(5, 60)]))
    given = ("score", "--model", SOURCE, "--token-ids", ids, "--json")
    one, many = cli(*given), cli(*given, "--mesh", "sequence=2,tensor=4")
    assert many.code == 0, many.err
    one, many = (json.loads(ran.out)["log_probs"] for ran in (one, many))
    np.testing.assert_allclose(many, one, atol=2e-5)


@pytest.mark.parametrize(
    "mesh, said",
    [
        ("tensor=8", "N=4 cannot be split over mesh axis"),
        (
            "tensor=4",
            "mesh tensor=4 is for 4 devices, but there are 8; give sizes",
        ),
        ("data=3,tensor=-1", "is for a multiple of 3 devices, but there are 8"),
        ("wide=8", "unknown mesh axes ['wide']; choose from data, fsdp, sequence, tensor, group"),
        ("fsdp=8", "no rule uses mesh axis 'fsdp'"),
    ],
)
def test_a_mesh_that_does_not_fit(cli, tmp_path, mesh, said):
    ids = tmp_path / "ids.json"
    ids.write_text("[2, 5, 6]")
    ran = cli("score", "--model", SOURCE, "--token-ids", ids, "--mesh", mesh)
    assert ran.code == 2 and said in ran.err
