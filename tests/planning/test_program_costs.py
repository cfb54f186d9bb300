"""Operations and bytes of programs by their text, against XLA's own count where nothing loops."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from gemma_jax.planning import hlo_text as hlo
from gemma_jax.planning.bounds import Bounds
from gemma_jax.planning.program_costs import ProgramCosts, program_costs

F32 = jnp.float32


def costs_of(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    program, text = hlo.compiled(jax.jit(function).lower(*arrays))
    return program_costs(text), program.cost_analysis()


def layer(x, w):
    return jnp.tanh(x @ w) + x


def test_products_and_bytes_are_those_that_xla_counts():
    def chain(x, w, v):
        return layer(layer(x, w), v).sum(axis=0)

    ours, theirs = costs_of(chain, (256, 128), (128, 128), (128, 128))
    assert ours.operations == 2 * 2 * 256 * 128 * 128
    assert theirs["flops"] == pytest.approx(ours.operations, rel=0.05)  # with sums and additions
    assert ours.moved_bytes == pytest.approx(theirs["bytes accessed"], rel=0.1)
    assert ours.kernels == 0


def test_a_loop_costs_what_its_turns_cost():
    def scanned(x, w_LDF):
        return lax.scan(lambda x, w: (layer(x, w), None), x, w_LDF)[0]

    def unrolled(x, w_LDF):
        for i in range(8):
            x = layer(x, w_LDF[i])
        return x

    shapes = (64, 256), (8, 256, 256)
    (looped, once), (plain, _) = costs_of(scanned, *shapes), costs_of(unrolled, *shapes)
    assert looped.operations == plain.operations == 8 * 2 * 64 * 256 * 256
    assert once["flops"] < looped.operations / 7  # which is why XLA's count will not do
    # A slice of the stack is what a turn reads, not the stack.
    assert looped.moved_bytes == pytest.approx(plain.moved_bytes, rel=0.5)
    assert looped.moved_bytes < 8 * 8 * 256 * 256 * 4


PADDED = [(1, 1), (2, 0)]


@pytest.mark.parametrize(
    "stride, padding, spread", [(1, "SAME", 1), (2, "VALID", 1), (1, PADDED, 2)]
)
def test_convolutions(stride, padding, spread):
    """Operations of what meets: the zeros of padding and dilation cost nothing."""

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (stride, stride), padding, lhs_dilation=(spread, 1))

    ours, theirs = costs_of(convolve, (2, 3, 12, 10), (5, 3, 3, 3))
    assert ours.operations == theirs["flops"]


TEXT = """\
HloModule jit_step

%sliced (p: f32[8,16], at: s32[], new: f32[1,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %new = f32[1,16]{1,0:T(1,128)S(1)} parameter(2)
  ROOT %put = f32[8,16]{1,0:T(8,128)} dynamic-update-slice(%p, %new, %at, %at)
}

%body (t: (u32[], f32[8,16], f32[8,16])) -> (u32[], f32[8,16], f32[8,16]) {
  %t = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%t), index=0
  %two = u32[]{:T(128)} constant(2)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %y = f32[8,16]{1,0:T(8,128)} get-tuple-element(%t), index=2
  %sent = (f32[8,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %got = f32[8,16]{1,0:T(8,128)S(1)} collective-permute-done(%sent)
  %made = f32[8,8]{1,0:T(8,128)S(1)} convolution(%got, %y), dim_labels=bf_oi->bf
  %next = u32[]{:T(128)} add(%n, %two)
  ROOT %r = (u32[]{:T(128)}, f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%next, %x, /*index=2*/%y)
}

%condition (t: (u32[], f32[8,16], f32[8,16])) -> pred[] {
  %t = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%t), index=0
  %end = u32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%n, %end), direction=LT
}

ENTRY %main (a: f32[8,16], i: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %fetch = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %here = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %row = f32[1,16]{1,0:T(1,128)S(1)} dynamic-slice(%here, %i, %i), dynamic_slice_sizes={1,16}
  %made = f32[8,16]{1,0:T(8,128)} fusion(%a, %i, %row), kind=kLoop, calls=%sliced
  %space = f32[4096,4096]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %seen = f32[8,16]{1,0:T(8,128)} custom-call(%made), custom_call_target="tpu_custom_call"
  %w = (u32[]{:T(128)}, f32[8,16]{1,0}, f32[8,16]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = f32[8,16]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_a_text_by_hand():
    """As libtpu writes it: a counter that grows by two, memory of two kinds, copies that begin and
    end, an array that is changed in its place, a kernel."""
    whole, row, number, turns = 8 * 16 * 4, 16 * 4, 4, 4
    fetched, sliced, kernel = whole, 2 * number, 2 * whole
    put = number + row  # what it puts is in fast memory, where it puts it is not
    turn = whole + whole + 3 * number  # sent; multiplied; the counter
    compared = 2 * number + 1
    found = program_costs(TEXT)
    assert found.operations == turns * 2 * 8 * 8 * 16
    assert found.kernels == 1
    assert found.moved_bytes == fetched + sliced + kernel + put + turns * (turn + compared)
    sent = hlo.collectives(TEXT)["collective-permute"]
    assert sent == {"count": turns, "bytes": turns * whole}


@pytest.mark.parametrize(
    "text, size",
    [
        ("bf16[3,5]{1,0:T(8,128)}", 30),
        ("f32[]", 4),
        ("pred[7]", 7),
        ("s4[3,5]{1,0:T(8,128)E(4)}", 8),  # two a byte
        ("f8e4m3fn[3,5]", 15),
        ("c64[3]", 24),
        ("(u64[2], s8[3]{0})", 19),
    ],
)
def test_bytes_of_arrays(text, size):
    assert sum(shape.nbytes for shape in hlo.shapes_in(text)) == size


def test_bounds():
    one = Bounds(compute=2.0, memory=3.0)
    assert (one.name, one.seconds) == ("memory", 3.0)
    two = Bounds(compute=2.0, memory=1.0, links=2.5)
    assert (two.name, two.seconds) == ("links", 4.5)


def test_a_program_of_nothing():
    assert costs_of(lambda x: x, (3,))[0].operations == 0
    assert ProgramCosts(1.0, 2, 3).kernels == 3


def test_a_program_has_its_text_however_often_it_is_compiled(tmp_path):
    """JAX's cache would keep the program without the text that the compiler writes beside it."""
    kept = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    try:
        for name, value in kept.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        seen = [costs_of(layer, (48, 48), (48, 48))[0].operations for _ in range(2)]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert seen == [2 * 48**3] * 2
    assert not list(tmp_path.iterdir())
