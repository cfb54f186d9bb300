"""What a model needs on a machine that need not be there: memory, traffic, time.

For TPUs the real program is compiled by the real compiler; for GPUs what the shapes alone say.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import VisionConfig
from gemma_jax.planning import costs
from gemma_jax.planning import hlo_text as hlo
from gemma_jax.planning.bounds import Bounds
from gemma_jax.planning.hardware import Topology
from gemma_jax.planning.lowering import Work, abstract_cache, lower, placed_model
from gemma_jax.planning.program_costs import program_costs
from gemma_jax.planning.training import Step, Training
from gemma_jax.sharding import TRAINING, Partition, make_mesh, mesh_sizes

# What a collective takes however little it carries: an assumption, of the usual order.
LATENCY = 3e-6


@dataclass(frozen=True)
class Compiled:
    """What the compiler says, per device; bytes and seconds.

    Attributes:
      argument_bytes, output_bytes, alias_bytes, temporary_bytes, code_bytes: Its own account of
        memory. Outputs in the place of arguments (`alias`) count once.
      collectives: Kind -> `count` and `bytes` in a step.
      moved_weights: Weights that the step brings into another order or to other devices.
      operations, moved_bytes: What the program does in a step, loops as often as they turn (see
        `program_costs`), and what is computed again with it; of kernels, whose operations it does
        not tell, those that attention cannot do without.
      kernels: Calls of kernels in a step.
      seconds: Its estimate, in which what a loop runs counts once; `None` where it has none, as
        with some kernels.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    collectives: dict[str, dict[str, int]]
    moved_weights: list[hlo.Moved]
    operations: float
    moved_bytes: int
    kernels: int
    seconds: float | None
    lower_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
      mesh: Devices along each axis.
      weights_bytes: On each device, the towers that see and hear with them.
      cache_bytes: On each device, positions with them; in training, the optimiser's state.
      trained_bytes: Of the weights on each device, those that are trained.
      peak_bytes: On each device at once: all of these, and temporaries if the program was compiled.
      memory_bytes: What a device has.
      usable_bytes: What of it is for all of these; see `Topology.memory_fraction`.
      operations, read_bytes: Of a step on each device, at least; what is computed again to save
        memory is not counted.
      needed_seconds: Of the operations alone, at the full speed of the device.
      roofline_seconds: The longer of both at its full speed.
      link_seconds: Of what passes between devices; `None` if nothing was compiled.
      tokens_per_second: New tokens of all rows, at the roofline and with the links' time: a bound
        that real programs stay below.
      refusal: Why the compiler gives no program, if it does not.
      bounds: Times of what the compiled program does; without one, of what no program can do
        without.
      training: What is trained, and how.
    """

    model: str
    topology: str
    devices: int
    work: Work
    mesh: dict[str, int]
    weights_bytes: int
    tower_bytes: int
    cache_bytes: int
    peak_bytes: int
    memory_bytes: int
    usable_bytes: int
    operations: float
    read_bytes: int
    needed_seconds: float
    roofline_seconds: float
    link_seconds: float | None
    tokens_per_second: float
    compiled: Compiled | None
    bounds: Bounds
    refusal: str | None = None
    trained_bytes: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.peak_bytes <= self.usable_bytes

    @property
    def roofline_share(self) -> float | None:
        """Of the speed that no program can pass, what the compiled one has at the speeds of its
        machine; `None` if nothing was compiled."""
        return None if self.compiled is None else self.roofline_seconds / self.bounds.seconds

    @property
    def peak_share(self) -> float:
        """Of the matrix units' full speed, what `operations` make of it in that time: model FLOPs
        utilisation (MFU), at most."""
        return self.needed_seconds / self.bounds.seconds

    def as_dict(self) -> dict:
        shares = {"roofline_share": self.roofline_share, "peak_share": self.peak_share}
        return {**asdict(self), "fits": self.fits, "bound": self.bounds.name, **shares}


def make_plan(
    name: str,
    cfg: GemmaConfig,
    topology: Topology,
    work: Work,
    axes: Mapping[str, int] | None = None,
    *,
    training: Training = Training(),
    compiles: bool = True,
) -> Plan:
    """Plans one step of the work.

    Args:
      axes: Devices along the axes of the mesh; default: see `default_axes`.
      training: What is trained, and how, if that is the work.
      compiles: Whether to run the compiler, if there is one for the machine.

    Raises:
      ValueError: A mesh that does not fit the machine, or sizes that it does not divide.
    """
    check(cfg, work)
    axes = dict(axes) if axes else default_axes(cfg, topology.count, work)
    mesh, compiles = _mesh(cfg, topology, axes), compiles and topology.compiles
    partition = Partition.of(mesh, TRAINING if work.mode == "train" else None)
    if work.mode == "train":
        needs = _training_needs(cfg, work, training, partition)
    else:
        needs = _generation_needs(cfg, work, partition)
    operations, device = needs.operations / topology.count, topology.device
    bounds = Bounds.of(device, operations, needs.read)
    plan = Plan(
        model=name,
        topology=topology.name,
        devices=topology.count,
        work=work,
        mesh=dict(mesh.shape),
        weights_bytes=needs.weights,
        tower_bytes=needs.towers,
        cache_bytes=needs.cache,
        peak_bytes=needs.weights + needs.cache,
        memory_bytes=device.memory,
        usable_bytes=topology.usable_bytes,
        operations=operations,
        read_bytes=needs.read,
        needed_seconds=bounds.compute,
        roofline_seconds=bounds.seconds,
        link_seconds=0.0 if topology.count == 1 else None,
        tokens_per_second=needs.tokens / bounds.seconds,
        compiled=None,
        bounds=bounds,
        trained_bytes=needs.trained,
        training=training.said if work.mode == "train" else {},
    )
    return _compiled(plan, needs, topology) if compiles else plan


@dataclass(frozen=True)
class _Needs:
    """What work needs: bytes on each device, operations on all (of them `scores` of attention), new
    tokens; and its program."""

    weights: int
    towers: int
    trained: int
    cache: int
    read: int
    operations: float
    scores: float
    tokens: int
    arrays: Any
    lower: Callable[[], jax.stages.Lowered]


def _generation_needs(cfg: GemmaConfig, work: Work, partition: Partition) -> _Needs:
    model = placed_model(cfg, work, partition)
    weights = costs.weight_bytes(model)
    cache = costs.local_bytes(abstract_cache(cfg, work, model, partition))
    return _Needs(
        weights["all"],
        weights["towers"],
        trained=0,
        cache=cache,
        read=weights["read"] + costs.cache_bytes_read(cfg, work, cache),
        operations=costs.operations(cfg, model, work),
        scores=costs.score_operations(cfg, work),
        tokens=work.batch * work.chunk,
        arrays=model,
        lower=lambda: lower(model, work, partition),
    )


def _training_needs(cfg, work: Work, training: Training, partition: Partition) -> _Needs:
    step = Step.of(cfg, work, training, partition)
    memory = step.memory
    moved = memory["trained"] + memory["moments"]  # read once, and written
    return _Needs(
        memory["all"],
        costs.weight_bytes(training.model(cfg, work, partition))["towers"],
        trained=memory["trained"],
        cache=memory["moments"],
        read=2 * training.micro_batches * memory["all"] + 2 * moved,
        operations=training.operations(step.made.parts, work),
        scores=training.score_operations(step.made.parts, work),
        tokens=training.micro_batches * training.rows_per_row * work.batch * work.context,
        arrays=(step.state.trained, step.made.parts.frozen),
        lower=step.lower,
    )


def check(cfg: GemmaConfig, work: Work) -> None:
    """Raises `ValueError` for work that the model cannot do."""
    if work.batch < 1 or work.context < 1:
        raise ValueError(f"batch={work.batch} and context={work.context} must be at least 1")
    if work.context > cfg.max_positions:
        raise ValueError(
            f"context={work.context} exceeds the model's {cfg.max_positions} positions"
        )


def default_axes(cfg: GemmaConfig, count: int, work: Work) -> dict[str, int]:
    """Training: all of `fsdp` that rows allow. Else as much of `tensor` as the model allows.

    What is left goes to rows of the batch, or to the slots of long caches.
    """
    legal = list(meshes(cfg, count, work))
    if not legal:
        raise ValueError(
            f"{count} devices cannot share the model's heads and {work.batch} rows evenly; give "
            "another batch, or a mesh"
        )
    first = ("fsdp", "tensor") if work.mode == "train" else ("tensor", "data")
    return max(legal, key=lambda axes: [axes.get(axis, 1) for axis in first])


def meshes(cfg: GemmaConfig, count: int, work: Work) -> Iterator[dict[str, int]]:
    """All meshes of so many devices that split the model and the work evenly."""
    other = "fsdp" if work.mode == "train" else "sequence"
    for tensor in _divisors(count):
        for data in _divisors(count // tensor):
            rest = count // tensor // data
            axes = {"data": data, other: rest, "tensor": tensor}
            if _splits(cfg, work, data, rest, tensor):
                yield {name: n for name, n in axes.items() if n > 1} or {"tensor": 1}


def _splits(cfg: GemmaConfig, work: Work, data: int, rest: int, tensor: int) -> bool:
    """Whether the rules split everything evenly; `rest` devices are those of the third axis."""
    heads, channels = [cfg.num_heads], [cfg.vocab_size, *(spec.d_ff for spec in cfg.layers)]
    channels += [vocabulary.vocab_size for vocabulary in cfg.modality_vocabularies]
    if cfg.per_layer is not None:
        channels.append(cfg.per_layer.vocab_size)
    if isinstance(cfg.vision, VisionConfig):
        heads.append(cfg.vision.num_heads)
        channels.append(cfg.vision.d_ff)
    even = all(n % tensor == 0 for n in heads)
    if work.mode == "train":
        widths = [cfg.d_model] + ([tower.d_tower for tower in (cfg.vision, cfg.audio) if tower])
        even &= work.batch % (data * rest) == 0 and all(n % rest == 0 for n in widths)
        return even and all(n % tensor == 0 for n in channels)
    even &= work.batch % data == 0 and work.context % rest == 0
    return even and all(n % (tensor * rest) == 0 for n in channels)


def search(
    name: str,
    cfg: GemmaConfig,
    topology: Topology,
    work: Work,
    *,
    training: Training = Training(),
    most: int = 8,
) -> Iterator[Plan]:
    """Plans of the meshes of a machine, those first that need least time by their shapes.

    Meshes whose weights and caches alone do not fit are left out, and so are those after `most`.
    """
    plans = []
    for axes in meshes(cfg, topology.count, work):
        plan = make_plan(name, cfg, topology, work, axes, training=training, compiles=False)
        if plan.fits:
            plans.append((plan.roofline_seconds, axes))
    for _, axes in sorted(plans, key=lambda pair: pair[0])[:most]:
        yield make_plan(name, cfg, topology, work, axes, training=training)


def fit(
    name: str,
    cfg: GemmaConfig,
    topology: Topology,
    work: Work,
    what: str,
    axes: Mapping[str, int] | None = None,
    *,
    training: Training = Training(),
) -> Plan | None:
    """The plan with the longest context, in steps of 1,024 tokens, or the largest batch that fits.

    `None` if nothing does. By shapes first; the compiler has the last word.
    """
    step = 1024 if what == "context" else 1
    most = cfg.max_positions // step if what == "context" else 1 << 14
    if what == "batch" and axes is None:
        axes = default_axes(cfg, topology.count, work)
    if axes and what == "batch":  # rows that the mesh can share
        step = axes.get("data", 1) * (axes.get("fsdp", 1) if work.mode == "train" else 1)

    def plan(n: int, compiles: bool) -> Plan:
        task = replace(work, **{what: n * step})
        return make_plan(name, cfg, topology, task, axes, training=training, compiles=compiles)

    low = _last(lambda n: plan(n, False).fits, most)
    while low:
        found = plan(low, True)
        if found.fits:
            return found
        over = found.peak_bytes - found.usable_bytes
        smaller = plan(max(low - 1, 1), False)
        each = max(1, plan(low, False).peak_bytes - smaller.peak_bytes)
        # By as many as what is over takes, if that is known; one in sixteen where it is not.
        low -= max(1, math.ceil(over / each) if over > 0 else low // 16)
        low = max(low, 0)
    return None


def _last(fits, most: int) -> int:
    """The largest `n` up to `most` for which it fits, 0 if none: it fits less and less."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _mesh(cfg: GemmaConfig, topology: Topology, axes: dict[str, int]) -> Mesh | AbstractMesh:
    if topology.compiles:
        return make_mesh(cfg, topology.devices, **axes)
    sizes = mesh_sizes(cfg, topology.count, axes)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _compiled(plan: Plan, needs: _Needs, topology: Topology) -> Plan:
    start = time.perf_counter()
    lowered = needs.lower()
    middle = time.perf_counter()
    try:
        program, text = hlo.compiled(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        return replace(plan, refusal=reason.partition(" Total hbm usage")[0][:300])
    end = time.perf_counter()
    memory = program.memory_analysis()
    traffic = hlo.collectives(text)
    seconds = (program.cost_analysis() or {}).get("optimal_seconds", -1.0)
    done = program_costs(text)
    counted = done.operations + (needs.scores / plan.devices if done.kernels else 0.0)
    compiled = Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=traffic,
        moved_weights=hlo.moved_weights(text, weight_shapes(needs.arrays)),
        operations=max(counted, plan.operations),
        moved_bytes=done.moved_bytes,
        kernels=done.kernels,
        seconds=seconds if seconds > 0 else None,
        lower_seconds=middle - start,
        compile_seconds=end - middle,
    )
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    beside = memory.temp_size_in_bytes + new + memory.generated_code_size_in_bytes
    link = link_seconds(traffic, topology.device.links)
    step = plan.roofline_seconds + link
    return replace(
        plan,
        peak_bytes=plan.peak_bytes + beside,
        link_seconds=link,
        tokens_per_second=needs.tokens / step,
        compiled=compiled,
        bounds=Bounds.of(
            topology.device,
            compiled.operations,
            max(compiled.moved_bytes, plan.read_bytes),
            link,
        ),
    )


def link_seconds(traffic: Mapping[str, Mapping[str, int]], links: float) -> float:
    """All links busy in both directions; a sum over devices crosses them twice."""
    size = sum(kind["bytes"] * (2 if name == "all-reduce" else 1) for name, kind in traffic.items())
    return size / links + LATENCY * sum(kind["count"] for kind in traffic.values())


def weight_shapes(model: Any) -> set[tuple[str, tuple[int, ...]]]:
    """Of the matrices, whole and as a device holds them, stacked and one layer alone."""
    names = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int8": "s8"}
    names |= {"int4": "s4", "uint4": "u4"}
    shapes = set()
    for array in jax.tree.leaves(model):
        local = array.sharding.shard_shape(array.shape)
        for shape in (array.shape, local, array.shape[1:], local[1:]):
            # Below that, activations and norms have the same shapes.
            if math.prod(shape) >= 1 << 20 and len(shape) > 1:
                shapes.add((names.get(str(array.dtype), str(array.dtype)), tuple(shape)))
    return shapes


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
