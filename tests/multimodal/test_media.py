"""Media: what towers read as a part of a batch, to train through them."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

import gemma_jax as gj
from gemma_jax.multimodal.encode import Clips
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import place, soft_tokens
from gemma_jax.training.objectives import TrainBatch, elastic, next_token

VISION = tiny.vision()
CFG = tiny.gemma3(layers=3, vision=VISION)
RUN = [VISION.start_token, *[VISION.image_token] * 4, VISION.end_token]
TOKENS = np.array([[2, 5, *RUN, 7, 8], [2, *RUN, 9, 5, 4]], np.int32)
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)


def media(**changes):
    return replace(gj.Media.of(CFG, TOKENS, {"image": PIXELS}), **changes)


def test_it_is_the_soft_tokens_of_its_placeholders():
    model = tiny.model(CFG)
    ours, theirs = media().soft(model), soft_tokens(model, TOKENS, PIXELS)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_several_kinds_follow_one_another_as_place_puts_them():
    cfg = tiny.seeing_and_hearing(tiny.gemma3n(3, 0))
    model, kinds = tiny.model(cfg), modalities_of(cfg)
    runs = [[m.begin, *[m.placeholder] * m.tokens_per_item, m.end] for m in kinds]
    tokens = np.array([[2, *runs[1], 5, *runs[0]], [2, *runs[0], 5, *runs[1]]], np.int32)
    random = np.random.default_rng(0)
    sides = cfg.vision.image_size
    clips = Clips(random.normal(size=(2, 12, cfg.audio.num_mels)).astype(np.float32))
    pixels = random.uniform(-1, 1, (2, 3, sides, sides)).astype(np.float32)
    given = {kinds[1].name: clips, kinds[0].name: pixels}  # in whatever order
    ours = gj.Media.of(cfg, tokens, given).soft(model)
    theirs = place(tokens, kinds, [m.encode(model, given[m.name]) for m in kinds])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_gradients_reach_the_tower():
    model = tiny.model(CFG)
    trained, frozen, join = gj.trainable(model, lambda path, _: "vision" in path)

    def loss(trained, soft):
        model = join(trained, frozen)
        if soft:
            batch = gj.Batch(TOKENS, soft=soft_tokens(model, TOKENS, PIXELS))
            return next_token(model, batch)[0]
        return next_token(model, TrainBatch(TOKENS, media=media()))[0]

    ours, theirs = (jax.grad(loss)(trained, soft) for soft in (False, True))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(np.any(gradient) for path, gradient in ours.items() if "w" in path)


def test_items_that_no_index_names_change_nothing():
    model = tiny.model(CFG)
    filled = media(inputs={"image": np.concatenate([PIXELS, np.zeros_like(PIXELS)])})
    losses = [next_token(model, TrainBatch(TOKENS, media=m))[0] for m in (media(), filled)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_models_inside_see_what_the_whole_sees():
    model = tiny.model(CFG, "unrolled")
    soft = soft_tokens(model, TOKENS, PIXELS)
    narrow = np.full(3, 12)
    ours, _ = elastic(model, TrainBatch(gj.Batch(TOKENS, ffn_widths_L=narrow), media=media()))
    theirs, _ = elastic(model, gj.Batch(TOKENS, soft=soft, ffn_widths_L=narrow))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    model = tiny.model(CFG)
    blind = tiny.model(tiny.gemma3(layers=3))
    with pytest.raises(ValueError, match="reads text alone; image needs one with an encoder"):
        next_token(blind, TrainBatch(TOKENS, media=media()))
    with pytest.raises(ValueError, match="soft tokens already: leave out these or its media"):
        soft = soft_tokens(model, TOKENS, PIXELS)
        next_token(model, TrainBatch(gj.Batch(TOKENS, soft=soft), media=media()))
    with pytest.raises(ValueError, match="no inputs given"):
        gj.Media.of(CFG, TOKENS, {})
