"""What a run goes on from: whole folders, bit for bit, and nothing lost for a full disk."""

import os
import resource
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_checkpoints import CheckpointError, TrainingStates
from gemma_jax.training.state import TrainState

TRAINED = {
    ("blocks", 0, 0, "w"): jnp.arange(6.0).reshape(2, 3).astype(jnp.bfloat16) / 7,
    ("norm",): jnp.ones(3) / 3,
}


def state(step=1, trained=TRAINED):
    moments = optax.adam(1e-3).init(trained)
    return TrainState(jnp.int32(step), trained, moments, jax.random.key(step))


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def states(tmp_path):
    made = TrainingStates(tmp_path / "states")
    yield made
    made.close()


def test_a_state_comes_back_as_it_was(states, tmp_path):
    states.save(state(7), {"data": {"next_batch": 3}})
    again, facts = TrainingStates(tmp_path / "states").restore(state(1))
    assert_same(again, state(7))
    assert facts == {"data": {"next_batch": 3}}


def test_the_last_and_the_best_are_kept(states, tmp_path):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None)):
        states.save(state(step), {}, loss)
    assert (states.latest, states.best) == (4, 2)
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["2", "4"]
    resumed = TrainingStates(tmp_path / "states")
    resumed.save(state(5), {}, 2.2)
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["2", "5"]
    assert_same(resumed.restore(state(), resumed.best)[0], state(2))


def test_what_a_killed_process_left_is_passed_over(states, tmp_path):
    states.save(state(3), {})
    half = tmp_path / "states" / "4.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    again = TrainingStates(tmp_path / "states")
    assert again.latest == 3
    assert_same(again.restore(state())[0], state(3))
    again.save(state(4), {})
    assert again.latest == 4 and not half.exists()


@pytest.mark.parametrize("files", [0, 1, 3])
def test_killed_while_an_old_step_is_deleted(files, tmp_path, monkeypatch):
    """After so many of its files: what is left of it is neither a step nor in the way."""
    states = TrainingStates(tmp_path / "states")
    states.save(state(1), {}, 2.0)
    unlink, left = os.unlink, [files]

    def killed(path, **at):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, **at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            states.save(state(2), {}, 1.0)
    resumed = TrainingStates(tmp_path / "states")
    assert (resumed.latest, resumed.best) == (2, 2)
    resumed.save(state(3), {}, 0.5)
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["3"]
    assert_same(resumed.restore(state())[0], state(3))


def test_nothing_to_resume_is_said(states):
    with pytest.raises(CheckpointError, match="holds no step to resume from"):
        states.restore(state())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({("norm",): jnp.ones(4)}, r"kept float32\[3\], now float32\[4\]"),
        (TRAINED | {("norm",): jnp.ones(3, jnp.bfloat16)}, r"now bfloat16\[3\]"),
        (TRAINED | {("more",): jnp.ones(3)}, "trained.more: kept nothing"),
    ],
)
def test_a_state_of_another_run_is_refused(states, other, said):
    states.save(state(3), {})
    with pytest.raises(CheckpointError, match=said):
        states.restore(state(3, other))


def test_a_full_disk_loses_nothing(states):
    states.save(state(1), {})
    large = {("w",): jax.random.normal(jax.random.key(0), (600, 600))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # no file may be larger
    try:
        with pytest.raises(CheckpointError, match="step 2 cannot be written.*step 1 is kept"):
            states.save(state(2, large), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert states.latest == 1
    assert_same(states.restore(state())[0], state(1))
    states.save(replace(state(2)), {})  # when there is room again
    assert states.latest == 2
