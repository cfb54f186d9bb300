"""Slots of an engine: the first of them write without the others."""

import jax
import numpy as np
import pytest
import tiny

import gemma_jax as gj
from gemma_jax.inference.prefill import PromptRow
from gemma_jax.inference.rows import advance_first
from gemma_jax.inference.slots import Rules, Slots

CFG = tiny.gemma3(layers=3, window=136, num_heads=2, num_kv_heads=1)
SLOTS, LENGTHS = 6, (5, 9, 12)


@pytest.fixture(scope="module")
def slots():
    return Slots(tiny.model(CFG, "unrolled"), SLOTS, 256, 16, 4, drafts=4, slack=0)


def filled(slots):
    slots.reset()
    requests = {}
    for slot, length in enumerate(LENGTHS):
        ids = tiny.tokens(CFG, 1, length, seed=length)[0].tolist()
        slots.reader.clear()
        slots.reader.read(PromptRow.of(ids[:-1], 0, None, ()), slice(0, length - 1), None)
        slots.insert(slot, ids[-1], slot, ids)
        requests[slot] = gj.Request(prompt=gj.Prompt(ids), max_new_tokens=16)
    return requests


def test_as_few_rows_as_hold_the_requests(slots):
    assert slots.widths(Rules()) == [1, 4, SLOTS]
    assert slots.widths(Rules(extras=True)) == [1, SLOTS]


@pytest.mark.parametrize("running", [(0,), (0, 2)])
def test_the_first_rows_write_what_all_would(slots, running):
    written = []
    for rows in (None, SLOTS):
        requests = {slot: one for slot, one in filled(slots).items() if slot in running}
        others = [jax.device_get(a)[:, 4:] for a in jax.tree.leaves(slots.state.cache.layers)]
        limits = dict.fromkeys(running, 4)
        bursts = [slots.write(requests, limits, {}, {}, rows=rows) for _ in range(3)]
        written.append([burst.tokens for burst in bursts])
        assert all(len(burst.tokens[slot]) == 4 for burst in bursts for slot in running)
        now = [jax.device_get(a)[:, 4:] for a in jax.tree.leaves(slots.state.cache.layers)]
        for before, after in zip(others, now):
            np.testing.assert_array_equal(before, after)
    assert written[0] == written[1]


def test_rows_that_do_not_write_are_not_copied(slots):
    """The program needs memory for the first row alone."""
    state = slots._before([None] * SLOTS, {}, Rules())
    program = advance_first.lower(slots.model, state, rows=1).compile()
    whole = sum(a.nbytes for a in jax.tree.leaves(state.cache.layers))
    assert program.memory_analysis().temp_size_in_bytes < whole / 2
