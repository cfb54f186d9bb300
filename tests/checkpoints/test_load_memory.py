"""Loading takes the memory of the model, and little beside it."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_checkpoints import random_model, tiny, write_gguf

import gemma_checkpoints as gc
from gemma_checkpoints.hf.config_out import config_to_hf
from gemma_checkpoints.hf.names import hf_table
from gemma_checkpoints.name_table import expand
from gemma_checkpoints.params import depths, named_slots
from gemma_checkpoints.rearrange import shape as rearranged_shape
from gemma_checkpoints.safetensors_file import write_safetensors
from gemma_jax.decoder.model import abstract_model
from gemma_jax.presets import preset

MEASURE = """
import resource, sys, jax
import gemma_checkpoints as gc
from gemma_checkpoints.load import load_source
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.block_until_ready(jax.numpy.zeros(3) + 1)
tiny, path, dtype, place = sys.argv[1:]
to_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
options = dict(dtype=dtype, placement=(lambda *_: to_device) if place == "device" else None)
if place == "kept":
    options |= dict(keep=lambda param, matrix: matrix, layout="unrolled")
gc.load_weights(tiny, **options)  # imports, threads and programs are not what is measured
before = peak()
model = gc.load_weights(path, **options)
size = sum(x.nbytes for x in jax.tree.leaves(model))
print(size, peak() - before)
"""


def big_config():
    """Small enough for a test, large enough for 150 MB in bfloat16."""
    cfg = preset("gemma3-270m")
    return replace(cfg, vocab_size=40_000, d_model=1_024, layers=cfg.layers[:6])


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory):
    """Written by our own writer, tensor by tensor, so that this process stays small."""
    cfg, folder = big_config(), tmp_path_factory.mktemp("big")
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg)))
    slots, bf16 = named_slots(abstract_model(cfg, layout="scan")), np.dtype("bfloat16")
    header = {}
    for ours, row in expand(hf_table(cfg), depths(cfg)).items():
        shape = slots[ours].shape
        if row.parsed is not None:
            shape = rearranged_shape(row.parsed.left, slots[ours].sizes)
        header["model." + row.theirs] = (shape, bf16)
    arrays = (np.full(shape, 0.5, dtype) for shape, dtype in header.values())
    for _ in write_safetensors(folder / "model.safetensors", header, arrays):
        pass
    return folder


@pytest.mark.parametrize(
    ("dtype", "place"), [("bfloat16", "host"), ("float32", "host"), ("float32", "device")]
)
def test_peak_is_the_model_and_a_little(dtype, place, big_folder, tmp_path):
    small = gc.save_hf(random_model(tiny("gemma3-1b")), tmp_path / "small")
    size, grown = measure(small, big_folder, dtype, place)
    assert size > 140e6 * (2 if dtype == "float32" else 1)
    largest = 40_000 * 1_024 * (4 if dtype == "float32" else 2)
    assert grown < size + largest / 2, f"model {size:,}, peak {grown:,}, largest {largest:,}"


@pytest.fixture(scope="module")
def quantised_files(tmp_path_factory):
    """A small one, and one of 100 MB in Q8_0."""
    gguf = pytest.importorskip("gguf")
    kind, folder = gguf.GGMLQuantizationType.Q8_0, tmp_path_factory.mktemp("quantised")

    def encode(name, array):
        return np.zeros((array.shape[0], array.shape[1] // 32 * 34), np.uint8), kind

    small = write_gguf(folder / "s.gguf", random_model(tiny("gemma3-1b")), "gemma3", encode)
    cfg = big_config()
    cfg = replace(cfg, layers=tuple(replace(spec, d_ff=256) for spec in cfg.layers))
    return small, write_gguf(folder / "b.gguf", random_model(cfg), "gemma3", encode)


def test_quantised_files_too(quantised_files):
    size, grown = measure(*quantised_files, "float32", "host")
    assert grown < size + 40_000 * 1_024 * 2


def test_kept_as_they_are_they_take_the_memory_of_the_file(quantised_files):
    """In all, at the peak, with nothing widened on the way: the largest tensor would show."""
    size, grown = measure(*quantised_files, "float32", "kept")
    stored = quantised_files[1].stat().st_size
    largest = 40_000 * 1_024 // 32 * 34
    assert size < 1.01 * stored
    assert grown < 1.15 * stored + largest / 2, f"file {stored:,}, peak {grown:,}"


@pytest.mark.nightly
def test_the_real_file_too(quantised_files, real_gguf):
    size, grown = measure(quantised_files[0], real_gguf, "float32", "kept")
    stored = real_gguf.stat().st_size
    assert size < 1.15 * stored, f"in memory {size:,}, file {stored:,}"
    assert grown < 1.15 * stored + 178e6, f"file {stored:,}, peak {grown:,}"


def measure(*arguments) -> tuple[int, int]:
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(int, out.stdout.split()))
