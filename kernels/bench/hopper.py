"""Attention on an H100 or H200: our kernels beside cuDNN, tokamax, PyTorch and XLA, in one run.

    python kernels/bench/hopper.py --name h200 --torch-python torch-env/bin/python

Writes `results/attention-NAME.json` and one plot per table. Every implementation is first compared
with float32, then timed: one program holds several calls, each of which needs the result of the one
before, so that the device is never idle between them; reported is the median over `--repeats` such
programs. What cannot run here is in the output with its reason.

    forward   TFLOP/s of visible (query, key) pairs: 4 x width x heads operations each
    backward  the same, 10 operations (five products), without the forward pass
    decode    GB/s of the cache's visible part, and their share of what a plain copy reaches here

`--dry-run` needs no GPU: it runs tiny shapes, our kernels in Pallas' interpreter, and times nothing
of worth. It shows that this script works.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory as well

import jax
import jax.numpy as jnp

from gemma_kernels.attention import AttentionSpec, causal_interval, last_of_block
from gemma_kernels.attention.hopper.attention import attention_hopper
from gemma_kernels.attention.mask import causal_rows, visible
from gemma_kernels.attention.xla import attention_xla
from gemma_kernels.decode_attention.hopper import decode_attention_hopper

RESULTS = Path(__file__).parent / "results"
TORCH_WORKER = Path(__file__).parent / "workers" / "attention_torch.py"
IMAGE = 256  # tokens
WORST = 0.02  # error, as a share of the greatest value, beyond which a result counts as wrong


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; letters as everywhere. `images` of 256 tokens, every 1024, see both ways."""

    name: str
    B: int = 1
    T: int
    S: int
    N: int
    K: int
    H: int
    window: int | None = None
    images: bool = False
    int8: bool = False

    @property
    def spec(self) -> AttentionSpec:
        stated = self.T == self.S and not self.images
        window = self.window if stated else None
        return AttentionSpec(scale=self.H**-0.5, causal=stated, window=window)

    def mask(self) -> tuple[jax.Array, ...]:
        """`lo_BT, hi_BT, kv_pos_BS`."""
        if not self.images:
            return causal_rows(self.B, self.T, self.S, self.window)
        pos = jnp.broadcast_to(jnp.arange(self.T, dtype=jnp.int32), (self.B, self.T))
        image = jnp.where(pos % (4 * IMAGE) < IMAGE, pos // (4 * IMAGE) + 1, 0)
        return *causal_interval(pos, self.window, last_of_block(pos, image)), pos

    def pairs(self) -> int:
        """Visible (query, key) pairs of a head."""
        lo, hi, _ = self.mask()
        return int(jnp.sum(jnp.minimum(hi, self.S) - lo, dtype=jnp.int32))


def forward_cases() -> list[Case]:
    cases = []
    for H, N, K in ((128, 32, 16), (256, 16, 8)):
        for T in (4096, 8192, 16384):
            cases.append(Case(name=f"causal, {H}", B=2, T=T, S=T, N=N, K=K, H=H))
    for H, N, K, window in ((256, 4, 1, 512), (256, 16, 8, 1024), (128, 32, 16, 1024)):
        for T in (8192, 32768):
            case = Case(name=f"window {window}, {H}", T=T, S=T, N=N, K=K, H=H, window=window)
            cases.append(case)
    for window in (None, 1024):
        name = "images, global" if window is None else f"images, window {window}"
        cases.append(Case(name=name, T=8192, S=8192, N=8, K=4, H=256, window=window, images=True))
    return cases


def backward_cases() -> list[Case]:
    keep = [case for case in forward_cases() if case.T in (4096, 8192)]
    return [replace(case, B=1) for case in keep]


def decode_cases() -> list[Case]:
    cases = []
    for B in (1, 8):
        for S in (8192, 32768, 131072):
            for N, K, H in ((8, 4, 256), (32, 16, 128)):
                for int8 in (False, True):
                    name = f"{'int8' if int8 else 'bf16'}, {H}, batch {B}"
                    cases.append(Case(name=name, B=B, T=1, S=S, N=N, K=K, H=H, int8=int8))
        cases.append(Case(name=f"ring, batch {B}", B=B, T=1, S=1024, N=8, K=4, H=256))
    return cases


def tiny(case: Case) -> Case:
    """The same kind of call, small enough for an interpreter."""
    T = min(case.T, 64)
    return replace(case, B=1, T=T, S=64, N=2, K=1, H=64, window=case.window and 40)


class Missing(Exception):
    """An implementation does not serve a case; says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="hopper", help="of the machine, for the files written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--tables", default="forward,decode,backward")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls", type=int, default=8, help="in one program")
    parser.add_argument("--cases", help="only those whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, no GPU needed")
    args = parser.parse_args()
    if not args.dry_run and jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, found {jax.default_backend()}; --dry-run goes without")
    if args.dry_run:
        args.repeats = args.calls = 1
    result = facts(args)
    for table in args.tables.split(","):
        make_cases, implementations = TABLES[table]
        cases = [case for case in make_cases() if (args.cases or "") in case.name]
        if args.dry_run:
            cases = [tiny(case) for case in cases[:1]]
        rows = [measure(case, table, implementations, args) for case in cases]
        if table != "decode":
            add_torch(rows, cases, table, args)
        for row in rows:
            rate(row, table, result["copy_gb_s"])
            show(row)
        result[table] = rows
        write(result, table, args)


def facts(args) -> dict:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "tokamax", "nvidia-cudnn-cu13", "numpy")
    device = jax.devices()[0]
    return {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "dry_run": args.dry_run,
        "versions": {name: installed(name) for name in packages}
        | {"python": platform.python_version(), "driver": driver()},
        "copy_gb_s": copy_bandwidth(args),
    }


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def copy_bandwidth(args) -> float:
    """GB/s read and written by a plain copy of 2 GiB."""
    x = jnp.ones((2**12 if args.dry_run else 2**29,), jnp.float32)
    seconds = time_calls(lambda x: x + 1, x, (), args)
    return 2 * x.nbytes / statistics.median(seconds) / 1e9


def time_calls(step: Callable, start, rest: tuple, args) -> list[float]:
    """Seconds per `step`, each on what the one before gave, and on `rest`; one per program."""

    @jax.jit
    def program(x, *rest):
        for _ in range(args.calls):
            x = jax.lax.optimization_barrier(step(x, *rest))
        return x

    jax.block_until_ready(program(start, *rest))
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(start, *rest))
        seconds.append((time.perf_counter() - begin) / args.calls)
    return seconds


def measure(case: Case, table: str, implementations: dict[str, Callable], args) -> dict:
    """One row: per implementation its error and seconds, or why there are none."""
    operands = make_operands(case, table)
    expected = exact(case, table, operands)
    found = {}
    for name, make in implementations.items():
        try:
            call = make(case, args.dry_run)
            if table == "backward":
                *qkv, start = operands
                # The forward pass is over before the clock starts; what it leaves is an operand.
                rest = (jax.jit(lambda *qkv, call=call: jax.vjp(call, *qkv)[1])(*qkv),)
                outputs, step = jax.jit(lambda pull, x: pull(x))(*rest, start), pull_back
            else:
                start, *rest = operands
                outputs, step = jax.jit(call)(start, *rest), call
            error = worst_error(outputs, expected)
            if not error <= WORST:
                raise Missing(f"wrong result: {error:.1%} off")
            seconds = time_calls(step, start, tuple(rest), args)
            found[name] = {"error": error, "seconds": seconds}
        except Exception as reason:  # a rival's way of refusing is its own
            kind = "" if isinstance(reason, Missing) else f"{type(reason).__name__}: "
            found[name] = {"missing": kind + " ".join(str(reason).split())[:200]}
    return {"case": asdict(case), "implementations": found}


def pull_back(x: jax.Array, pull: Callable) -> jax.Array:
    """The gradient of the queries, once all three are there."""
    dq, _, _ = jax.lax.optimization_barrier(pull(x))
    return dq


def make_operands(case: Case, table: str) -> tuple[jax.Array, ...]:
    """Queries, keys, values; then a gradient, or the scales of an int8 cache."""
    keys = jax.random.split(jax.random.key(0), 4)
    cache = (case.B, case.K, case.S, case.H) if table == "decode" else None
    shape_q, shape_k = (case.B, case.T, case.N, case.H), (case.B, case.S, case.K, case.H)
    q = jax.random.normal(keys[0], shape_q, jnp.bfloat16)
    k, v = (jax.random.normal(key, cache or shape_k, jnp.bfloat16) for key in keys[1:3])
    if table == "backward":
        return q, k, v, jax.random.normal(keys[3], shape_q, jnp.bfloat16)
    if not case.int8:
        return q, k, v
    scales = [jnp.abs(x).max(-1).astype(jnp.float32) / 127 for x in (k, v)]
    k, v = (
        jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8)
        for x, scale in zip((k, v), scales)
    )
    return q, k, v, *scales


def widened(k, v, scales) -> tuple[jax.Array, jax.Array]:
    """Keys and values of an int8 cache in float32; others as they are."""
    if not scales:
        return k, v
    return tuple(x.astype(jnp.float32) * scale[..., None] for x, scale in zip((k, v), scales))


def exact(case: Case, table: str, operands: tuple) -> tuple[jax.Array, ...]:
    """What the first row of `operands` gives in float32."""
    case, operands = replace(case, B=1), [x[:1] for x in operands]
    spec = AttentionSpec(scale=case.spec.scale)

    def attend(q, k, v):
        return attention_xla(q, k, v, *case.mask(), spec)

    @jax.jit
    def run(q, k, v, *more):
        if table == "decode":
            k, v = (jnp.swapaxes(x, 1, 2) for x in widened(k, v, more))
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        if table != "backward":
            return (attend(q, k, v),)
        return jax.vjp(attend, q, k, v)[1](more[0].astype(jnp.float32))

    return run(*operands)


def worst_error(outputs, expected: tuple[jax.Array, ...]) -> float:
    """Greatest error in the first row of any output, as a share of its greatest value."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    errors = (
        jnp.abs(ours[:1].astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        for ours, theirs in zip(outputs, expected, strict=True)
    )
    return max(float(error) for error in errors)


def ours(case: Case, dry_run: bool) -> Callable:
    spec = case.spec
    mask = (None, None, None) if spec.causal else case.mask()
    return lambda q, k, v: attention_hopper(q, k, v, *mask, spec, interpret=dry_run)


def xla(case: Case, dry_run: bool) -> Callable:
    spec = AttentionSpec(scale=case.spec.scale, window=None if case.images else case.window)
    return lambda q, k, v: attention_xla(q, k, v, *case.mask(), spec)


def cudnn(case: Case, dry_run: bool) -> Callable:
    if dry_run:
        raise Missing("needs a GPU")
    options = dict(scale=case.spec.scale, implementation="cudnn")
    if case.images:  # its only way to such a mask is a dense one

        def masked(q, k, v):
            mask = visible(*case.mask())[:, None]
            return jax.nn.dot_product_attention(q, k, v, mask=mask, **options)

        return masked
    if case.window is not None:
        options |= dict(is_causal=True, local_window_size=(case.window - 1, 0))
    else:
        options["is_causal"] = case.T == case.S  # a single query sees the whole cache
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def tokamax(case: Case, dry_run: bool) -> Callable:
    if dry_run:
        raise Missing("needs a GPU")
    import tokamax

    scale = case.spec.scale
    if case.images:
        from tokamax._src.ops.attention.base import Mask
        from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

        lo, hi, _ = case.mask()
        mask = Mask(k_start=lo[:, None], k_end=hi[:, None])
        attend = PallasMosaicGpuFlashAttention()
        return lambda q, k, v: attend(q, k, v, mask=mask, logits_scale=scale)
    options = dict(scale=scale, is_causal=case.T == case.S, implementation="mosaic")
    if case.window is not None:
        options["local_window_size"] = (case.window - 1, 0)
    return lambda q, k, v: tokamax.dot_product_attention(q, k, v, **options)


def our_decode(case: Case, dry_run: bool) -> Callable:
    lo, hi, pos = case.mask()
    options = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=AttentionSpec(scale=case.spec.scale))

    def call(q, k, v, *scales):
        named = dict(zip(("k_scale_BKS", "v_scale_BKS"), scales))
        return decode_attention_hopper(q, k, v, **options, **named, interpret=dry_run)

    return call


