"""Runs with a folder: what they keep, and that they go on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
import optax
import pytest
import tiny

import gemma_jax as gj
from gemma_checkpoints import TrainingStates
from gemma_jax.runs.folder import METRICS, SAMPLES, STOPPED, RunFolder

CFG = tiny.gemma3(layers=1)


@dataclass
class Batches:
    """Rows drawn by number; `between` is called with the number of a batch before it is given."""

    position: int = 0
    between: object = None
    end: int = 10**9

    def __iter__(self):
        return self

    def __next__(self):
        if self.position >= self.end:
            raise StopIteration
        if self.between is not None:
            self.between(self.position)
        self.position += 1
        return np.random.default_rng(self.position).integers(3, CFG.vocab_size, (2, 8))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def batch_ids(self, number):
        return [(f"rows.jsonl:{number + 1}",)]


class NoState(Batches):
    """The same as an iterator that cannot tell where it is."""

    def __getattribute__(self, name):
        if name in ("get_state", "set_state"):
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG)


def train(model, data, steps, folder=None, resume=False, save=2, **beside):
    return gj.train(
        model,
        data,
        optimizer=optax.adam(1e-2),
        steps=steps,
        folder=folder,
        resume=resume,
        beside=gj.Beside(every=gj.Every(save=save, evaluate=beside.pop("evaluate", 0)), **beside),
    )


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def numbers(folder):
    """What was said of each step but for its time."""
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in RunFolder(folder, resume=True).lines(METRICS)
    ]


def test_a_resumed_run_is_the_run_that_was_never_stopped(model, tmp_path):
    held_out = [np.random.default_rng(0).integers(3, CFG.vocab_size, (2, 8))]
    options = {"evaluate": 2, "held_out": held_out}
    whole = train(model, Batches(), 7, tmp_path / "whole", **options)
    train(model, Batches(), 3, tmp_path / "parts", **options)
    parts = train(model, Batches(), 7, tmp_path / "parts", resume=True, **options)
    assert_same(parts, whole)
    assert_same(train(model, Batches(), 7, tmp_path / "whole", resume=True, **options), whole)
    said = numbers(tmp_path / "whole")
    assert [line["step"] for line in said if "loss" in line] == list(range(1, 8))
    of_parts = numbers(tmp_path / "parts")
    assert [line for line in of_parts if "loss" in line] == [l for l in said if "loss" in l]
    assert {tuple(line.items()) for line in said} <= {tuple(line.items()) for line in of_parts}


def test_data_without_a_state_are_read_again(model, tmp_path):
    whole = train(model, NoState(), 4)
    train(model, NoState(), 3, tmp_path / "parts")
    assert_same(train(model, NoState(), 4, tmp_path / "parts", resume=True), whole)


def test_steps_after_the_last_save_are_taken_and_told_again(model, tmp_path):
    """As after a kill: the folder knows of steps that no state is kept of."""
    whole = train(model, Batches(), 6, tmp_path / "whole")
    train(model, Batches(), 4, tmp_path / "cut")
    folder = RunFolder(tmp_path / "cut", resume=True)
    folder.append(METRICS, {"step": 5, "loss": 0.0, "grad_norm": 0.0})
    with open(folder.path / METRICS, "a") as file:
        file.write('{"step": 6, "lo')  # the process ended here
    folder.append(SAMPLES, {"step": 5, "prompt": "", "text": ""})
    assert_same(train(model, Batches(), 6, tmp_path / "cut", resume=True), whole)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert not folder.lines(SAMPLES)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(model, tmp_path, number, capsys):
    whole = train(model, Batches(), 6, save=0)

    def between(position):
        if position == 3:
            os.kill(os.getpid(), number)

    ended = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    before = signal.getsignal(number)
    with pytest.raises(ended) as error:
        train(model, Batches(between=between), 6, tmp_path / "run", save=0)
    assert signal.getsignal(number) is before
    if number == signal.SIGTERM:
        assert error.value.code == 143
    latest = TrainingStates(tmp_path / "run" / "states").latest
    assert latest in (3, 4)
    assert f"step {latest} is saved" in capsys.readouterr().err
    assert_same(train(model, Batches(), 6, tmp_path / "run", resume=True, save=0), whole)


def test_a_loss_that_is_no_number_names_its_rows(model, tmp_path):
    def objective(model, batch, key):
        loss, metrics = gj.next_token(model, batch, key)
        return loss + np.nan * (batch[0, 0] == 7), metrics

    class Poisoned(Batches):
        def __next__(self):
            batch = super().__next__()
            batch[0, 0] = 7 if self.position == 4 else 3
            return batch

    options = {"optimizer": optax.adam(1e-2), "steps": 6, "folder": tmp_path / "run"}
    with pytest.raises(gj.LossError, match="step 4: loss nan.*stopped.json; step 2 is kept"):
        gj.train(
            model,
            Poisoned(),
            objective,
            beside=gj.Beside(every=gj.Every(save=2)),
            **options,
        )
    said = json.loads((tmp_path / "run" / STOPPED).read_text())
    assert (said["step"], said["rows"]) == (4, [["rows.jsonl:4"]])
    assert TrainingStates(tmp_path / "run" / "states").latest == 2
    gj.train(model, Batches(), resume=True, **options)  # with other rows
    assert not (tmp_path / "run" / STOPPED).exists()


def test_data_that_end_early_end_the_run_whole(model, tmp_path):
    trained = train(model, Batches(end=3), 9, tmp_path / "run")
    assert_same(trained, train(model, Batches(), 3))
    assert TrainingStates(tmp_path / "run" / "states").latest == 3


def test_a_folder_is_taken_once(model, tmp_path):
    folder = tmp_path / "run"
    train(model, Batches(), 2, folder)
    with pytest.raises(ValueError, match="holds a run; go on with it by --resume"):
        train(model, Batches(), 2, folder)
    with RunFolder(folder, resume=True).locked():
        with pytest.raises(ValueError, match="another process is training here"):
            train(model, Batches(), 2, folder, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is no run"):
        train(model, Batches(), 2, tmp_path / "other", resume=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_another_config_is_not_gone_on_with(model, tmp_path):
    def run(config, resume=False):
        gj.train(
            model,
            Batches(),
            optimizer=optax.sgd(0.1),
            steps=2,
            folder=tmp_path / "run",
            resume=resume,
            config=config,
        )

    run({"steps": 2, "optimizer": {"rate": 0.1}})
    run({"steps": 3, "optimizer": {"rate": 0.1}}, resume=True)
    with pytest.raises(ValueError, match=r"another run: optimizer.rate was 0.1, now 0.2"):
        run({"steps": 2, "optimizer": {"rate": 0.2}}, resume=True)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["config"] == {"steps": 2, "optimizer": {"rate": 0.1}}
    assert len(said["started"]) == 2
    assert said["started"][0]["packages"]["jax"] == jax.__version__


def test_watchers_are_told(model, tmp_path):
    class Watcher:
        def __init__(self):
            self.said, self.texts, self.closed = [], [], False

        def scalars(self, step, values):
            self.said.append((step, dict(values)))

        def text(self, step, name, text):
            self.texts.append((step, name, text))

        def close(self):
            self.closed = True

    watcher = Watcher()
    beside = gj.Beside(
        every=gj.Every(evaluate=2, sample=3, log=2),
        held_out=[np.full((1, 4), 5)],
        write=lambda model: {"prompt": f"{len(model.cfg.layers)} layer"},
        watchers=[watcher],
        rate=lambda step: 0.1 * (step + 1),
    )
    gj.train(model, Batches(), optimizer=optax.sgd(0.1), steps=4, beside=beside)
    assert [step for step, values in watcher.said if "loss" in values] == [2, 4]
    assert [step for step, values in watcher.said if "held_out_loss" in values] == [0, 2, 4]
    assert watcher.said[1][1]["rate"] == pytest.approx(0.2)
    assert watcher.texts == [
        (0, "prompt", "1 layer"),
        (3, "prompt", "1 layer"),
        (4, "prompt", "1 layer"),
    ]
    assert watcher.closed


def test_held_out_batches_count_as_much_as_they_weigh(model):
    losses = []

    class Watcher:
        def scalars(self, step, values):
            losses.extend([values["held_out_loss"]] if "held_out_loss" in values else [])

        def text(self, *_): ...
        def close(self): ...

    rows = np.random.default_rng(1).integers(3, CFG.vocab_size, (3, 8))
    weights = np.ones((3, 8), np.float32)
    weights[2, 3:] = 0
    held_out = [gj.TrainBatch(rows[i : i + 1], weights_BT=weights[i : i + 1]) for i in range(3)]
    beside = gj.Beside(held_out=held_out, watchers=[Watcher()])
    trained = gj.train(model, Batches(), optimizer=optax.sgd(0.1), steps=1, beside=beside)
    whole = gj.loss(trained, rows, weights_BT=weights)
    before = gj.loss(model, rows, weights_BT=weights)
    assert losses == [pytest.approx(float(loss), rel=1e-5) for loss in (before, whole)]


KILLED = """
import os, sys
sys.path[:0] = {path!r}
import runs.test_runs as here, tiny
folder, die, compare = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
model = tiny.model(here.CFG)
def between(position):
    if position == die:
        os._exit(9)
