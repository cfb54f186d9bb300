"""Plans for machines that are not there: every released size, compiled by the TPU's compiler."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from marks import nightly

from gemma_jax import forward, preset
from gemma_jax.decoder.cache import cache_bytes
from gemma_jax.planning import (
    Work,
    costs,
    default_axes,
    find_topology,
    make_plan,
    meshes,
)
from gemma_jax.planning import (
    hlo_text as hlo,
)
from gemma_jax.planning.lowering import placed_model
from gemma_jax.planning.plan import fit, link_seconds, search
from gemma_jax.planning.training import Step, Training
from gemma_jax.sharding import Partition, make_mesh
from gemma_jax.training.state import TrainState
from gemma_kernels.compilers import hopper_sass as sass

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler comes with the plan extra: gemma-jax[plan]",
)

# A machine that holds each size with its longest context.
MACHINES = {
    "gemma3-270m": ("v5e:1x1", None),
    "gemma3-1b": ("v5e:1x1", None),
    "gemma3-4b": ("v5e:2x2", None),
    "gemma3-4b in int8": ("v5e:1x1", "int8"),
    "gemma3-12b": ("v5e:2x4", None),
    "gemma3-27b": ("v5e:4x4", None),
    "gemma3n-e2b": ("v6e:1x1", None),
    "gemma3n-e4b": ("v6e:1x1", None),
}


def each_step():
    """A token and a chunk of every size; the compiler takes up to six minutes over a chunk. By
    day, one token of the smallest is enough."""
    for name in MACHINES:
        for mode in ("decode", "prefill"):
            by_day = (name, mode) == ("gemma3-270m", "decode")
            yield (name, mode) if by_day else nightly((name, mode))[0]


@needs_libtpu
@pytest.mark.parametrize("name, mode", list(each_step()))
def test_every_size_fits_its_machine(name, mode):
    machine, weights = MACHINES[name]
    size = name.partition(" ")[0]
    cfg, topology = preset(size), find_topology(machine)
    work = Work(mode, batch=1, context=cfg.max_positions, weights=weights)
    plan = make_plan(size, cfg, topology, work)
    compiled = plan.compiled
    assert plan.fits, (plan.peak_bytes, plan.memory_bytes)
    moves = {moved.operation for moved in compiled.moved_weights}
    # A chunk is long enough to pay for another order of a small matrix; a token is not.
    assert moves == set() or (mode == "prefill" and moves <= {"copy", "transpose"})
    # What is predicted is what the compiler finds. Text has no use for the tower; the loop over
    # tokens takes it along, the pass over a chunk leaves it out.
    predicted = plan.weights_bytes + plan.cache_bytes
    predicted -= plan.tower_bytes if mode == "prefill" else 0
    assert compiled.argument_bytes == pytest.approx(predicted, rel=0.02)
    # The caches are written where they lie, rings for local layers, and none is copied.
    parts = math.gcd(topology.count, cfg.num_kv_heads)
    rings = cache_bytes(cfg, 1, cfg.max_positions, "bfloat16") // parts
    assert plan.cache_bytes == pytest.approx(rings, rel=0.02)
    assert compiled.alias_bytes >= rings
    if mode == "decode":
        assert compiled.temporary_bytes < 32e6
    else:
        # A chunk reads the keys and values of one full cache, in a copy.
        assert compiled.temporary_bytes < rings / 2 + 2e9 / topology.count
    assert compiled.lower_seconds < 60 and compiled.compile_seconds < 600


@pytest.mark.nightly
@needs_libtpu
def test_rows_of_a_long_batch_are_decoded_where_they_lie():
    """Each of these rows fills a full cache; a copy of one would be half a gigabyte."""
    cfg = preset("gemma3-4b")
    work = Work("decode", batch=8, context=131_072)
    plan = make_plan("gemma3-4b", cfg, find_topology("v5e:2x4"), work, {"tensor": 8})
    assert plan.mesh == {"tensor": 4, "group": 2}
    assert plan.compiled.temporary_bytes < 32e6
    layers = len(cfg.layers)
    # Two sums over devices per layer, one for the embedding, and what sampling needs.
    assert plan.compiled.collectives["all-reduce"]["count"] in range(2 * layers, 2 * layers + 8)


@pytest.mark.nightly
@needs_libtpu
def test_a_training_step():
    cfg = preset("gemma3-270m")
    cfg = dataclasses.replace(cfg, layers=cfg.layers[:1], vocab_size=8192)
    work = Work("train", batch=4, context=256)
    plan = make_plan("one layer", cfg, find_topology("v5e:2x2"), work)
    assert plan.mesh == {"fsdp": 4} and plan.fits
    states = plan.weights_bytes + plan.cache_bytes
    assert plan.compiled.argument_bytes == pytest.approx(states, rel=0.02)
    assert plan.compiled.alias_bytes == pytest.approx(states, rel=0.02)
    assert {"all-gather"} <= set(plan.compiled.collectives)


@needs_libtpu
def test_a_step_that_the_compiler_refuses():
    cfg = preset("gemma3-4b")
    plan = make_plan(
        "gemma3-4b", cfg, find_topology("v5e:1x1"), Work("decode", batch=8, context=131_072)
    )
    assert not plan.fits and plan.compiled is None and "memory" in plan.refusal


@pytest.mark.nightly
@needs_libtpu
def test_caches_in_int8_hold_twice_as_much():
    """What does not fit above, with weights in int8 too; nothing is widened in memory."""
    cfg = preset("gemma3-4b")
    work = Work("decode", batch=8, context=131_072, weights="int8", cache_dtype="int8")
    plan = make_plan("gemma3-4b", cfg, find_topology("v5e:1x1"), work)
    assert plan.cache_bytes == pytest.approx(cache_bytes(cfg, 8, 131_072, "int8"), rel=0.02)
    assert plan.fits and plan.compiled.alias_bytes >= cache_bytes(cfg, 8, 131_072, "int8")
    one_layer = 8 * 131_072 * cfg.num_kv_heads * cfg.head_dim  # bytes of its keys
    assert plan.compiled.temporary_bytes < one_layer // 2


@pytest.mark.nightly
@needs_libtpu
def test_the_largest_in_four_bits_on_four_small_chips():
    """Gemma 3 27B with 32K of context: every device multiplies with its own codes."""
    work = Work("decode", batch=1, context=32_768, weights="int4")
    plan = make_plan("gemma3-27b", preset("gemma3-27b"), find_topology("v5e:2x2"), work)
    assert plan.fits and plan.weights_bytes < 4.4e9
    assert plan.compiled.collectives.keys() == {"all-reduce"}
    # No layer is copied or widened in memory; the table, of which rows are read too, is.
    assert plan.compiled.temporary_bytes < 1e9
    assert {moved["shape"][0] for moved in plan.as_dict()["compiled"]["moved_weights"]} == {65_552}


def test_four_bits_are_counted_as_half_a_byte():
    """In the plan's weights as in what is loaded; scales take a bit of each entry."""
    cfg, one = preset("gemma3-1b"), find_topology("gpu:h100")
    sizes = {
        weights: make_plan("", cfg, one, Work("decode", 1, 64, weights=weights), compiles=False)
        for weights in ("int8", "int4", "int4:128", "int4:channel")
    }
    entries = sizes["int4:channel"].weights_bytes / 0.5
    assert sizes["int8"].weights_bytes == pytest.approx(entries, rel=0.01)
    assert sizes["int4"].weights_bytes == pytest.approx(entries * 5 / 8, rel=0.01)
    assert sizes["int4:128"].weights_bytes == pytest.approx(entries * 4.25 / 8, rel=0.01)
    assert sizes["int4"].read_bytes < 0.65 * sizes["int8"].read_bytes