def on_cache(make: Callable) -> Callable:
    """An implementation for `[B, S, K, H]` on our caches; their layout is the compiler's choice."""

    def implementation(case: Case, dry_run: bool) -> Callable:
        call = make(case, dry_run)

        def decode(q, k, v, *scales):
            k, v = (jnp.swapaxes(x.astype(q.dtype), 1, 2) for x in widened(k, v, scales))
            return call(q, k, v)

        return decode

    return implementation


ATTENTION = {"ours": ours, "cudnn": cudnn, "tokamax": tokamax, "xla": xla}
TABLES = {
    "forward": (forward_cases, ATTENTION),
    "backward": (backward_cases, ATTENTION),
    "decode": (
        decode_cases,
        {name: on_cache(make) for name, make in ATTENTION.items()} | {"ours": our_decode},
    ),
}


def add_torch(rows: list[dict], cases: list[Case], table: str, args) -> None:
    """PyTorch's SDPA and FlexAttention, in a process of their own."""
    work = {
        "cases": [asdict(case) for case in cases],
        "backward": table == "backward",
        "image": IMAGE,
        "calls": args.calls,
        "repeats": args.repeats,
    }
    command = [args.torch_python, str(TORCH_WORKER)]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        answers = [{name: {"missing": last[:200]} for name in ("sdpa", "flex")}] * len(rows)
    else:
        answers = json.loads(done.stdout)
    for row, answer in zip(rows, answers, strict=True):
        row["implementations"] |= answer


