"""Models cut out of `data/g3n_text` in the MatFormer way: their widths, layers and sharing differ.

Their weights are sliced here, by name, out of the stored model; those that `data/g3n_e2b_like`
stores say that it is done right.
"""

import json
import re

import jax
import numpy as np
import pytest
from marks import nightly
from parity.goldens import DATA, assert_close, case
from safetensors.numpy import load_file, save_file

from gemma_checkpoints import load_weights, save_hf
from gemma_jax import forward, generate

LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")


def sliced_tensors(folder: str) -> dict[str, np.ndarray]:
    """The tensors of `data/g3n_text` that the model in `folder` has, as far as it has them."""
    facts = json.loads((DATA / folder / "forward.json").read_text())
    whole = load_file(DATA / "g3n_text" / "model.safetensors")
    depth = len({match[2] for match in map(LAYER.match, whole) if match})
    kept = [i for i in range(depth) if i not in facts["layers_to_skip"]]
    widths = facts["ffn_hidden_dims"]
    tensors = {}
    for name, array in whole.items():
        if match := LAYER.match(name):
            if int(match[2]) not in kept:
                continue
            layer = kept.index(int(match[2]))
            name = f"{match[1]}{layer}{match[3]}"
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                array = array[: widths[layer]]
            elif name.endswith("down_proj.weight"):
                array = array[:, : widths[layer]]
        elif name == "model.embed_tokens_per_layer.weight":
            array = array.reshape(len(array), depth, -1)[:, kept].reshape(len(array), -1)
        elif name == "model.per_layer_model_projection.weight":
            array = array.reshape(depth, -1, array.shape[1])[kept].reshape(-1, array.shape[1])
        tensors[name] = np.ascontiguousarray(array)
    return tensors


@pytest.fixture(
    scope="module", params=["g3n_off_pattern", *nightly("g3n_e2b_like", "g3n_mixed_widths")]
)
def sliced(request, tmp_path_factory):
    """`(name, model)`."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_bytes((DATA / request.param / "config.json").read_bytes())
    save_file(sliced_tensors(request.param), folder / "model.safetensors")
    return request.param, load_weights(folder, dtype="float32", layout="scan")


def test_the_sliced_tensors_are_the_stored_ones():
    stored = load_file(DATA / "g3n_e2b_like" / "model.safetensors")
    ours = sliced_tensors("g3n_e2b_like")
    assert stored.keys() <= ours.keys()
    assert all((stored[name] == ours[name]).all() for name in stored)


def test_logits(sliced):
    name, model = sliced
    given, expected, tolerance = case(name, "forward")
    out = forward(model, given["input_ids"].astype(np.int32), capture=("final_norm",))
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    assert_close(out.captured["final_norm"], expected["final_norm"], tolerance["final_norm"])


@pytest.mark.nightly
def test_greedy_continuation(sliced):
    name, model = sliced
    given, expected, tolerance = case(name, "generate")
    rows = given["input_ids"].tolist()
    done = generate(model, None, rows, max_new_tokens=expected["gen_ids"].shape[1])
    assert [row.token_ids for row in done] == expected["gen_ids"].tolist()
    log_probs = jax.nn.log_softmax(expected["gen_logits"], axis=-1)
    chosen = np.take_along_axis(log_probs, expected["gen_ids"][..., None], axis=-1)[..., 0]
    assert_close([row.log_probs for row in done], chosen, 2 * tolerance["gen_logits"])


def test_tensors_that_no_layer_uses_come_back_from_the_source(tmp_path):
    source = DATA / "g3n_text"
    out = save_hf(load_weights(source, dtype=None), tmp_path / "out", source=source)
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