resumed = here.train(model, here.Batches(between=between), 12, folder, resume=True)
if compare:
    here.assert_same(resumed, here.train(model, here.Batches(), 12))
    print("the same")
"""


def process(folder, *, die=-1, compare=False):
    """A run in a process of its own, which ends at once before batch `die`; at the end, `compare`
    holds what came out against a run that was never ended."""
    script = KILLED.format(path=[p for p in sys.path if p])
    command = [sys.executable, "-c", script, str(folder), str(die), str(compare)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def assert_ends_as_if_never_ended(folder):
    ran = process(folder, compare=True)
    out, err = ran.communicate()
    assert (ran.returncode, out) == (0, "the same\n"), err


def test_a_killed_process_loses_nothing(tmp_path):
    ran = process(tmp_path / "run", die=7)
    ran.communicate()
    assert ran.returncode == 9
    assert TrainingStates(tmp_path / "run" / "states").latest in (4, 6)
    assert_ends_as_if_never_ended(tmp_path / "run")


@pytest.mark.nightly
def test_fifty_drawn_moments(tmp_path):
    """Among them some in the middle of a save: every second step is saved."""
    random, killed, folder = np.random.default_rng(0), 0, tmp_path / "0"
    while killed < 50:
        ran, steps = process(folder), folder / METRICS
        before = steps.read_text().count("\n") if steps.exists() else 0
        while ran.poll() is None and not (
            steps.exists() and steps.read_text().count("\n") > before
        ):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.5))
        ran.kill()
        ran.communicate()
        killed += ran.returncode == -signal.SIGKILL
        if ran.returncode == 0:
            assert_ends_as_if_never_ended(folder)
            folder = tmp_path / str(killed)
    assert_ends_as_if_never_ended(folder)