def rate(row: dict, table: str, copy_gb_s: float) -> None:
    """Adds what the seconds mean."""
    case = Case(**row["case"])
    itemsize = 1 if case.int8 else 2
    keys = min(case.S, case.window or case.S)
    size = 2 * case.B * case.K * keys * (case.H * itemsize + 4 * case.int8)
    flops = case.pairs() * case.N * case.H * (10 if table == "backward" else 4)
    for entry in row["implementations"].values():
        if "seconds" not in entry:
            continue
        median = statistics.median(entry["seconds"])
        entry["ms"] = median * 1e3
        if table == "decode":
            entry |= {"gb_s": size / median / 1e9, "of_copy": size / median / 1e9 / copy_gb_s}
        else:
            entry["tflop_s"] = flops / median / 1e12


def unit(table: str) -> str:
    return "gb_s" if table == "decode" else "tflop_s"


def label(case: dict) -> str:
    return f"{case['name']}, {max(case['T'], case['S']):,}"


def show(row: dict) -> None:
    print(label(row["case"]))
    for name, entry in row["implementations"].items():
        rates = [f"{entry[key]:8.1f} {key}" for key in ("gb_s", "tflop_s") if key in entry]
        said = f"{entry['ms']:9.3f} ms {rates[0]}" if rates else "        - " + entry["missing"]
        print(f"    {name:8} {said}")
    sys.stdout.flush()


def write(result: dict, table: str, args) -> None:
    """All that is known so far, and the plot of `table`."""
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"attention-{args.name}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, table, Path(f"{stem}-{table}.png"))


def plot(result: dict, table: str, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result[table]
    names = list(dict.fromkeys(name for row in rows for name in row["implementations"]))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.14 * len(names) * len(rows)))
    for i, name in enumerate(names):
        values = [row["implementations"].get(name, {}).get(unit(table), 0) for row in rows]
        places = [j + (i - len(names) / 2) * 0.8 / len(names) for j in range(len(rows))]
        axes.barh(places, values, 0.8 / len(names), label=name)
    axes.set_yticks(range(len(rows)), [label(row["case"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the cache" if table == "decode" else "TFLOP/s of visible pairs")
    if table == "decode":
        axes.axvline(result["copy_gb_s"], color="black", linewidth=0.8, label="plain copy")
    axes.set_title(f"{table}, {result['device']}" + (" (dry run)" if result["dry_run"] else ""))
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
