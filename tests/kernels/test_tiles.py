"""Which tiles of queries and blocks of keys meet, against the mask written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_kernels.attention import tiles
from gemma_kernels.attention.mask import causal_interval, causal_rows, visible


def by_tile(flags_TS, q, k, reduce):
    T, S = flags_TS.shape
    return reduce(reduce(flags_TS.reshape(T // q, q, S // k, k), axis=3), axis=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_meetings_of_any_mask(data):
    """No meeting is missed, and none is called whole that is not."""
    T, S, q, k = 12, 20, 4, 5
    positions = data.draw(st.permutations(range(-4, S - 4)), "positions of keys")
    pos = jnp.maximum(jnp.array([positions], jnp.int32), -1)
    lo = data.draw(st.lists(st.integers(-2, S), min_size=T, max_size=T), "lo")
    size = data.draw(st.lists(st.integers(0, S), min_size=T, max_size=T), "length")
    lo, hi = jnp.array([lo], jnp.int32), jnp.array([np.add(lo, size)], jnp.int32)
    seen = np.asarray(visible(lo, hi, pos))[0]
    some, whole = tiles.visible_blocks(lo, hi, pos, q, k)
    assert np.all(np.asarray(some)[0] >= by_tile(seen, q, k, np.any))
    assert np.all(np.asarray(whole)[0] <= by_tile(seen, q, k, np.all))
    _, whole = tiles.visible_blocks(lo, hi, pos, q, k, unseeing=False)
    sees = np.asarray(hi > jnp.maximum(lo, 0))[0][:, None]
    assert np.all(np.asarray(whole)[0] <= by_tile(seen | ~sees, q, k, np.all))
    first, last, whole_first, whole_last = (np.asarray(x)[0] for x in tiles.bounds(some, whole))
    for i, row in enumerate(np.asarray(some)[0]):
        assert [first[i], last[i]] == (
            [row.argmax(), row.nonzero()[0][-1]] if row.any() else [0, -1]
        )
        assert np.asarray(whole)[0, i, whole_first[i] : whole_last[i] + 1].all()


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("T, S", [(12, 12), (10, 20), (1, 16)])
def test_stated_masks_are_exact(window, T, S):
    q, k = 4, 4
    lo, hi, pos = causal_rows(1, T, S, window)
    seen = np.asarray(visible(lo, hi, pos))[0]
    some, whole = tiles.static_visible_blocks(T, S, q, k, True, window)
    for i in range(0, T, q):
        for j in range(0, S, k):
            block = seen[i : i + q, j : j + k]
            assert some[i // q, j // k] == block.any()
            assert whole[i // q, j // k] == block.all()


def test_plain_windows_by_hand():
    """Tiles of two queries under a window of three, over keys that go on after a break."""
    pos = jnp.array([[0, 1, 2, 3, 4, 5, 7, 8]])
    lo, hi = causal_interval(pos, 3)
    plain = tiles.plain_windows(lo, hi, pos, 2, 0, 3)
    # The first window would begin before the text; those of 7 and 8 hold fewer than three keys.
    assert plain.tolist() == [[0, 1, 1, 0]]
    assert tiles.plain_windows(lo, hi.at[0, 2].add(1), pos, 2, 0, 3).tolist() == [[0, 0, 1, 0]]
    shuffled = pos.at[0, 2:4].set(jnp.array([3, 2]))
    assert tiles.plain_windows(lo, hi, shuffled, 2, 0, 3).tolist() == [[0, 0, 0, 0]]
