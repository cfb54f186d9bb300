"""`gemma-jax plan`: does it fit, and how fast could it be, on a machine that need not be there."""

import os
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gemma_jax.cli import common, plan_memory, plan_training
from gemma_jax.cli.errors import NO_ROOM, NoRoomError, flags_for
from gemma_jax.cli.model_options import (
    AttentionOption,
    CacheDTypeOption,
    DType,
    MadeStorage,
    SliceOption,
    refuse_options,
)

if TYPE_CHECKING:
    from gemma_jax.planning import Plan, Topology


class Mode(StrEnum):
    decode = "decode"
    prefill = "prefill"
    train = "train"


class Fit(StrEnum):
    context = "context"
    batch = "batch"


@refuse_options(
    {
        "vision_dtype": "plan is about text",
        "modalities": "plan reads no weights",
        "adapter": "plan reads no weights",
        "mmproj": "plan is about text",
        "activations": "plan counts products of floats",
        "numerics": "plan follows the roundings of transformers",
        "per_layer_table": "plan puts all weights on the devices",
    }
)
def command(
    source: Annotated[str, common.architecture("MODEL")],
    topology: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A TPU slice (v5e:4x4) or GPUs (gpu:h100x8)."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens in the caches; when training, in a row.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="In place of both: bytes for weights and caches (8GB, 500MB); says for every "
            "storage of weights how many tokens fit.",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows; default: 1.")] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Of activations and, unless they are given, of weights; default: bfloat16."
        ),
    ] = None,
    cache_dtype: CacheDTypeOption = None,
    weights: Annotated[
        MadeStorage | None,
        typer.Option("--weights", "--quant", help="What the weights are stored as."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="A token for every row, a chunk of prompt, or a training step.")
    ] = Mode.decode,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.toml",
            help="With --mode train: what `gemma-jax train` would run. Reads no data, no weights.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="In the place of what the config says; repeatable."
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="AXIS=N,...", help="Devices along data, fsdp, sequence, tensor."),
    ] = None,
    memory_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of a GPU's memory for JAX, as XLA_CLIENT_MEM_FRACTION. Default: 0.75.",
        ),
    ] = None,
    slice_name: SliceOption = None,
    attention_impl: AttentionOption = "auto",
    search: Annotated[
        bool, typer.Option("--search", help="Try the meshes of the topology and rank them.")
    ] = False,
    fit: Annotated[
        Fit | None, typer.Option(help="Find the longest context, or the largest batch, that fits.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Plan memory, traffic and time of a model on TPUs or GPUs, without having them.

    For TPUs the real program is compiled by the TPU's own compiler, which takes seconds to minutes
    and needs the extra gemma-jax[plan]; for H100 and H200 by JAX's CUDA plugin, if it is installed.
    For other GPUs the answer is what shapes alone say.

    Ends with exit code 3 if the model does not fit.
    """
    # The compiler for a TPU must find none, and this process needs no accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    common.set_up_jax()
    if memory is not None:
        if topology or context or search or fit:
            raise ValueError(
                "--memory says what fits in so many bytes of any machine; give no --topology, "
                "--context, --search or --fit with it"
            )
        return plan_memory.show(source, slice_name, plan_memory.parse_bytes(memory), as_json)
    if topology is None or (context is None and config is None):
        raise ValueError("give --topology and --context, or --memory")
    from gemma_jax import planning

    axes = None if mesh is None else common.parse_mesh(mesh)
    with flags_for("memory_fraction"):
        where = planning.find_topology(topology, memory_fraction)
    cfg, _ = common.find_config(source)
    if slice_name is not None:
        cfg = common.submodel_config(slice_name, cfg)
    if config is None:
        if set_:
            raise ValueError("--set changes what a --config says; give one")
        training = planning.Training()
        work = planning.Work(
            mode=mode.value,
            batch=1 if batch is None else batch,
            context=context or 0,
            dtype=(dtype or DType.bfloat16).value,
            weights=weights and weights.value,
            cache_dtype=cache_dtype and cache_dtype.value,
            attention_impl=attention_impl,
        )
    else:
        given = {"--context": context, "--batch": batch, "--dtype": dtype, "--weights": weights}
        given |= {"--cache-dtype": cache_dtype, "--slice": slice_name}
        given["--attention-impl"] = None if attention_impl == "auto" else attention_impl
        plan_training.refuse_beside_config(mode.value, given)
        run = plan_training.Run.read(config, set_ or [], source, cfg)
        cfg, work, training, axes = run.cfg, run.work, run.training, axes or run.axes
    if search and (fit or axes):
        raise ValueError("--search tries all meshes for one task; give no --mesh or --fit with it")
    if search:
        with flags_for("batch", "context"):
            plans = _ranked(planning.search(source, cfg, where, work, training=training))
        if not plans:
            raise NoRoomError(
                f"no mesh of {topology} holds weights and caches of {source} at batch {work.batch} "
                f"and {work.context:,} tokens; take a larger slice, or --weights int8 and "
                "--cache-dtype int8"
            )
        common.print_json({"plans": [p.as_dict() for p in plans]}) if as_json else _rank(plans)
        _end(any(plan.fits for plan in plans))
    with flags_for("batch", "context"):
        plan = (
            planning.make_plan(source, cfg, where, work, axes, training=training)
            if fit is None
            else planning.fit(source, cfg, where, work, fit.value, axes, training=training)
        )
    if fit is not None and plan is None:
        raise NoRoomError(
            f"{source} does not fit {topology} with any {fit.value}; take a larger slice, another "
            "mesh, or --weights int8 and --cache-dtype int8"
        )
    common.print_json(plan.as_dict()) if as_json else _print(plan, where)
    _end(plan.fits)


def _end(fits: bool) -> NoReturn:
    raise typer.Exit(0 if fits else NO_ROOM)


def _ranked(plans: "Iterable[Plan]") -> "list[Plan]":
    """The fastest first, those that do not fit last; says of each as it is made."""
    made = []
    for plan in plans:
        common.stderr().print(f"{_axes(plan)}: {_verdict(plan)}", highlight=False)
        made.append(plan)
    return sorted(made, key=lambda plan: (not plan.fits, -plan.tokens_per_second))


def _axes(plan: "Plan") -> str:
    return " x ".join(f"{name}={n}" for name, n in plan.mesh.items())


def _verdict(plan: "Plan") -> str:
    if plan.refusal:
        return f"does not fit: {plan.refusal}"
    usable = " usable" if plan.usable_bytes < plan.memory_bytes else ""
    share = f"{_gigabytes(plan.peak_bytes)} of {_gigabytes(plan.usable_bytes)}{usable}"
    return f"{'fits' if plan.fits else 'does not fit'}, {share} per device"


def _memory(plan: "Plan", where: "Topology") -> str:
    if not where.is_gpu:
        return _gigabytes(plan.memory_bytes)
    return (
        f"{_gigabytes(plan.memory_bytes)} by CUDA; JAX takes {where.memory_fraction:.0%} "
        "(--memory-fraction)"
    )


def _print(plan: "Plan", where: "Topology") -> None:
    from rich.console import Console
    from rich.table import Table

    work = plan.work
    title = f"{plan.model} on {plan.topology}: {work.mode}, {work.batch} x {work.context:,} tokens"
    training = work.mode == "train"
    if (times := plan.training.get("micro_batches", 1)) > 1:
        title += f", {times} times"
    table = Table(title=title, show_header=False)
    rows = {
        "verdict": _verdict(plan),
        "devices": f"{plan.devices}, mesh {_axes(plan)}",
        "memory per device": _memory(plan, where),
        "weights per device": _gigabytes(plan.weights_bytes),
    }
    if training:
        rows["of these trained"] = _gigabytes(plan.trained_bytes)
    rows["state of the optimizer per device" if training else "caches per device"] = _gigabytes(
        plan.cache_bytes
    )
    if (compiled := plan.compiled) is not None:
        rows["temporaries per device"] = _gigabytes(compiled.temporary_bytes)
        rows["between devices, per step"] = "; ".join(
            f"{x['count']} {kind}, {x['bytes'] / 1e6:,.2f} MB"
            for kind, x in compiled.collectives.items()
        ) or "nothing"  # fmt: skip
        rows["weights moved in a step"] = "; ".join(
            f"{m.times} x {m.operation} {m.dtype}{list(m.shape)}{' once per call' * m.before}"
            for m in compiled.moved_weights
        ) or "none"  # fmt: skip
        if compiled.seconds is not None:
            rows["the compiler's estimate"] = (
                f"{compiled.seconds * 1e3:,.3f} ms, loops counted once"
            )
        rows["traced, lowered"] = f"{compiled.lower_seconds:.1f} s"
        rows["compiled"] = f"{compiled.compile_seconds:.1f} s"
        rows["the program does"] = (
            f"{compiled.operations / 1e9:,.1f} billion operations a step, moves "
            f"{_gigabytes(compiled.moved_bytes)} per device: {_bounds(plan)}"
        )
    rows["bound by"] = _bound(plan)
    rows["roofline"] = (
        f"{plan.roofline_seconds * 1e3:,.3f} ms a step: {plan.operations / 1e9:,.1f} billion "
        f"operations, {_gigabytes(plan.read_bytes)} read per device"
    )
    if plan.link_seconds:
        rows["links"] = f"about {plan.link_seconds * 1e3:,.3f} ms a step besides"
    rows["at most"] = (
        f"{plan.tokens_per_second:,.0f} tokens/s by the roofline; real programs are slower"
    )
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _bounds(plan: "Plan") -> str:
    """`compute 3.1 ms, memory 2.0 ms, links 0.4 ms`."""
    known = {name: seconds for name, seconds in vars(plan.bounds).items() if seconds}
    return ", ".join(f"{name} {seconds * 1e3:,.3f} ms" for name, seconds in known.items())


def _bound(plan: "Plan") -> str:
    if plan.roofline_share is None:
        return f"{plan.bounds.name}, by shapes alone"
    return (
        f"{plan.bounds.name}: at best {plan.roofline_share:.0%} of the roofline, "
        f"{plan.peak_share:.1%} of the peak's operations (MFU)"
    )


def _rank(plans: "list[Plan]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("mesh", "per device", "roofline, ms", "links, ms", "tokens/s, roofline")
    for plan in plans:
        links = "?" if plan.link_seconds is None else f"{plan.link_seconds * 1e3:,.3f}"
        table.add_row(
            _axes(plan),
            _verdict(plan),
            f"{plan.roofline_seconds * 1e3:,.3f}",
            links,
            f"{plan.tokens_per_second:,.0f}",
        )
    Console().print(table)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
