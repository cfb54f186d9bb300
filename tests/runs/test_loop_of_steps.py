"""The loop over steps: their order, and what stops it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.training.loop import LossError, SpikeGuard, steps
from gemma_jax.training.state import TrainState


def state(at=0):
    return TrainState(jnp.int32(at), {}, (), jnp.uint32(0))


def step_of(losses):
    """A step that says one loss after the other."""

    def step(state, frozen, batch):
        metrics = {"loss": jnp.float32(losses[batch]), "grad_norm": jnp.float32(1)}
        return TrainState(state.step + 1, {}, (), state.key), metrics

    return step


def walk(series, until=None, start=0, **options):
    batches = range(start, len(series))
    until = len(series) if until is None else until
    return steps(step_of(series), state(start), None, batches, until=until, **options)


def test_moments_come_in_order_and_the_last_has_its_state():
    moments = list(walk([3.0, 2.0, 1.0]))
    assert [moment.step for moment in moments] == [1, 2, 3]
    assert [moment.metrics["loss"] for moment in moments] == [3, 2, 1]
    assert [moment.batch for moment in moments] == [0, 1, 2]
    assert [moment.state is None for moment in moments] == [True, True, False]
    assert int(moments[-1].state.step) == 3


def test_data_that_end_early_end_the_loop_with_a_state():
    moments = list(walk([3.0, 2.0], until=9))
    assert [moment.step for moment in moments] == [1, 2]
    assert int(moments[-1].state.step) == 2


def test_a_moment_that_is_waited_for_comes_before_the_next_batch_is_asked_for():
    asked = []
    batches = (asked.append(i) or i for i in itertools.count())
    for moment in steps(
        step_of([1.0] * 9), state(), None, batches, until=6, wait=lambda at: at % 2 == 0
    ):
        assert (moment.state is not None) == (moment.step % 2 == 0)
        if moment.state is not None:
            assert len(asked) == moment.step == int(moment.state.step)


def test_a_run_goes_on_at_its_step():
    moments = list(walk([9.0, 9.0, 2.0, 1.0], start=2))
    assert [moment.step for moment in moments] == [3, 4]
    assert not list(walk([1.0], start=1))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_loss_that_is_no_number_names_its_step_and_batch(wrong):
    with pytest.raises(LossError, match="step 2: loss (nan|inf)") as error:
        list(walk([1.0, wrong, 1.0, 1.0]))
    assert (error.value.step, error.value.batch) == (2, 1)


def test_a_spike_is_told_from_wavering():
    guard = SpikeGuard(times=3, after=5)
    assert len(list(walk([1.0, 2.5, 1.0, 2.5, 1.0, 2.5, 1.0], guard=guard))) == 7
    assert len(list(walk([9.0, 1.0, 1.0, 1.0], guard=guard))) == 4  # too early to tell
    with pytest.raises(LossError, match="step 7: loss 3.1, 3.1 times the usual 1"):
        list(walk([1.0] * 6 + [3.1], guard=guard))
    with pytest.raises(LossError):  # what was usual before a run was resumed still is
        list(walk([1.0] * 6 + [3.1], start=6, guard=guard, losses=[1.0] * 6))
    never = SpikeGuard(times=float("inf"), after=5)
    assert len(list(walk([1.0] * 6 + [3.1], guard=never))) == 7
