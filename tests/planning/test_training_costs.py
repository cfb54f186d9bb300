"""Operations of a training step, against those that XLA counts in the compiled one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax import matformer
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.model import abstract_model
from gemma_jax.planning.hardware import peak_operations
from gemma_jax.planning.training_costs import (
    TrainingCosts,
    forward_operations,
    spans_in,
    texts_in,
)
from gemma_jax.runtime import Runtime

# Wide enough that what is no matrix is little, and few layers, which XLA counts all of.
CFG = tiny.gemma3(layers=2, vocab_size=1024, d_model=256, window=64)
ROWS, LENGTH = 2, 64


def counted(parts, length=LENGTH):
    """Operations of loss and gradients of what is trained."""

    def loss(trained, frozen, tokens_BT):
        return gj.next_token(parts.join(trained, frozen), tokens_BT)[0]

    tokens_BT = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower(parts.trained, parts.frozen, tokens_BT)
    return lowered.compile().cost_analysis()["flops"]


def model_of(cfg=CFG):
    runtime = Runtime(attention_impl="reference")
    return abstract_model(cfg, runtime=runtime, layout="unrolled")


def all_of(model):
    return gj.trainable(model)


def half_of(model):
    return gj.trainable(model, lambda path, param: "ffn" in path)


def adapters(model):
    return gj.lora(model, gj.Lora(rank=4))


@pytest.mark.parametrize("choose", [all_of, *nightly(half_of, adapters)])
def test_operations_are_those_that_xla_counts(choose):
    """Within 6 %: XLA counts norms, activations and sums over the vocabulary as well, and masked
    scores; what is said here has the gradient of the first layer's input too many."""
    parts = choose(model_of())
    said = TrainingCosts.of(parts).operations([LENGTH] * ROWS)
    assert said == pytest.approx(counted(parts), rel=0.06)


def test_what_is_frozen_saves_a_third_of_the_matrices():
    model = model_of()
    whole, least = TrainingCosts.of(all_of(model)), TrainingCosts.of(adapters(model))
    factors = sum(np.prod(a.shape) for a in adapters(model).trained.values())
    assert least.per_token - 6 * factors == pytest.approx(whole.per_token * 2 / 3)
    # Attention has gradients either way.
    rest = [costs.operations([100]) - 100 * costs.per_token for costs in (whole, least)]
    assert rest[0] == rest[1] > 0
    forward = forward_operations(model, [100])
    assert forward == pytest.approx(whole.operations([100]) / 3)


def test_windows_and_packed_texts():
    """Pairs of tokens counted one by one."""
    cfg = dataclasses.replace(CFG, layers=CFG.layers[:1])
    costs = TrainingCosts.of(all_of(model_of(cfg)))
    window = cfg.layers[0].window
    each = 12 * cfg.num_heads * cfg.head_dim  # two products of two operations, three times
    for lengths in ([5], [window + 9], [7, 20, window + 1]):
        pairs = sum(min(i + 1, window) for n in lengths for i in range(n))
        scores = costs.operations(lengths) - costs.per_token * sum(lengths)
        assert scores == pytest.approx(each * pairs)
    spans = costs.operations([300], [4, 10]) - costs.operations([300])
    assert spans == pytest.approx(each * (6 + 45))  # those after a token, in its own span


def test_a_slice_costs_what_it_holds():
    cfg = tiny.gemma3n()
    model, half = abstract_model(cfg, layout="unrolled"), [spec.d_ff // 2 for spec in cfg.layers]
    part = matformer.at(model, matformer.Slice(ffn_widths=tuple(half)))
    channels = sum(spec.d_ff for spec in cfg.layers) - sum(half)
    saved = forward_operations(model, [10]) - forward_operations(part, [10])
    assert saved == 10 * 2 * 3 * channels * cfg.d_model  # gate, up and down


def test_texts_and_spans_of_a_batch():
    tokens = np.ones((2, 6), np.int32)
    assert texts_in(Batch(tokens)) == [6, 6]
    positions = np.array([[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5]])
    assert texts_in(Batch(tokens, positions)) == [4, 6]
    documents = np.array([[1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2]])
    assert texts_in(Batch(tokens, positions, documents_BT=documents)) == [2, 2, 5, 1]
    stacked = Batch(tokens[None], positions[None], documents_BT=documents[None])
    assert texts_in(stacked) == [2, 2, 5, 1]
    assert spans_in(None) == []
    assert spans_in(np.array([[0, 1, 1, 0, 2, 2], [3, 3, 3, 0, 0, 0]])) == [2, 2, 3]


def test_peaks_by_the_names_that_jax_gives():
    peaks = {
        "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 1153e12,
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "Tesla T4": 65e12, "NVIDIA L4": 121e12,
    }  # fmt: skip
    for kind, peak in peaks.items():
        assert peak_operations(kind) == pytest.approx(peak, rel=0.005), kind
    for kind in ("cpu", "NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "TPU v4"):
        assert peak_operations(kind) is None
