"""The step of training that a plan compiles is the one that a run compiles, and is placed alike."""

import re

import jax
import numpy as np
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax.placement import shard
from gemma_jax.planning.training import Step
from gemma_jax.quantisation import quantise
from gemma_jax.runs.config import config_of
from gemma_jax.runs.parts import make_parts
from gemma_jax.runs.planned import planned_training, planned_work
from gemma_jax.sharding import TRAINING, Partition, make_mesh
from gemma_jax.training.placing import batch_shardings, state_shardings

CFG = tiny.gemma3(layers=2)
DATA = {"files": "nowhere.jsonl", "tokens_per_row": 16, "rows": 4}
LOAD = {"dtype": "float32", "attention_impl": "reference"}
BASE = {"model": "tiny", "out": "out", "steps": 3, "data": DATA, "load": LOAD}
PAIRS = {"data": {**DATA, "pairs": True}, "objective": {"name": "dpo"}, "adapter": {"rank": 2}}
RUNS = {
    "full": {"optimizer": {"name": "adafactor", "least_factored": 4}},
    "lora": {"adapter": {"rank": 2, "dora": True}, "micro_batches": 2, "remat": "minimal"},
    "qlora": {"adapter": {"rank": 2}, "load": {**LOAD, "weights": "int8"}},
    "dpo": PAIRS,
    "elastic": {"objective": {"name": "elastic", "widths": [16, 48]}, "frozen": ["embed.*"]},
}


def planned(tables, axes):
    config = config_of({**BASE, **tables})
    mesh = make_mesh(CFG, jax.devices()[: np.prod(list(axes.values()))], **axes)
    partition = Partition.of(mesh, TRAINING)
    work, how = planned_work(config), planned_training(config, None, tables)
    return config, work, Step.of(CFG, work, how, partition), partition


def shapes(tree):
    """Of arrays, and where they lie; equal for equal programs."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (a.shape, a.dtype, a.sharding.shard_shape(a.shape))
        for path, a in leaves
    }


@pytest.mark.parametrize("name", ["lora", *nightly("full", "qlora", "dpo", "elastic")])
def test_a_plan_lowers_what_a_run_lowers(name):
    """Arrays in the one, shapes in the other: the text of the program is the same."""
    config, work, step, partition = planned(RUNS[name], {"fsdp": 2, "tensor": 2})
    model = tiny.model(CFG, attention_impl="reference")
    model = quantise(model, work.weights) if work.weights else model
    model = shard(model, partition.mesh, TRAINING)
    parts, objective, model = make_parts(config, model, lambda: model)
    optimizer = gj.make_optimizer(config.optimizer, model, 3)
    init, take = gj.make_step(objective, optimizer, parts.join, micro_batches=config.micro_batches)
    state = init(parts.trained, jax.random.key(0))
    state = jax.device_put(state, state_shardings(state, partition))
    batch = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), step.batch)
    stacked = int(config.micro_batches > 1)
    batch = jax.device_put(batch, batch_shardings(batch, partition, stacked=stacked))
    assert shapes(state) == shapes(step.state)
    assert shapes(parts.frozen) == shapes(step.made.parts.frozen)
    assert shapes(batch) == shapes(step.batch)
    outputs = (jax.tree.map(lambda a: a.sharding, state), None)
    ours = jax.jit(take, donate_argnums=0, out_shardings=outputs)
    with jax.sharding.use_abstract_mesh(partition.mesh.abstract_mesh):
        run = ours.trace(state, parts.frozen, batch)
    plan = step.traced()
    assert text(run) == text(plan) and run.donate_argnums == plan.donate_argnums


def text(traced):
    """Of a program, without the addresses of functions in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))
