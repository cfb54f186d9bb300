"""What stands in a Param in the place of an array: ours keep the contract, and so may a stranger's.

`Blocks` is a format that the library does not know. It is made here of the contract alone, and goes
wherever weights go.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import gemma_checkpoints as gc
from gemma_jax import forward, generate, loss, matformer
from gemma_jax.placement import shard
from gemma_jax.planning import costs
from gemma_jax.planning.lowering import Work
from gemma_jax.sharding import TRAINING, make_mesh
from gemma_jax.weights.contract import contract
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.int8 import to_int8
from gemma_jax.weights.off_device import DiskTable, HostTable, OffDeviceTable
from gemma_jax.weights.protocol import StandIn, array_bytes, dense, head_rows, take
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.stored import StoredWeight
from gemma_jax.weights.tree import map_params
from gemma_jax.weights.view import Part
from gemma_kernels.quantized_matmul import QuantizedMatrix

BLOCK = 32
ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks(StandIn):
    """int8 in blocks along the last axis, the innermost input, as a row of a GGUF file is.

    Attributes:
      codes: int8 `[..., blocks, 32]`.
      scale: float32 `[..., blocks]`.
    """

    codes: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, array):
        return cls(*to_int8(array.reshape(*array.shape[:-1], -1, BLOCK), (array.ndim,)))

    @property
    def shape(self):
        return (*self.codes.shape[:-2], self.codes.shape[-2] * BLOCK)

    def dense(self):
        return (self.codes * self.scale[..., None]).reshape(self.shape)

    def rows(self, ids):
        return Blocks(self.codes[ids], self.scale[ids]).dense()

    def contract(self, equation, x):
        return contract(equation, x, self.dense())

    def take(self, axis, index):
        if axis == -1:
            whole = range(index) if isinstance(index, int) else index
            firsts = whole[::BLOCK]
            index = tuple(first // BLOCK for first in firsts)
            if list(whole) != [b * BLOCK + i for b in index for i in range(BLOCK)]:
                raise ValueError(f"the cut goes through a block; use multiples of {BLOCK}")
        return Blocks(take(self.codes, axis - 1, index), take(self.scale, axis, index))

    def array_dims(self, dims):
        return Blocks(dims + "_", dims)


def is_matrix(path, param):
    return bool(param.get_metadata().get("inputs"))


def in_blocks(model):
    return map_params(model, lambda param: Blocks.of(param.get_value()), is_matrix)


@pytest.fixture(scope="module", params=["scan", "unrolled"])
def model(request):
    return in_blocks(tiny.whole_groups(request.param))


@pytest.fixture(scope="module")
def unrolled():
    return in_blocks(tiny.whole_groups("unrolled"))


def test_blocks_compute_what_the_widened_model_does(model):
    tokens = tiny.tokens(model.cfg, 2, 19)
    logits = forward(model, tokens).logits
    np.testing.assert_allclose(logits, forward(tiny.widened(model), tokens).logits, atol=ATOL)
    plain = forward(tiny.relayout(tiny.whole_groups(), "unrolled"), tokens).logits
    error = jnp.abs(
        forward(in_blocks(tiny.relayout(tiny.whole_groups(), "unrolled")), tokens).logits - plain
    )
    assert 0 < error.mean() < 0.1 * jnp.std(plain)


def test_blocks_write_what_the_widened_model_does(model):
    prompts = tiny.tokens(model.cfg, 2, 9).tolist()
    ours, theirs = (
        generate(m, None, prompts, max_new_tokens=6) for m in (model, tiny.widened(model))
    )
    assert [done.token_ids for done in ours] == [done.token_ids for done in theirs]


def test_the_loss_of_a_table_in_blocks(unrolled):
    tokens = tiny.tokens(unrolled.cfg, 2, 9)
    np.testing.assert_allclose(
        loss(unrolled, tokens), loss(tiny.widened(unrolled), tokens), rtol=1e-5
    )


def test_slices_in_whole_blocks(unrolled):
    """F is an output of gate and up, and the input of down."""
    submodel = matformer.Slice(ffn_widths=(64, 96, 128))
    tokens = tiny.tokens(unrolled.cfg, 2, 19)
    small, view = matformer.slice(unrolled, submodel), matformer.at(unrolled, submodel)
    assert small.blocks[0][0].ffn.down.w.get_value().codes.shape == (1, 64, 2, BLOCK)
    assert small.blocks[0][0].ffn.up.w.get_value().codes.shape == (1, 64, 2, BLOCK)
    expected = forward(matformer.slice(tiny.widened(unrolled), submodel), tokens).logits
    for other in (small, view):
        np.testing.assert_allclose(forward(other, tokens).logits, expected, atol=ATOL)


def test_a_slice_through_a_block_is_refused(unrolled):
    submodel = matformer.Slice(ffn_widths=(64, 70, 128))
    view, tokens = matformer.at(unrolled, submodel), tiny.tokens(unrolled.cfg, 1, 5)
    for use in (lambda: matformer.slice(unrolled, submodel), lambda: forward(view, tokens)):
        with pytest.raises(ValueError) as error:
            use()
        assert str(error.value) == "the cut goes through a block; use multiples of 32"


@pytest.mark.parametrize(
    "sizes, rules", [(dict(tensor=4), None), (dict(fsdp=2, tensor=2), TRAINING)]
)
def test_blocks_on_four_devices(model, sizes, rules):
    mesh = make_mesh(model.cfg, jax.devices()[:4], **sizes)
    split = shard(model, mesh, rules)
    up, down = (getattr(split.blocks[0][0].ffn, name).w.get_value() for name in ("up", "down"))
    tensor, fsdp = sizes["tensor"], sizes.get("fsdp", 1)
    F, D, blocks_of_F, blocks_of_D = 4 * BLOCK, 64, 4, 2
    for weight, local in (
        (up, (F // tensor, blocks_of_D // fsdp)),
        (down, (D // fsdp, blocks_of_F // tensor)),
    ):
        assert weight.codes.addressable_shards[0].data.shape[1:] == (*local, BLOCK)
        assert weight.scale.addressable_shards[0].data.shape[1:] == local
    tokens = tiny.tokens(model.cfg, 4, 19)
    expected = forward(model, tokens).logits
    np.testing.assert_allclose(forward(split, tokens).logits, expected, atol=ATOL)


@pytest.mark.parametrize("save", [gc.save_hf, gc.save_orbax])
def test_blocks_are_not_exported(unrolled, save, tmp_path):
    with pytest.raises(gc.CheckpointError, match=r"is Blocks: only plain floats.*; load") as error:
        save(unrolled, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_plans_count_entries_and_not_codes(unrolled):
    work = Work("decode", batch=1, context=8)
    counts = {costs.operations(m.cfg, m, work) for m in (unrolled, tiny.widened(unrolled))}
    assert len(counts) == 1


# ---- Every stand-in of ours, and the stranger ----

EQUATION, DIMS = "BTD,NHD->BTNH", "NHD"
ARRAY = np.random.default_rng(0).standard_normal((6, 4, 64), np.float32)


def stored(storage):
    if storage == "bfloat16":
        bits = jax.lax.bitcast_convert_type(jnp.asarray(ARRAY, jnp.bfloat16), jnp.uint16)
        return StoredWeight(bits)
    return QuantizedWeight.rounded(jnp.asarray(ARRAY), 1, *storage)


STAND_INS = {
    "bfloat16": lambda: stored("bfloat16"),
    "int8": lambda: stored((8, None)),
    "int4": lambda: stored((4, 32)),
    "part of an array": lambda: Part.of(jnp.asarray(ARRAY), -1, 32),
    "part of int8": lambda: Part.of(stored((8, None)), -2, (0, 1, 3)),
    "part of a part": lambda: Part.of(Part.of(stored((8, None)), -1, 32), -2, 2),
    "host": lambda: HostTable.of(ARRAY),
    "disk": lambda: DiskTable.of(ARRAY.reshape(6, -1), (4, 64), np.dtype("float32")),
    "part of a host table": lambda: Part.of(HostTable.of(ARRAY), -2, (0, 3)),
    "blocks": lambda: Blocks.of(jnp.asarray(ARRAY)),
}
OFF_DEVICE = ("host", "disk", "part of a host table")


@pytest.fixture(params=STAND_INS)
def weight(request):
    made = STAND_INS[request.param]()
    assert isinstance(made, StandIn)
    return made


@pytest.fixture
def off_device(weight):
    return isinstance(getattr(weight, "whole", weight), OffDeviceTable)


def test_shape_rows_and_dense_agree(weight):
    wide = dense(weight)
    assert weight.shape == wide.shape
    ids = jnp.array([[5, 0], [3, 3]])
    np.testing.assert_array_equal(weight.rows(ids), wide[ids])
    np.testing.assert_array_equal(jax.jit(lookup)(weight, ids), wide[ids])
    assert weight.nbytes == sum(map(array_bytes, jax.tree.leaves(weight)))


def test_the_rows_of_a_head_say_the_same(weight, off_device):
    if off_device and isinstance(weight, Part):
        with pytest.raises(ValueError, match="viewed, not cut"):
            weight.head_rows()
        return
    rows = head_rows(weight)
    wide = rows.dense() if isinstance(rows, QuantizedMatrix) else rows.astype(jnp.float32)
    np.testing.assert_array_equal(wide, dense(weight))


def test_what_is_multiplied_by_is_dense(weight, off_device):
    x = jnp.ones((1, 2, weight.shape[-1]))
    if off_device:
        with pytest.raises(ValueError, match='per_layer_table="device"'):
            contract(EQUATION, x, weight)
        return
    expected = jnp.einsum(EQUATION, x, dense(weight), precision="highest")
    np.testing.assert_allclose(contract(EQUATION, x, weight), expected, atol=1e-5)


@pytest.mark.parametrize("axis, index", [(-1, 32), (-2, (0, 1)), (-3, (1, 2, 5)), (-3, 2)], ids=str)
def test_what_is_taken_is_taken_of_dense(weight, off_device, axis, index):
    if off_device:
        with pytest.raises(ValueError, match="viewed, not cut"):
            take(weight, axis, index)
    else:
        taken = take(weight, axis, index)
        np.testing.assert_array_equal(dense(taken), take(dense(weight), axis, index))
    seen = Part.of(weight, axis, index)
    np.testing.assert_array_equal(seen.dense(), take(dense(weight), axis, index))


def test_every_axis_has_a_letter(weight, off_device):
    if off_device:
        with pytest.raises(ValueError, match="cannot be split over a mesh"):
            weight.array_dims(DIMS)
        return
    for stacked in (weight, jax.tree.map(lambda a: a[None], weight)):
        dims = stacked.array_dims(DIMS)
        front = len(stacked.shape) - len(DIMS)
        ranks = jax.tree.map(lambda a, letters: a.ndim - len(letters), stacked, dims)
        assert set(jax.tree.leaves(ranks)) == {front}
        assert jax.tree.leaves(dims)[0].startswith(DIMS)


def test_a_stacked_weight_is_taken_alike(weight, off_device):
    if off_device:
        return
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    assert stacked.shape == (2, *weight.shape)
    both = dense(take(stacked, -2, (0, 1)))
    np.testing.assert_array_equal(both[1], dense(take(weight, -2, (0, 1))))


def test_half_a_contract_is_none():
    class Half(StandIn):
        shape = (1,)

    with pytest.raises(TypeError, match="abstract"):
        Half()