HLO = """\
HloModule jit_step

%body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = bf16[8,4]{1,0:T(8,128)} all-reduce(%x), replica_groups={}, to_apply=%add
  %copy.1 = bf16[4,8]{0,1} copy(%x)
  %f = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused.1
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%i, %all-reduce.1)
}

%inner.1 (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %copy.2 = bf16[8,4]{1,0} copy(%p)
}

%fused.1 (p: bf16[8,4]) -> bf16[8,4] {
  %copy.3 = bf16[8,4]{1,0} copy(%p)
  %f.1 = bf16[8,4]{1,0} fusion(%copy.3), kind=kLoop, calls=%inner.1
  ROOT %transpose.1 = bf16[4,8]{0,1} transpose(%f.1), dimensions={1,0}
}

%condition.1 (p: (s32[], bf16[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5), backend_config={}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%tokens (p: (s32[])) -> (s32[]) {
  %w = (s32[], bf16[8,4]{1,0}) while(%t), condition=%condition.1, body=%body.1
  %g = (f32[2]{0}, f32[16]{0}) all-gather-start(%y), dimensions={0}
  %h = f32[16]{0} all-gather-done(%g)
}

%more (p: (s32[])) -> pred[] {
  %n = s32[] constant(7)
  %a = pred[] compare(%i, %n), direction=LT
  ROOT %b = pred[] and(%a, %d)
}

ENTRY %main (p: s32[]) -> s32[] {
  %copy.4 = bf16[4,8]{0,1} copy(%q)
  %w.1 = (s32[]) while(%p), condition=%more, body=%tokens
}
"""


