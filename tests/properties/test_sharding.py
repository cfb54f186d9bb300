"""What works on one device works on a mesh: same logits, same text, same gradients."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

from gemma_jax import forward, generate, init_cache, loss, matformer
from gemma_jax.encoder_config import AttentionBlock
from gemma_jax.multimodal.encode import encode_audio, encode_images
from gemma_jax.placement import shard, with_partition
from gemma_jax.quantisation import quantise
from gemma_jax.sharding import INFERENCE, LONG_CONTEXT, TRAINING, Partition, make_mesh
from gemma_jax.training.trainable import trainable

LENGTH = 4 * tiny.WINDOW + 3
ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1

MESHES = {
    "4": (dict(tensor=4), INFERENCE),  # more than there are key heads
    "2x2": (dict(data=2, tensor=2), INFERENCE),
    "2x2x2": (dict(data=2, fsdp=2, tensor=2), TRAINING),
    "sequence": (dict(sequence=2, tensor=2), LONG_CONTEXT),
}


def gemma3():
    return tiny.gemma3(layers=3)


def gemma3n(layers=4, num_shared=1):
    cfg = tiny.gemma3n(layers, num_shared)
    return replace(cfg, per_layer=replace(cfg.per_layer, vocab_size=88))


def deep():
    """Global layers, too, share keys and values."""
    return gemma3n(6, 3)


CONFIGS = {"gemma3": gemma3, "gemma3n": gemma3n, "deep": deep, "gemma4": tiny.gemma4}


@pytest.fixture(scope="module", params=["gemma3n", *nightly("gemma3", "deep", "gemma4")])
def model(request):
    return tiny.model(CONFIGS[request.param]())


def on_mesh(model, name):
    sizes, rules = MESHES[name]
    devices = jax.devices()[: math.prod(sizes.values())]
    return shard(model, make_mesh(model.cfg, devices, **sizes), rules)


@pytest.mark.parametrize("name", list(MESHES))
def test_logits(model, name):
    split = on_mesh(model, name)
    ids = tiny.tokens(model.cfg, 4, LENGTH)
    whole = np.asarray(forward(model, ids).logits)
    np.testing.assert_allclose(forward(split, ids).logits, whole, atol=ATOL)


@pytest.mark.parametrize("name", ["sequence", *nightly("4", "2x2", "2x2x2")])
def test_generation(model, name):
    split = on_mesh(model, name)
    prompts = [tiny.tokens(model.cfg, 1, n, seed=n)[0].tolist() for n in (3, 40, 17, 5)]
    options = dict(max_new_tokens=20, temperature=1.0, top_k=20, seed=5)
    one, many = (generate(m, None, prompts, **options) for m in (model, split))
    assert [c.token_ids for c in many] == [c.token_ids for c in one]
    for ours, theirs in zip(many, one):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=ATOL)


@pytest.mark.parametrize("model", ["gemma3", *nightly("gemma3n", "deep")], indirect=True)
@pytest.mark.parametrize("name", ["2x2x2", *nightly("4")])
def test_gradients(model, name):
    split = on_mesh(model, name)
    ids = tiny.tokens(model.cfg, 4, LENGTH)

    def gradients(model):
        trained, frozen, join = trainable(model)
        return jax.jit(jax.grad(lambda p: loss(join(p, frozen), ids)))(trained)

    whole, parts = gradients(model), gradients(split)
    for path, expected in whole.items():
        np.testing.assert_allclose(parts[path], expected, atol=ATOL, err_msg=str(path))


@pytest.mark.parametrize("name", ["2x2", *nightly("4", "2x2x2")])
def test_images(name):
    cfg = tiny.gemma3(layers=3, vision=tiny.vision(num_heads=4, d_tower=32))
    model = tiny.model(cfg)
    split = on_mesh(model, name)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)
    whole, _ = encode_images(model, pixels)
    parts, _ = encode_images(split, pixels)
    np.testing.assert_allclose(parts, whole, atol=ATOL)


@pytest.mark.parametrize("name", ["2x2", *nightly("4")])
def test_towers_of_gemma3n(name):
    """MobileNetV5 with three heads, which no mesh of these divides, and the conformer."""
    attending = AttentionBlock(channels=8, num_heads=3, head_dim=4, kv_stride=2)
    stages = tiny.mobilenet().stages
    vision = tiny.mobilenet(stages=(*stages[:2], (attending,), *stages[3:]))
    cfg = tiny.seeing_and_hearing(
        tiny.gemma3(layers=3), vocab_size=100, vision=vision, audio=tiny.audio(num_heads=4)
    )
    model = tiny.model(cfg)
    split = on_mesh(model, name)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 1, (2, 3, 64, 64)).astype(np.float32)
    mel = rng.standard_normal((2, 40, cfg.audio.num_mels)).astype(np.float32)
    for encode, inputs in ((encode_images, pixels), (encode_audio, mel)):
        whole, _ = encode(model, inputs)
        parts, _ = encode(split, inputs)
        np.testing.assert_allclose(parts, whole, atol=ATOL)


@pytest.mark.parametrize("storage", ["int8", *nightly("bfloat16")])
def test_narrow_weights(model, storage):
    stored = quantise(model, storage)
    split = on_mesh(stored, "4")
    for array in jax.tree.leaves(split.blocks[0][0].attn.q.w.get_value()):
        assert array.addressable_shards[0].data.size == array.size // 4
    ids = tiny.tokens(model.cfg, 4, LENGTH)
    expected = forward(stored, ids).logits
    np.testing.assert_allclose(forward(split, ids).logits, expected, atol=ATOL)


def test_every_device_holds_its_part_alone(model):
    split = on_mesh(model, "4")
    by_head = math.gcd(4, *(model.cfg.heads_of(spec)[1] for spec in model.cfg.layers))
    for param in jax.tree.leaves(split.blocks, is_leaf=lambda x: hasattr(x, "dims")):
        array, parts = param.get_value(), 4 if set(param.dims) & set("NFV") else 1
        parts = max(parts, by_head if "K" in param.dims else 1)
        assert array.addressable_shards[0].data.size * parts == array.size, param.dims


def test_rings_are_whole_and_long_caches_are_split_along_their_slots():
    cfg = gemma3()
    model = on_mesh(tiny.model(cfg), "sequence")
    cache = init_cache(cfg, model.layer_groups, 1, 64, jnp.float32)
    cache = model.runtime.partition.place(cache)
    shapes = {
        layer.capacity: layer.k_BKSH.addressable_shards[0].data.shape[1:]
        for segment in cache.layers
        for layer in segment
    }
    assert shapes == {tiny.WINDOW: (1, 1, tiny.WINDOW, 16), 64: (1, 1, 32, 16)}
    assert cache.positions[64].addressable_shards[0].data.shape == (1, 32)


def test_a_slice_of_a_model_on_a_mesh():
    model = tiny.model(gemma3n(), layout="unrolled")
    submodel = matformer.Slice(ffn_widths=(24,) * 4)
    ids = tiny.tokens(model.cfg, 4, LENGTH)
    expected = forward(matformer.at(model, submodel), ids).logits
    split = matformer.at(on_mesh(model, "2x2"), submodel)
    np.testing.assert_allclose(forward(split, ids).logits, expected, atol=ATOL)


@pytest.mark.nightly
@pytest.mark.parametrize("shares", [True, False])
def test_speculation(shares):
    """With a draft that uses the model's cache, and with one that has its own."""
    model = tiny.model(gemma3n(), layout="unrolled")
    draft = matformer.Slice(ffn_widths=(24,) * 4)
    split = on_mesh(model, "2x2")
    prompts = [[3, 5, 7], [2, 4, 6, 8]]
    expected = generate(model, None, prompts, max_new_tokens=12)
    other = draft if shares else matformer.at(split, draft)
    found = generate(split, None, prompts, max_new_tokens=12, draft=other, draft_tokens=2)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_more_devices_than_key_heads():
    cfg = gemma3()
    mesh = make_mesh(cfg, jax.devices()[:4], tensor=4)
    assert dict(mesh.shape) == {"tensor": 2, "group": 2}
    # The compiler also copes without the axis: then every device holds all of the cache.
    flat = jax.make_mesh(
        (4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    model, ids = tiny.model(cfg), tiny.tokens(cfg, 2, LENGTH)
    expected = generate(model, None, ids.tolist(), max_new_tokens=5)
    for other in (mesh, flat):
        found = generate(shard(model, other), None, ids.tolist(), max_new_tokens=5)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_what_cannot_be_split_says_so():
    cfg = tiny.gemma3(layers=1)
    with pytest.raises(ValueError, match="N=4 cannot be split over mesh axis .* of size 8"):
        shard(tiny.model(cfg), make_mesh(cfg, tensor=8))
    model = tiny.model(gemma3())
    split = shard(model, make_mesh(model.cfg, data=8))
    with pytest.raises(ValueError, match="B=3 cannot be split over mesh axis 'data' of size 8"):
        generate(split, None, [[1, 2]] * 3)
    with pytest.raises(ValueError, match=r"unknown mesh axes \['model'\]; choose from data, fsdp"):
        make_mesh(cfg, model=8)
    with pytest.raises(ValueError, match="mesh data=3 is for 3 devices, but there are 8; give"):
        make_mesh(cfg, data=3)
    with pytest.raises(ValueError, match="no rule uses mesh axis 'fsdp'"):
        Partition.of(make_mesh(cfg, fsdp=8), INFERENCE)
    assert dict(make_mesh(cfg, fsdp=-1, tensor=2).shape) == {"fsdp": 4, "tensor": 2}
    assert with_partition(split, None).runtime.partition is None
