"""What must not change a result when a prompt holds images."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

from gemma_jax import Prompt, forward, generate, init_cache
from gemma_jax.decoder.batch import Batch
from gemma_jax.inference.prefill import PromptRow, prefill_chunk
from gemma_jax.inference.session import Session
from gemma_jax.multimodal.encode import encode_images
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import soft_tokens

ATOL = 2e-5  # as in test_invariance.py
VISION = tiny.vision()
SPAN = [VISION.start_token, *[VISION.image_token] * VISION.num_soft_tokens, VISION.end_token]


@pytest.fixture(scope="module")
def model():
    """Its window of 3 is narrower than the 4 soft tokens of an image."""
    return tiny.model(tiny.gemma3(3, window=3, vision=VISION))


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VISION.image_token, length).tolist()


def picture(seed: int) -> np.ndarray:
    size = VISION.image_size
    return np.random.default_rng(seed).uniform(-1, 1, (3, size, size)).astype(np.float32)


def prompt(*parts) -> Prompt:
    """A prompt from texts (lists of ids) and pictures, in order."""
    ids, pixels = [], []
    for part in parts:
        is_picture = isinstance(part, np.ndarray)
        ids += SPAN if is_picture else part
        pixels += [part] if is_picture else []
    return Prompt(ids, np.stack(pixels)) if pixels else Prompt(ids)


@pytest.fixture(scope="module")
def two():
    """Text and two images, the second right after the first."""
    return prompt(text(7, 0), picture(0), picture(1), text(9, 1))


def logits(model, one: Prompt) -> np.ndarray:
    ids = np.array([one.token_ids], np.int32)
    soft = soft_tokens(model, ids, one.pixels) if len(one.pixels) else None
    return np.asarray(forward(model, Batch(ids, soft=soft)).logits)[0]


def in_pieces(model, one: Prompt, width: int) -> np.ndarray:
    """Logits of passes of at most `width` tokens over one cache, cut as a session cuts them."""
    soft_ITD, _ = encode_images(model, one.pixels)
    row = PromptRow.of(one.token_ids, 0, soft_ITD, modalities_of(model.cfg))
    cache = init_cache(model.cfg, model.layer_groups, 1, 64, jnp.float32)
    parts = []
    for piece in row.cuts(width):
        part = prefill_chunk([row], [piece])
        out = forward(model, part.batch, cache=cache)
        cache = out.cache
        parts.append(np.asarray(out.logits)[0, : piece.stop - piece.start])
    return np.concatenate(parts)


@pytest.mark.parametrize("width", [1, 5, 64, *nightly(8, 12)])
def test_pieces_equal_one_pass(model, two, width):
    """A piece never ends inside an image, however narrow it is asked to be."""
    np.testing.assert_allclose(in_pieces(model, two, width), logits(model, two), atol=ATOL)


def test_cuts_keep_images_whole(model, two):
    soft_ITD, _ = encode_images(model, two.pixels)
    row = PromptRow.of(two.token_ids, 0, soft_ITD, modalities_of(model.cfg))
    for width in range(1, len(two.token_ids) + 1):
        pieces = row.cuts(width)
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]
        assert pieces[-1].stop == len(two.token_ids)
        for piece in pieces[:-1]:
            before, after = row.block[piece.stop - 1], row.block[piece.stop]
            assert before < 0 or before != after
        assert all(p.stop - p.start <= max(width, VISION.num_soft_tokens) for p in pieces)


def test_padding_on_either_side_changes_nothing(model, two):
    expected, n = logits(model, two), len(two.token_ids)
    for left, right in ((5, 0), (0, 5), (3, 2)):
        ids = np.pad([two.token_ids], ((0, 0), (left, right))).astype(np.int32)
        positions = np.pad([np.arange(n)], ((0, 0), (left, right)), constant_values=-1)
        soft = soft_tokens(model, ids, two.pixels)
        out = forward(model, Batch(ids, positions.astype(np.int32), soft=soft))
        np.testing.assert_allclose(out.logits[0, left : left + n], expected, atol=ATOL)


@pytest.fixture(scope="module")
def rows(two):
    """Rows of different lengths with two, one and no images."""
    return [two, prompt(picture(2), text(3, 2)), prompt(text(11, 3))]


@pytest.fixture(scope="module")
def alone(model, rows):
    return [generate(model, None, one, max_new_tokens=12).token_ids for one in rows]


@pytest.mark.parametrize("chunk", [1024, 6])
def test_a_row_does_not_feel_the_images_of_others(model, rows, alone, chunk):
    """In every order."""
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        done = generate(model, None, [rows[i] for i in order], max_new_tokens=12, chunk=chunk)
        assert [c.token_ids for c in done] == [alone[i] for i in order]


def test_other_images_elsewhere_leave_a_row_alone(model, two):
    rows = [two, prompt(picture(2), text(3, 2))]
    other = [prompt(text(7, 0), picture(8), picture(9), text(9, 1)), rows[1]]
    done = [generate(model, None, batch, max_new_tokens=12) for batch in (rows, other)]
    np.testing.assert_allclose(done[0][1].log_probs, done[1][1].log_probs, atol=ATOL)
    assert np.abs(np.subtract(done[0][0].log_probs, done[1][0].log_probs)).max() > 1e-2


def test_swapping_images_changes_only_what_follows(model, two):
    swapped = Prompt(two.token_ids, two.pixels[::-1])
    ours, theirs = logits(model, two), logits(model, swapped)
    first = two.token_ids.index(VISION.image_token)
    np.testing.assert_allclose(ours[:first], theirs[:first], atol=ATOL)
    assert np.abs(ours - theirs)[first:].max(axis=-1).min() > 1e-3


def test_a_later_image_is_not_seen_by_what_is_before_it(model, two):
    changed = Prompt(two.token_ids, np.stack([two.pixels[0], picture(5)]))
    ours, theirs = logits(model, two), logits(model, changed)
    second = np.flatnonzero(np.array(two.token_ids) == VISION.image_token)[VISION.num_soft_tokens]
    np.testing.assert_allclose(ours[:second], theirs[:second], atol=ATOL)
    assert np.abs(ours - theirs)[second:].max() > 1e-2


def test_turns_over_a_cache_equal_the_whole_prompt(model):
    """Each turn brings an image; the answer before it stays in the cache."""
    turns = [prompt(text(4, i), picture(i), text(3, i + 10)) for i in range(3)]
    session = Session(model, 1, 64)
    ids, pixels = [], []
    for turn in turns:
        soft_ITD, _ = encode_images(model, turn.pixels)
        session.prefill([turn.token_ids], soft=[soft_ITD], max_new_tokens=4)
        answer = list(session.decode(4)[0])
        ids, pixels = ids + turn.token_ids, [*pixels, *turn.pixels]
        whole = generate(model, None, Prompt(ids, np.stack(pixels)), max_new_tokens=4)
        assert answer == whole.token_ids
        np.testing.assert_allclose(session.log_probs[0], whole.log_probs, atol=ATOL)
        ids = ids + answer


def test_soft_tokens_and_placeholders_must_match(model, two):
    with pytest.raises(ValueError, match="8 placeholders .* 4 soft tokens given"):
        generate(model, None, Prompt(two.token_ids, two.pixels[:1]), max_new_tokens=1)
    with pytest.raises(ValueError, match="8 placeholders .* 0 soft tokens given"):
        generate(model, None, Prompt(two.token_ids), max_new_tokens=1)


def test_a_model_without_a_tower_says_so():
    blind = tiny.model(tiny.gemma3(1))
    with pytest.raises(ValueError, match="has no vision tower"):
        encode_images(blind, np.zeros((1, 3, 56, 56), np.float32))


def test_wrong_sizes_are_refused(model):
    with pytest.raises(ValueError, match=r"pixels must be \[I, 3, 56, 56\], got \[1, 3, 28, 28\]"):
        encode_images(model, np.zeros((1, 3, 28, 28), np.float32))


def test_images_one_by_one_equal_images_together(model, two):
    together, _ = encode_images(model, two.pixels)
    for i, one in enumerate(two.pixels):
        alone, _ = encode_images(model, one[None])
        np.testing.assert_allclose(alone[0], together[i], atol=ATOL)