def test_a_program_by_hand():
    assert hlo.collectives(HLO) == {
        "all-reduce": {"count": 5, "bytes": 5 * 8 * 4 * 2},
        "all-gather": {"count": 1, "bytes": 16 * 4},
    }
    moved = hlo.moved_weights(HLO, {("bf16", (4, 8))})
    assert sorted(moved, key=lambda m: (m.operation, m.before)) == [
        hlo.Moved("all-reduce", "bf16", (8, 4), 5),
        hlo.Moved("copy", "bf16", (4, 8), 5),
        hlo.Moved("copy", "bf16", (4, 8), 1, before=True),
        hlo.Moved("transpose", "bf16", (4, 8), 5),  # what is read on the way to it is not written
    ]
    assert hlo.moved_weights(HLO, {("f32", (4, 8))}) == []
    seconds = link_seconds({"all-reduce": {"count": 0, "bytes": 50}}, 100.0)
    assert seconds == pytest.approx(1.0)


def test_a_loop_of_a_real_program():
    """Read off the text of XLA for CPUs: its layers' sums, once per turn."""
    cfg = tiny.gemma3(layers=9, num_heads=8, num_kv_heads=4)
    mesh = make_mesh(cfg, jax.devices()[:4], tensor=4)
    model = placed_model(cfg, Work("decode", 1, 64, dtype="float32"), Partition.of(mesh))
    ids = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    _, text = hlo.compiled(jax.jit(lambda m, i: forward(m, i).logits).lower(model, ids))
    count = hlo.collectives(text)["all-reduce"]["count"]
    assert count in range(18, 22)  # two per layer, one for the embedding


def test_training_lowers_the_librarys_step():
    """With `weights`, arrays of that dtype."""
    cfg = tiny.gemma3(layers=3)
    partition = Partition.of(make_mesh(cfg, jax.devices()[:1], tensor=1))
    work = Work("train", 2, 16, "float32", weights="bfloat16", attention_impl="reference")
    step = Step.of(cfg, work, Training(), partition)
    state, frozen, tokens = step.lower().args_info[0]
    assert isinstance(state, TrainState) and not frozen
    assert all(leaf.donated for leaf in jax.tree.leaves(state)) and not tokens.donated
    assert {leaf.dtype for leaf in state.trained.values()} == {jnp.dtype("bfloat16")}


def test_operations_are_those_that_xla_counts():
    cfg = tiny.gemma3(layers=3, vocab_size=4096, d_model=256, window=64)
    mesh = make_mesh(cfg, jax.devices()[:1], tensor=1)
    work = Work("train", batch=2, context=64, dtype="float32", attention_impl="reference")
    model = placed_model(cfg, work, Partition.of(mesh))
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    program = jax.jit(lambda m, i: forward(m, i).logits).lower(model, ids).compile()
    counted = program.cost_analysis()["flops"]
    assert costs.operations(cfg, model, work) / 3 == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("window", [None, 3])
def test_pairs(window):
    def slow(new, length):
        return sum(min(i + 1, window or length) for i in range(length - new, length))

    for new, length in ((1, 1), (1, 9), (4, 9), (9, 9), (2, 4)):
        assert costs.pairs_seen(window, new, length) == slow(new, length)


