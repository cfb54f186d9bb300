"""Several processes as one machine: real ones, on the loopback, each with devices of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from marks import nightly

import gemma_checkpoints as gc

DATA = Path(__file__).parent.parent / "parity" / "data"
SOURCE = str(DATA / "g3_text")

# Reads its own part of a folder, and says how many bytes the system handed to it for that.
READ = """
import sys
from gemma_jax import distributed
port, n, i, folder = sys.argv[1:]
distributed.join(f"127.0.0.1:{port}", int(n), int(i))
import jax
import gemma_checkpoints as gc
from gemma_jax.loading import load_model
def read(): return int(open("/proc/self/io").read().split()[1])
jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(3) + 1)())
load_model(sys.argv[4] + "/small", mesh={"tensor": 8})
before = read()
model = load_model(sys.argv[4] + "/large", mesh={"tensor": 8})
shares = {s.data.shape for s in model.embed.table.get_value().addressable_shards}
print("bytes", read() - before, sorted(shares), file=sys.stderr)
"""

# One process dies between two sums over all of them.
DIE = """
import os, signal, sys
from gemma_jax import distributed
port, n, i, _ = sys.argv[1:]
distributed.join(f"127.0.0.1:{port}", int(n), int(i))
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
make = jax.jit(lambda: jnp.ones(8), out_shardings=NamedSharding(mesh, P("x")))
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
assert float(total(make())) == 8
print("met", file=sys.stderr, flush=True)
if i == "1":
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    float(total(make()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(commands: list[list[str]], devices: int) -> list[subprocess.Popen]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([sys.executable, *command], env=env, **pipes) for command in commands]


def finish(running: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, str]]:
    """Return codes, stdout and stderr; none of them outlives the test."""
    end = time.monotonic() + seconds
    try:
        texts = [p.communicate(timeout=max(1, end - time.monotonic())) for p in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(running, texts)]


def together(processes: int, *arguments: str) -> list[tuple[int, str, str]]:
    """One command line in several processes, with eight devices in all."""
    common = ["-m", "gemma_jax.cli", *arguments, "--coordinator", f"127.0.0.1:{free_port()}"]
    common += ["--num-processes", str(processes), "--process-id"]
    return finish(start([[*common, str(i)] for i in range(processes)], 8 // processes), 300)


def scripts(code: str, folder, processes: int = 2) -> list[list[str]]:
    port = str(free_port())
    return [["-c", code, port, str(processes), str(i), str(folder)] for i in range(processes)]


@pytest.mark.parametrize(
    "processes, mesh", [(2, "sequence=2,tensor=4"), *nightly((4, "data=2,tensor=4"))]
)
def test_generate(cli, processes, mesh, tmp_path):
    gc.save_hf(tiny.model(tiny.gemma1()), tmp_path / "model")
    rows = np.random.default_rng(0).integers(3, 96, (2, 9))
    from safetensors.numpy import save_file

    save_file({"input_ids": rows}, tmp_path / "in.safetensors")
    given = ["generate", "--model", str(tmp_path / "model")]
    given += ["--inputs", str(tmp_path / "in.safetensors")]
    given += ["--max-new-tokens", "6", "--json"]
    alone = cli(*given)
    assert alone.code == 0, alone.err
    ran = together(processes, *given, "--mesh", mesh)
    assert [code for code, _, _ in ran] == [0] * processes, ran[-1][2][-2000:]
    many, one = json.loads(ran[0][1]), json.loads(alone.out)
    assert many["token_ids"] == one["token_ids"]
    np.testing.assert_allclose(many["log_probs"], one["log_probs"], atol=2e-5)
    assert [out for _, out, _ in ran[1:]] == [""] * (processes - 1)


@pytest.mark.nightly
def test_save_and_restore(cli, talker, tmp_path):
    saved, mesh = tmp_path / "saved", ("--mesh", "sequence=2,tensor=4")
    ran = together(2, "convert", str(talker), str(saved), "--to", "orbax", *mesh)
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    assert [out for _, out, _ in ran] == [f"{saved}\n", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    same = jax.tree.map(np.array_equal, gc.load_weights(saved), gc.load_weights(talker))
    assert all(jax.tree.leaves(same))

    given = ["generate", "The", "--max-new-tokens", "6", "--json"]
    alone = cli(*given, "--model", talker)
    assert alone.code == 0, alone.err
    ran = together(2, *given, "--model", str(saved), *mesh)
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    assert json.loads(ran[0][1])["text"] == json.loads(alone.out)["text"]

    ran = together(2, "convert", str(talker), str(tmp_path / "hf"), "--to", "hf", *mesh)
    assert [code for code, _, _ in ran] == [2, 2]
    assert all("save it as Orbax, and convert that" in err for _, _, err in ran)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.nightly
def test_an_image_and_int8_weights(cli, seer, picture):
    given = [
        "generate",
        "What?",
        "--model",
        str(seer),
        "--image",
        str(picture("grey.png", level=90)),
    ]
    given += ["--weights", "int8", "--max-new-tokens", "4", "--json"]
    alone = cli(*given)
    assert alone.code == 0, alone.err
    ran = together(2, *given, "--mesh", "sequence=4,tensor=2")
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    many, one = json.loads(ran[0][1]), json.loads(alone.out)
    assert many["token_ids"] == one["token_ids"]
    np.testing.assert_allclose(many["log_probs"], one["log_probs"], atol=2e-5)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system keeps no such account")
def test_each_process_reads_its_own_bytes(tmp_path):
    cfg = tiny.gemma3(layers=2, vocab_size=65_536, d_model=128, num_heads=8, num_kv_heads=8)
    gc.save_hf(tiny.model(tiny.gemma3(layers=2, num_heads=8, num_kv_heads=8)), tmp_path / "small")
    gc.save_hf(tiny.model(cfg), tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    ran = finish(start(scripts(READ, tmp_path), 4), 300)
    assert [code for code, _, _ in ran] == [0, 0], ran[0][2][-2000:]
    lines = [next(x for x in err.splitlines() if x.startswith("bytes")) for _, _, err in ran]
    assert all("[(8192, 128)]" in line for line in lines)
    for line in lines:  # half of everything, and headers, config and norms
        assert 0.5 * size < int(line.split()[1]) < 0.52 * size


@pytest.mark.nightly
def test_a_process_that_dies_ends_the_others():
    began = time.monotonic()
    ran = finish(start(scripts(DIE, "-"), 4), 180)
    assert all("met" in err for _, _, err in ran)
    assert ran[1][0] == -9 and ran[0][0] != 0
    assert time.monotonic() - began < 170
    said = ran[0][2].lower()
    assert "connection" in said or "heartbeat" in said or "disconnected" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--coordinator", "127.0.0.1:1"],
            "--num-processes, --process-id missing: give all of --coor",
        ),
        (
            ["--coordinator=here", "--num-processes=2", "--process-id=0"],
            "--coordinator 'here' must be HOST:PORT",
        ),
        (["--coordinator=a:1", "--num-processes=2", "--process-id=2"], "below --num-processes 2"),
        (["--coordinator=a:1", "--num-processes=two", "--process-id=0"], "expected a number"),
    ],
)
def test_processes_that_cannot_meet(cli, arguments, said):
    ran = cli("score", "--model", SOURCE, "--text-file", "-", *arguments)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1
