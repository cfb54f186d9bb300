"""`gemma-jax bench`: how fast a model runs on this machine."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from gemma_jax.cli import common
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.model_options import ModelOptions, model_options


@model_options()
def command(
    ctx: typer.Context,
    model: common.Model = "gemma3-270m",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prefill.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the token loop.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; medians count.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Rows of prefill and token loop.")] = 1,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Measure prefill, decoding, time to first token, peak memory and import time."""
    if ctx.invoked_subcommand is not None:
        return
    common.set_up_jax()
    from gemma_jax.benchmarks import speed as benchmark

    _check(model, options, prompt_tokens, new_tokens)
    with common.stderr().status("starting processes") as status:
        # Children come first: once this process holds an accelerator they could not have it.
        outside = benchmark.starts(["--model", model, *options.words()], repeats, tell=_tell)
        outside["import_s"] = benchmark.import_seconds(repeats, tell=_tell)
        status.stop()
        gemma = options.load(model)
        status.update("reading and writing tokens")
        status.start()
        inside = benchmark.steady_state(
            gemma,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            repeats=repeats,
            tell=_tell,
        )
    result = {
        "model": model,
        **asdict(options),
        "dtype": str(gemma.runtime.dtype),
        "weights": options.weights or str(gemma.runtime.dtype),
        "cache_dtype": str(gemma.runtime.kv_dtype),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        **inside,
        **outside,
        "peak_device_bytes": benchmark.peak_device_bytes(),
        "machine": benchmark.machine_facts(),
    }
    if as_json:
        common.print_json(result)
    else:
        _print_table(result)


def _check(model: str, options: ModelOptions, prompt_tokens: int, new_tokens: int) -> None:
    """Refuses before the first measurement what would fail after it, without taking a device."""
    from gemma_checkpoints import describe, resolve
    from gemma_jax.benchmarks import speed as benchmark
    from gemma_jax.loading import load_tokenizer

    options.for_library()  # values that do not go together
    common.find_slice(options.slice, model)
    load_tokenizer(model)  # starts are measured with text
    with flags_for("prompt_tokens", "new_tokens"):
        benchmark.check_lengths(
            describe(resolve(model)).config.max_positions, prompt_tokens, new_tokens
        )


def _tell(line: str) -> None:
    """A measurement, as soon as it is made: on a terminal, and in a pipe as well."""
    print(line, file=sys.stderr, flush=True)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    what = (
        f"{result['model']}, {result['dtype']} arithmetic, {result['weights']} weights, "
        f"{result['cache_dtype']} caches"
    )
    what += "".join(f", {name} {result[name]}" for name in ("slice", "mesh") if result[name])
    where = f"{machine['cpu']}, {machine['cores']} cores, jax {machine['jax']} on "
    table = Table(title=what, caption=where + f"{machine['devices']} x {machine['device']}")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("runs", justify="right")

    def row(name: str, summary: dict, form: str, unit: str, scale: float = 1) -> None:
        runs = " ".join(format(run * scale, form) for run in summary["runs"])
        table.add_row(name, f"{summary['median'] * scale:{form}} {unit}", runs)

    batch = f" x {result['batch']}" if result["batch"] > 1 else ""
    read, write = f"{result['prompt_tokens']:,}{batch}", f"{result['new_tokens']:,}{batch}"
    row(f"prefill, {read} tokens", result["prefill_tokens_per_s"], ",.1f", "tokens/s")
    row(f"decode, {write} tokens", result["decode_tokens_per_s"], ",.1f", "tokens/s")
    for name, cache in (("cold_start", "empty"), ("warm_start", "filled")):
        start = result[name]
        row(f"first token, compile cache {cache}", start["first_token_s"], ".2f", "s")
        row(f"peak memory, compile cache {cache}", start["peak_rss_bytes"], ",.0f", "MB", 1e-6)
    row("import gemma_jax, after jax", result["import_s"], ".3f", "s")
    if size := result["peak_device_bytes"]:
        table.add_row("peak device memory", f"{size / 1e6:,.0f} MB")
    Console().print(table)
