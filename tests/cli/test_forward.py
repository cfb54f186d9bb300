"""`gemma-jax forward`: transformers' numbers, as an outsider would check them."""

import errno
import json
import re
import shutil
import tempfile

import numpy as np
import pytest
from marks import nightly
from parity.goldens import DATA
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

CAPTURES = ("embeddings", "layer_outputs", "final_norm")


@pytest.fixture(scope="session")
def legacy(tmp_path_factory):
    """The same model, its config in the spelling of the published files."""
    folder = tmp_path_factory.mktemp("legacy")
    shutil.copy(DATA / "g3_text" / "config_legacy.json", folder / "config.json")
    shutil.copy(DATA / "g3_text" / "model.safetensors", folder)
    return folder


@pytest.fixture
def forward(cli, tmp_path):
    """`forward(model, inputs, *options)` returns what the command wrote."""

    def call(model, inputs, *options) -> dict[str, np.ndarray]:
        output = tmp_path / "out.safetensors"
        words = ("--model", model, "--inputs", inputs, "--output", output)
        ran = cli("forward", *words, *options)
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        assert not list(tmp_path.glob(".out*"))
        arrays = load_file(output)
        assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
        return arrays

    return call


def noise(file) -> dict[str, float]:
    """Output -> rounding noise of the stored numbers."""
    outputs = json.loads(file.with_suffix(".json").read_text())["outputs"].items()
    levels = {k: max(o["noise_fp64"], o["noise_alt"]) for k, o in outputs if "noise_fp64" in o}
    return {name: max(level, 5e-7) for name, level in levels.items()}  # a product has a little


TEXT_CASES = ("g3_text/forward", "g3_text/batch_left_pad", "g3_text/batch_right_pad")


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (TEXT_CASES[1], "config_legacy"),
        *nightly(
            ("g3_mm/forward_text_only", "config"),
            *((case, "config") for case in TEXT_CASES),
            *((case, "config_legacy") for case in (TEXT_CASES[0], TEXT_CASES[2])),
        ),
    ],
)
def test_all_outputs_as_in_transformers(forward, legacy, case, config):
    file = DATA / f"{case}.safetensors"
    model = legacy if config == "config_legacy" else file.parent
    stored, bound = load_file(file), noise(file)
    names = [name for name in ("logits", *CAPTURES) if f"out.{name}" in stored]
    actual = forward(model, file, "--capture", ",".join(CAPTURES))
    assert actual.keys() == {"logits", *CAPTURES}
    real = stored.get("in.attention_mask", np.ones_like(stored["in.input_ids"]))[..., None]
    assert len(names) >= 2
    for name in names:
        error = np.abs(actual[name] - stored[f"out.{name}"]) * real
        assert error.max() <= 10 * bound[name], name


VISION = {
    "vision.layer_outputs": "vision_layer_outputs",
    "vision.tower": "vision_last_hidden_state",
    "vision.soft_tokens": "projector_output",
}


def test_images_as_in_transformers(forward):
    file = DATA / "g3_mm" / "forward.safetensors"
    stored, bound = load_file(file), noise(file)
    actual = forward(file.parent, file, "--capture", ",".join([*CAPTURES, *VISION]))
    theirs = {name: VISION.get(name, name) for name in actual}
    assert set(theirs.values()) == {key[4:] for key in stored if key.startswith("out.")}
    for ours, name in theirs.items():
        assert np.abs(actual[ours] - stored[f"out.{name}"]).max() <= 10 * bound[name], ours