def test_meshes():
    cfg = preset("gemma3-27b")
    found = list(meshes(cfg, 16, Work("decode", 4, 131_072)))
    assert {"tensor": 16} in found and {"data": 4, "sequence": 2, "tensor": 2} in found
    assert all(math.prod(axes.values()) == 16 and 4 % axes.get("data", 1) == 0 for axes in found)
    assert default_axes(cfg, 16, Work("decode", 1, 1024)) == {"tensor": 16}
    assert default_axes(cfg, 16, Work("train", 16, 1024)) == {"fsdp": 16}
    assert default_axes(preset("gemma3-270m"), 16, Work("decode", 4, 1024)) == (
        {"data": 4, "tensor": 4}
    )
    with pytest.raises(ValueError, match="7 devices cannot share the model's heads and 1 rows"):
        default_axes(cfg, 7, Work("decode", 1, 1024))


def test_gpus_by_their_figures():
    cfg, machine = preset("gemma3-27b"), find_topology("gpu:a100x8")
    plan = make_plan("gemma3-27b", cfg, machine, Work("decode", 4, 131_072))
    assert plan.mesh == {"tensor": 8} and plan.compiled is None and plan.fits
    assert plan.cache_bytes == pytest.approx(cache_bytes(cfg, 4, 131_072, "bfloat16") / 8, rel=0.02)
    ranked = list(search("gemma3-27b", cfg, machine, Work("decode", 4, 131_072)))
    assert len(ranked) > 3 and all(plan.fits for plan in ranked)
    most = fit("gemma3-27b", cfg, machine, Work("decode", 1, 131_072), "batch")
    assert most.fits and most.mesh == {"tensor": 8}
    more = dataclasses.replace(most.work, batch=most.work.batch + 1)
    assert not make_plan("gemma3-27b", cfg, machine, more).fits
    for share, context in ((None, 102_400), (0.92, 131_072)):
        alone = find_topology("gpu:a100", share)
        longest = fit("gemma3-27b", cfg, alone, Work("decode", 1, 1024), "context")
        assert longest.work.context == context
        assert longest.peak_bytes <= longest.usable_bytes < longest.memory_bytes
    assert fit("gemma3-27b", cfg, find_topology("gpu:t4"), Work("decode", 1, 1), "context") is None


@pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))
@pytest.mark.parametrize("topology", ["gpu:h100x8", "gpu:h200"])
def test_gpus_by_their_compiler(topology):
    cfg, machine = preset("gemma3-27b"), find_topology(topology)
    plan = make_plan("gemma3-27b", cfg, machine, Work("decode", 1, 131_072))
    predicted = plan.weights_bytes - plan.tower_bytes + plan.cache_bytes  # text needs no tower
    assert plan.fits and plan.compiled.argument_bytes == pytest.approx(predicted, rel=0.02)
    assert plan.compiled.moved_weights == []
    sent = plan.compiled.collectives
    assert sent == {} if machine.count == 1 else sent["all-gather"]["bytes"] < 1e6


def test_what_cannot_be_planned():
    cfg = preset("gemma3-1b")
    for name in ("v9:2x2", "v5e", "gpu:b17x8", "gpu:h100x0", "v5e:2"):
        with pytest.raises(ValueError, match="unknown topology .*v5e, v5p, v6e, tpu7x.* h100"):
            find_topology(name)
    one = find_topology("gpu:h100")
    with pytest.raises(ValueError, match="context=40000 exceeds the model's 32768 positions"):
        make_plan("gemma3-1b", cfg, one, Work("decode", 1, 40_000))
    with pytest.raises(ValueError, match="batch=0 and context=5 must be at least 1"):
        make_plan("gemma3-1b", cfg, one, Work("decode", 0, 5))
    with pytest.raises(ValueError, match="mesh tensor=2 is for 2 devices, but there is 1; leave"):
        make_plan("gemma3-1b", cfg, one, Work("decode", 1, 5), {"tensor": 2})
    with pytest.raises(ValueError, match="no gradient: leave it frozen"):
        make_plan("gemma3-1b", cfg, one, Work("train", 1, 5, weights="int8"))


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know():
    with pytest.raises(ValueError, match="the compiler knows no TPU slice 'v5e:3x7'"):
        find_topology("v5e:3x7")
