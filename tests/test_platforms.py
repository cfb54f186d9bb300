"""libtpu, which `gemma-jax[plan]` brings as a compiler, is no reason to look for a TPU."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
from test_imports import ROOT

from gemma_jax.platforms import tpu_may_be_here

PLUGINS = importlib.metadata.entry_points(group="jax_plugins")
needs_libtpu_alone = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    or bool(PLUGINS)
    or tpu_may_be_here({k: v for k, v in os.environ.items() if k != "TPU_WORKER_HOSTNAMES"}),
    reason="needs gemma-jax[plan] and no accelerator: with one the settings stay as they are",
)


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A new process in which nobody has chosen a platform, other than by `environment`."""
    unset = ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", f"import jax\n{code}"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment
    )


@needs_libtpu_alone
def test_without_a_tpu_its_driver_is_not_loaded():
    code = """
from gemma_jax.decoder import model
print(jax.default_backend(), jax.numpy.ones(3).sum())
print("libtpu.so" in open("/proc/self/maps").read())
"""
    ran = fresh(code)
    assert (ran.stdout.split(), ran.stderr) == (["cpu", "3.0", "False"], "")


SETTING = "from gemma_jax import runtime; print(jax.config.jax_platforms)"


@needs_libtpu_alone
@pytest.mark.parametrize(
    ("chosen", "setting"),
    [
        ({}, "cpu"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu"),
        ({"JAX_PLATFORMS": ""}, ""),  # JAX's own choice, by hand
        ({"TPU_WORKER_ID": "0"}, "None"),
        ({"PJRT_NAMES_AND_LIBRARY_PATHS": "mine:mine.so"}, "None"),
    ],
)
def test_what_somebody_chose_stays(chosen, setting):
    assert fresh(SETTING, **chosen).stdout.strip() == setting


@needs_libtpu_alone
def test_beside_a_plugin_for_another_accelerator_the_settings_stay(tmp_path):
    (tmp_path / "jax_plugins" / "xla_gpu").mkdir(parents=True)
    ran = fresh(SETTING, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert ran.stdout.strip() == "None"


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0"])
def test_a_tpu_is_known_by_its_device(tmp_path, device):
    assert not tpu_may_be_here({}, tmp_path)
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # the container of all devices, which says nothing
    assert not tpu_may_be_here({}, tmp_path)
    (tmp_path / device).touch()
    assert tpu_may_be_here({}, tmp_path)


def test_a_tpu_is_known_by_its_environment(tmp_path):
    by_jax = {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "libtpu.so", "HOME": "/"}
    assert not tpu_may_be_here(by_jax, tmp_path)
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT"):
        assert tpu_may_be_here(by_jax | {name: "x"}, tmp_path)