@pytest.mark.nightly
def test_images_of_a_padded_batch(forward, tmp_path):
    """Two rows, the images in the other one, padding in front: the row alone gives the same."""
    file = DATA / "g3_mm" / "forward.safetensors"
    stored = load_file(file)
    given = {key[3:]: value for key, value in stored.items() if key.startswith("in.")}
    pad = ((1, 0), (3, 0))  # a row of text above, three places of padding in front
    batch = {key: np.pad(given[key], pad) for key in given if key != "pixel_values"}
    batch["input_ids"][0, 3:], batch["attention_mask"][0, 3:] = 7, 1
    batch["position_ids"] = np.maximum(np.cumsum(batch["attention_mask"], axis=1) - 1, 0)
    save_file(batch | {"pixel_values": given["pixel_values"]}, tmp_path / "in.safetensors")
    actual = forward(file.parent, tmp_path / "in.safetensors")["logits"][1, 3:]
    assert np.abs(actual - stored["out.logits"][0]).max() <= 10 * noise(file)["logits"]


@pytest.mark.nightly
def test_a_tower_in_float32(forward):
    file = DATA / "g3_mm" / "forward.safetensors"
    options = ("--capture", "vision.soft_tokens", "--dtype", "bfloat16")
    expected = load_file(file)["out.projector_output"]
    narrow, wide = (
        np.abs(forward(file.parent, file, *options, *more)["vision.soft_tokens"] - expected).max()
        for more in ((), ("--vision-dtype", "float32"))
    )
    assert wide <= 10 * noise(file)["projector_output"] < narrow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "8 places for soft tokens, but no pixel_values"),
        ({"pixel_values": np.zeros((1, 3, 56, 56), "f4")}, "1 images need 4 places .* are 8"),
        ({"pixel_values": np.zeros((2, 3, 28, 28), "f4")}, r"must be floats \[I, 3, 56, 56\]"),
        ({"token_type_ids": np.zeros((1, 3), "i8")}, r"token_type_ids \[1, 3\] must match"),
        ({"input_features": np.zeros((1, 3), "f4")}, "input_features given, .* no audio tower"),
        ({"input_values": np.zeros((1, 3), "f4")}, "cannot use input_values"),
    ],
)
def test_inputs_that_do_not_fit_the_model(refused, tmp_path, change, message):
    stored = load_file(DATA / "g3_mm" / "forward.safetensors")
    given = {key[3:]: value for key, value in stored.items() if key.startswith("in.")} | change
    file = tmp_path / "in.safetensors"
    save_file({key: value for key, value in given.items() if value is not None}, file)
    output = tmp_path / "out.safetensors"
    error = refused("forward", "--model", DATA / "g3_mm", "--inputs", file, "--output", output)
    assert re.search(message, error)
    assert not output.exists()


def test_images_for_a_model_that_reads_text_alone(refused, tmp_path):
    output = tmp_path / "out.safetensors"
    words = ("forward", "--model", DATA / "g3_text", "--output", output, "--inputs")
    assert "has no vision tower" in refused(*words, DATA / "g3_mm" / "forward.safetensors")
    capture = ("--capture", "vision.tower")
    assert "no vision tower" in refused(*words, DATA / "g3_text" / "forward.safetensors", *capture)


@pytest.mark.nightly
def test_labels_change_nothing(forward, mute):
    file = DATA / "g3_text" / "gradients.safetensors"
    stored = load_file(file)
    logits = forward(mute, file)["logits"][:, :-1].astype(np.float64)
    labels = stored["in.labels"][:, 1:]
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    loss = (log_z - chosen)[labels != -100].mean()
    assert abs(loss - stored["out.loss"].item()) <= 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize("numerics", ["hf", "gdm"])
def test_bfloat16_is_as_good_as_the_reference(forward, mute, numerics):
    file = DATA / "g3_text" / "forward_bf16.safetensors"
    stored = load_file(file)
    exact = stored["out.logits_fp32"]
    reference = np.abs(stored["out.logits_bf16"] - exact).mean()
    actual = forward(mute, file, "--dtype", "bfloat16", "--numerics", numerics)["logits"]
    assert 0 < np.abs(actual - exact).mean() <= 1.5 * reference


