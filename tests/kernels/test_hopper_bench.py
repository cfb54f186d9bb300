"""The bench of Hopper kernels, on tiny shapes and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench" / "hopper.py"


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 takes a minute for it"
)
def test_dry_run(tmp_path):
    """Ours and XLA's are right, what needs a GPU says so, and figures and a plot are written."""
    command = [sys.executable, BENCH, "--dry-run", "--tables", "decode", "--output", tmp_path]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    result = json.loads((tmp_path / "attention-hopper.json").read_text())
    assert result["dry_run"] and result["versions"]["jax"] == jax.__version__
    for row in result["decode"]:
        found = row["implementations"]
        assert found["ours"]["error"] < 0.02 and found["xla"]["error"] < 0.02
        assert found["cudnn"]["missing"] == found["tokamax"]["missing"] == "needs a GPU"


def test_without_a_gpu_it_says_so():
    command = [sys.executable, BENCH]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 2 and "needs a GPU, found cpu" in done.stderr
