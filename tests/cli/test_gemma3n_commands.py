"""The commands on Gemma 3n: transformers' numbers, slices written and slices run."""

import json

import numpy as np
import pytest
import tiny
from marks import nightly
from parity.goldens import DATA, assert_close, case
from safetensors.numpy import load_file, save_file

from gemma_checkpoints import save_hf

TEXT = ("batch_left_pad", *nightly("forward", "batch_right_pad"))


def assert_outputs(written, name, which):
    """Every output that is stored is there, to ten times the oracle's own rounding noise."""
    given, expected, tolerance = case(name, which)
    assert len(expected) >= 2 and expected.keys() <= written.keys()
    for output, values in expected.items():
        real = given.get("attention_mask", np.ones((1, 1)))[..., None] if len(given) > 1 else True
        assert_close(written[output], values, tolerance[output], where=real)


@pytest.fixture
def forward(cli, tmp_path):
    def call(model, name, which, *options):
        inputs, output = DATA / name / f"{which}.safetensors", tmp_path / "out.safetensors"
        ran = cli("forward", "--model", model, "--inputs", inputs, "--output", output, *options)
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        return load_file(output)

    return call


@pytest.mark.parametrize("which", TEXT)
def test_forward(forward, which):
    names = "embeddings,layer_outputs,final_norm,per_layer_inputs"
    written = forward(DATA / "g3n_text", "g3n_text", which, "--capture", names)
    assert_outputs(written, "g3n_text", which)
    if which == "forward":
        assert written["layer_outputs"].shape == (20, 4, 1, 36, 48)
        assert written["per_layer_inputs"].shape == (1, 36, 20, 8)


@pytest.mark.nightly
def test_generate(cli):
    file = DATA / "g3n_text" / "generate_left_pad.safetensors"
    expected = load_file(file)["out.gen_ids"]
    ran = cli("generate", "--model", DATA / "g3n_text", "--inputs", file, "--json",
              "--max-new-tokens", expected.shape[1])  # fmt: skip
    assert json.loads(ran.out)["token_ids"] == expected.tolist()


INSIDE = {
    "layer_outputs": (20, 4, 1, 36, 48),
    "altup_predictions": (20, 4, 1, 36, 48),
    "altup_mixtures": (20, 1, 36, 4, 4),
    "altup_gains": (20, 1, 36, 4),
    "laurel": (20, 1, 36, 48),
    "per_layer_gates": (20, 1, 36, 8),
    "attention_weights": (20, 1, 4, 36, 36),
    "sparsity_masks": (5, 1, 36, 128),
}


@pytest.mark.nightly
def test_everything_inside(forward, tmp_path):
    """All captures by name; where layers differ in shape, layer by layer."""
    written = forward(DATA / "g3n_text", "g3n_text", "forward", "--capture", ",".join(INSIDE))
    assert {name: array.shape for name, array in written.items() if name != "logits"} == INSIDE
    (tmp_path / "slice.json").write_text(json.dumps({"ffn_widths": [64] * 2 + [128] * 18}))
    words = ("--slice", tmp_path / "slice.json", "--capture", "sparsity_masks")
    written = forward(DATA / "g3n_text", "g3n_text", "forward", *words)
    widths = [written[f"sparsity_masks.{i}"].shape[-1] for i in range(5)]
    assert widths == [64, 64, 128, 128, 128]


def words_of(name):
    """What the command line calls the slice."""
    facts = json.loads((DATA / name / "forward.json").read_text())
    skipped, widths = facts["layers_to_skip"], facts["ffn_hidden_dims"]
    options = ["--ffn-widths", ",".join(map(str, widths))]
    options += ["--skip-layers", ",".join(map(str, skipped))] if skipped else []
    return options + (["--allow-irregular"] if name == "g3n_off_pattern" else [])


@pytest.mark.parametrize("name", ["g3n_mixed_widths", *nightly("g3n_e2b_like", "g3n_off_pattern")])
def test_slice_as_a_folder_and_in_place(cli, forward, tmp_path, name):
    """Written by `slice`, or run by `--slice` on the whole model: the oracle's numbers."""
    small = tmp_path / "small"
    ran = cli("slice", DATA / "g3n_text", small, *words_of(name))
    assert (ran.code, ran.out, ran.err) == (0, f"{small}\n", "")
    written = forward(small, name, "forward", "--capture", "final_norm")
    assert_outputs(written, name, "forward")

    facts = json.loads((DATA / name / "forward.json").read_text())
    file = tmp_path / "slice.json"
    file.write_text(
        json.dumps({"ffn_widths": facts["ffn_hidden_dims"], "skip_layers": facts["layers_to_skip"]})
    )
    in_place = forward(DATA / "g3n_text", name, "forward", "--slice", file)
    np.testing.assert_array_equal(in_place["logits"], written["logits"])

    if name != "g3n_e2b_like":  # the others write as they should in tests/parity
        return
    inputs = DATA / name / "generate.safetensors"
    expected = load_file(inputs)["out.gen_ids"]
    words = ("--inputs", inputs, "--json", "--max-new-tokens", expected.shape[1])
    ran = cli("generate", "--model", DATA / "g3n_text", "--slice", file, *words)
    assert json.loads(ran.out)["token_ids"] == expected.tolist()