@pytest.mark.nightly
def test_numerics_agree_in_float32(forward, mute):
    file = DATA / "g3_text" / "forward.safetensors"
    actual = forward(mute, file, "--numerics", "gdm")["logits"]
    error = np.abs(actual - load_file(file)["out.logits"]).max()
    assert error <= 10 * noise(file)["logits"]


def test_attention_weights_sum_to_one(forward, mute, stored):
    file = stored(input_ids=[[2, 5, 6, 7]])
    weights = forward(mute, file, "--capture", "attention_weights")["attention_weights"]
    assert weights.shape[:2] == (7, 1)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_names_may_do_without_prefix(forward, mute, stored):
    prefixed = forward(mute, stored(**{"in.input_ids": [[2, 5, 6, 7]]}))["logits"]
    assert np.array_equal(prefixed, forward(mute, stored(input_ids=[[2, 5, 6, 7]]))["logits"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[1, 320]]}, "must lie in [0, 320)"),
        ({"input_ids": [[1, -1]]}, "must lie in [0, 320)"),
        ({"input_ids": [1, 2]}, "must hold integer input_ids [B, T]"),
        ({"input_ids": [[1.0, 2.0]]}, "must hold integer input_ids [B, T]"),
        ({"input_ids": np.zeros((0, 3), np.int64)}, "must hold integer input_ids [B, T]"),
        ({"labels": [[1, 2]]}, "must hold integer input_ids [B, T]"),
        ({"input_ids": [[1, 2]], "pixel_values": [0.0]}, "this model has no vision tower"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "row 0 has 2 runs of ones"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1], [0]]}, "row 1 has 0 runs of ones"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "must match input_ids [1, 2]"),
        ({"input_ids": [[1, 2]], "position_ids": [[0]]}, "must match input_ids [1, 2]"),
        ({"input_ids": [[1, 2]], "position_ids": [[0, 0]]}, "packed sequences"),
    ],
)
def test_wrong_inputs(refused, mute, stored, tmp_path, inputs, message):
    words = ("--inputs", stored(**inputs), "--output", tmp_path / "out")
    assert message in refused("forward", "--model", mute, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe hello, world", b"\0" * 100])
def test_inputs_that_are_no_safetensors(refused, mute, tmp_path, content):
    (tmp_path / "in").write_bytes(content)
    words = ("--inputs", tmp_path / "in", "--output", tmp_path / "out")
    assert "no readable safetensors file" in refused("forward", "--model", mute, *words)


def test_unknown_capture(refused, mute, stored, tmp_path):
    words = ("--inputs", stored(input_ids=[[1]]), "--output", tmp_path / "out")
    error = refused("forward", "--model", mute, *words, "--capture", "final_norm,x")
    assert "cannot capture x; choose from embeddings" in error


@pytest.mark.parametrize(
    ("output", "message"), [("no/out", "No such folder"), (".", "is a directory")]
)
def test_output_nowhere(refused, stored, tmp_path, output, message):
    """Said before the model is looked for."""
    words = ("--inputs", stored(input_ids=[[1]]), "--output", tmp_path / output)
    assert message in refused("forward", "--model", "nothing", *words)


def test_output_not_permitted(refused, mute, stored, tmp_path, monkeypatch):
    def fail(**_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out"))

    words = ("--inputs", stored(input_ids=[[1]]), "--output", tmp_path / "out")
    monkeypatch.setattr(tempfile, "mkstemp", fail)
    assert "Permission denied" in refused("forward", "--model", mute, *words, code=1)


def test_full_disk_keeps_the_old_output(refused, mute, stored, tmp_path, monkeypatch):
    def fail(arrays, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    inputs, output = stored(input_ids=[[1, 2]]), tmp_path / "out"
    output.write_text("old")
    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    words = ("--inputs", inputs, "--output", output)
    error = refused("forward", "--model", mute, *words, code=1)
    assert error.startswith(str(output)) and "No space left" in error
    assert output.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "inputs.safetensors"}