def test_slices_keep_tokenizer_and_dtype(cli, tmp_path):
    options = ("--skip-layers", "10,11,12,13,14", "--ffn-widths", "64", "--dtype", "bfloat16")
    assert cli("slice", DATA / "g3n_text", tmp_path / "x", *options).code == 0
    info = json.loads(cli("info", tmp_path / "x", "--json").out)
    assert (info["layers"], info["d_ff"]) == (15, 64)  # one width is that of all layers
    assert info["file_bytes_by_encoding"].keys() == {"BF16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --preset, or --ffn-widths and --skip-layers"),
        (("--preset", "e2b", "--skip-layers", "1"), "one of the two"),
        (("--preset", "e2b"), "35 layers of E4B; this model has 20"),
        (("--preset", "e9b"), "choose one of: e4b, e2b, e1.96b"),
        (("--ffn-widths", "64,x"), "must be whole numbers"),
        (("--ffn-widths", "64,64"), "2 ffn_widths for 20 kept layers"),
        (("--ffn-widths", "9999"), "illegal slice: width 9999 of 20 layers must lie in [1, 128]"),
        (("--skip-layers", "3"), "of the block of layers 0 to 4 only [3] are skipped"),
        (("--skip-layers", "5,6,7,8,9"), "layer 8 cannot be skipped: later local layers share"),
        (("--skip-layers", "3"), "pattern; --allow-irregular lets single layers through"),
        (("--skip-layers", "9", "--allow-irregular"), "layer 9 cannot be skipped"),
    ],
)
def test_illegal_slices(refused, tmp_path, options, message):
    assert message in refused("slice", DATA / "g3n_text", tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()


def test_slices_that_cannot_be_run(refused, tmp_path):
    (tmp_path / "slice.json").write_text('{"ffn_widths": [1, 2]}')
    words = ("forward", "--model", DATA / "g3n_text", "--output", tmp_path / "o.safetensors")
    words += ("--inputs", DATA / "g3n_text" / "forward.safetensors", "--slice")
    assert "2 ffn_widths for 20 kept layers" in refused(*words, tmp_path / "slice.json")
    assert "unknown slice" in refused(*words, tmp_path / "nothing.json")
    assert "is no slice" in refused(*words, DATA / "g3n_text" / "config.json")


@pytest.mark.nightly
def test_speculation(cli, refused, tmp_path):
    """Both kinds of drafts: the same tokens, and how many drafts were kept."""
    cfg = tiny.gemma3n(6, 2)
    model = save_hf(tiny.model(cfg), tmp_path / "model")
    inputs = tmp_path / "inputs.safetensors"
    save_file({"input_ids": tiny.tokens(cfg, 2, 7)}, inputs)
    words = ("generate", "--model", model, "--inputs", inputs, "--json", "--max-new-tokens", 12)
    plain = json.loads(cli(*words).out)
    for name, submodel in {
        "own": {"ffn_widths": [40] * 6},
        "shared": {"ffn_widths": [48] * 4 + [20] * 2},
    }.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(submodel))
        done = json.loads(cli(*words, "--speculative", file, "--draft-tokens", 2).out)
        assert done["token_ids"] == plain["token_ids"]
        assert 0 < done["accepted_drafts"] < done["proposed_drafts"]
    assert "proposed_drafts" not in plain
    assert "unknown slice 'x'" in refused(*words, "--speculative", "x")
    penalty = ("--speculative", file, "--repetition-penalty", 1.2)
    assert "no repetition penalty" in refused(*words, *penalty)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_features": np.zeros((1, 0, 16), "f4")}, "clips without a single frame"),
        ({"input_features": np.zeros((1, 32, 9), "f4")}, "must be floats [I, T, 16]"),
        ({"input_features_mask": np.ones((1, 31), bool)}, "must be [1, 32], as input_features"),
        ({"input_features_mask": np.zeros((1, 32), bool)}, "without a single real frame"),
        ({"input_features_mask": np.arange(32)[None] % 2}, "must be ones, then zeros"),
        ({"input_features": np.full((1, 32, 16), np.nan, "f4")}, "hold NaN or infinity"),
        ({"input_ids": np.full((1, 4), 5)}, "1 audio clips need 9 places"),
    ],
)
def test_clips_that_cannot_be_heard(refused, stored, tmp_path, changes, message):
    clip = {"input_ids": [[2, 199, *[209] * 9, 208]], "input_features": np.zeros((1, 32, 16), "f4")}
    output = tmp_path / "out.safetensors"
    words = ("forward", "--model", DATA / "g3n_mm", "--inputs", stored(**(clip | changes)))
    assert message in refused(*words, "--output", output)
    assert not output.exists()
