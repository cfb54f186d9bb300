"""Folders of PEFT, in and out: every spelling is read, and what does not fit is refused by name."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parity.goldens import DATA
from safetensors.numpy import load_file, save_file

import gemma_jax as gj
from gemma_checkpoints import CheckpointError, load_adapter, load_weights, save_adapter
from gemma_checkpoints.hf.adapters import read_adapter
from gemma_checkpoints.hf.peft_config import CONFIG, WEIGHTS
from gemma_checkpoints.hf.peft_rules import PeftRules
from gemma_jax.adapters import Adapter, Factors, adapt, factors_of
from gemma_jax.training.lora import Lora

CFG = tiny.gemma3(layers=3)
SEEING = tiny.gemma3(layers=3, vision=tiny.vision())


def filled(model, settings, seed=1):
    """A model with adapters that matter."""
    rng = np.random.default_rng(seed)
    new = factors_of(gj.lora(model, settings).join(*gj.lora(model, settings)[:2]))

    def factors(one):
        b = 0.3 * rng.standard_normal(one.b.shape).astype(np.float32)
        magnitude = one.magnitude
        if magnitude is not None:
            magnitude = magnitude * (1 + 0.3 * rng.random(magnitude.shape, np.float32))
        return Factors(one.a, b, one.scale, magnitude)

    own_head = model.cfg.tied_head and not settings.tie_head and "embed.table" in new
    return adapt(model, Adapter({n: factors(one) for n, one in new.items()}, own_head=own_head))


def changed(folder, tmp_path, config=None, key=lambda key: key):
    """A copy of a folder with other keys, which are left out where they are `None`."""
    target = tmp_path / "changed"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    said = json.loads((folder / CONFIG).read_text()) | (config or {})
    (target / CONFIG).write_text(json.dumps(said))
    arrays = {key(name): array for name, array in load_file(folder / WEIGHTS).items()}
    save_file({name: a for name, a in arrays.items() if name is not None}, target / WEIGHTS)
    return target


def assert_same_factors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        np.testing.assert_array_equal(one.a, theirs[name].a)
        np.testing.assert_array_equal(one.b, theirs[name].b)
        assert one.scale == pytest.approx(theirs[name].scale, rel=1e-6)
        if one.magnitude is not None:
            np.testing.assert_allclose(one.magnitude, theirs[name].magnitude, rtol=1e-5)


SETTINGS = {
    "patterns": Lora(rank=3, rank_pattern={"*.q.w": 2}, alpha_pattern={"*.ffn.*": 5.0}),
    "some layers": Lora(rank=2, layers=(0, 2)),
    "dora, rslora": Lora(rank=2, dora=True, rslora=True, target_modules=("o_proj", "up_proj")),
    "expression": Lora(rank=2, target_modules=r".*layers\.(0|2)\.mlp\.\w+_proj"),
    "embedding": Lora(rank=2, targets=("embed.table",)),
    "tied": Lora(rank=2, targets=("embed.table",), tie_head=True),
    "head": Lora(rank=2, target_modules=("lm_head", "q_proj")),
}


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_goes_out_comes_back(name, layout, tmp_path):
    model = tiny.model(CFG, layout)
    adapted = filled(model, SETTINGS[name])
    save_adapter(adapted, tmp_path / "a", SETTINGS[name])
    again = load_adapter(model, tmp_path / "a")
    assert again.cfg == adapted.cfg
    assert_same_factors(factors_of(again), factors_of(adapted))
    said = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (said["use_dora"], said["use_rslora"]) == 2 * ("dora" in name,)
    assert said["ensure_weight_tying"] == (name == "tied")


def test_parameters_that_were_trained_whole(tmp_path):
    model = tiny.model(CFG)
    for settings in (
        Lora(rank=2, whole=("final_norm.scale", "*.q_norm.scale")),
        Lora(rank=2, target_modules=("q_proj",), whole=("norm",)),
    ):
        trained, frozen, join = gj.lora(model, settings)
        own = {path: value + (path[-1] == "scale") for path, value in trained.items()}
        folder = save_adapter(join(own, frozen), tmp_path / settings.whole[0], settings)
        again, whole = load_adapter(model, folder), read_adapter(model, folder).whole
        jax.tree.map(np.testing.assert_array_equal, again, join(own, frozen))
        # By PEFT's rule "norm" is the end of every norm's name.
        assert len(whole) == {"final_norm.scale": 4, "norm": 1 + 3 * 6}[settings.whole[0]]


KEYS = {
    "seeing": Lora(rank=2, target_modules=("q_proj", "fc1")),
    "text": Lora(rank=2, targets=("blocks.0.*", "embed.table")),
}


def test_files_and_keys_are_those_of_peft(tmp_path):
    """`data/adapters/keys.json`: what PEFT 0.21.2 wrote after it had read what we write here."""
    stored = json.loads((DATA / "adapters" / "keys.json").read_text())
    for name, settings in KEYS.items():
        model = tiny.model(SEEING if name == "seeing" else CFG)
        folder = save_adapter(filled(model, settings), tmp_path / name, settings)
        assert sorted(load_file(folder / WEIGHTS)) == stored[name]
    fields = json.loads((folder / CONFIG).read_text())
    assert fields.keys() == set(stored["fields"])


PREFIX = "base_model.model.model.language_model."
SPELLINGS = {
    "text": lambda key: key.replace(PREFIX, "base_model.model.model."),
    "before 4.52": lambda key: (
        key.replace(PREFIX, "base_model.model.language_model.model.")
        .replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.")
        .replace("vision_tower.", "vision_tower.vision_model.")
    ),
    "named": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_read(name, tmp_path):
    model = tiny.model(SEEING)
    targets = ("q_proj",) if name != "text" else r"model\.layers.*q_proj"
    named = ("q_proj",) if name != "text" else r".*language_model.*q_proj"
    adapted = filled(model, Lora(rank=2, target_modules=named))
    folder = save_adapter(adapted, tmp_path / "a", Lora(rank=2, target_modules=named))
    config = {"target_modules": targets if isinstance(targets, str) else list(targets)}
    again = changed(folder, tmp_path, config, SPELLINGS[name])
    assert_same_factors(factors_of(load_adapter(model, again)), factors_of(adapted))


def test_text_adapters_fit_a_model_that_sees_and_back(tmp_path):
    """A list of names means towers in the class that has them, and in the other it does not."""
    seeing, text, settings = tiny.model(SEEING), tiny.model(CFG), Lora(rank=2)
    by_name = Lora(rank=2, target_modules=("q_proj", "v_proj"))
    of_text = filled(text, by_name)
    folder = save_adapter(of_text, tmp_path / "text", by_name)
    assert_same_factors(factors_of(load_adapter(seeing, folder)), factors_of(of_text))
    of_seeing = filled(seeing, settings)
    folder = save_adapter(of_seeing, tmp_path / "seeing", settings)
    assert_same_factors(factors_of(load_adapter(text, folder)), factors_of(of_seeing))
    with_tower = filled(seeing, by_name)
    folder = save_adapter(with_tower, tmp_path / "tower", by_name)
    with pytest.raises(CheckpointError, match="and 7 more are for the image tower, which this"):
        load_adapter(text, folder)
    decoder = load_adapter(text, folder, only_decoder=True)
    found = {n: f for n, f in factors_of(with_tower).items() if not n.startswith("vision")}
    assert_same_factors(factors_of(decoder), found)


def test_shared_keys_and_values_have_no_factors_and_old_files_do(tmp_path):
    model = tiny.model(tiny.gemma3n(4, 1))
    settings = Lora(rank=2, target_modules=("q_proj", "k_proj", "linear_left"))
    adapted = filled(model, settings)
    folder = save_adapter(adapted, tmp_path / "a", settings)
    arrays = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.{}.self_attn.k_proj.lora_{}.weight"
    shared = {name.format(3, kind): arrays[name.format(0, kind)] for kind in "AB"}
    assert not shared.keys() & arrays.keys()
    save_file(arrays | shared, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"layers\.3\..* and 1 more ignored"):
        again = load_adapter(model, folder)
    assert_same_factors(factors_of(again), factors_of(adapted))


def test_what_does_not_fit_is_refused_with_both_lists(tmp_path):
    model, settings = tiny.model(CFG), Lora(rank=2, target_modules=("q_proj", "v_proj"))
    folder = save_adapter(filled(model, settings), tmp_path / "a", settings)

    def problems(config=None, key=lambda key: key):
        with pytest.raises(CheckpointError) as error:
            load_adapter(model, changed(folder, tmp_path, config, key))
        return error.value.problems

    unknown = problems(key=lambda key: key.replace("layers.1.self_attn.q_proj", "layers.1.q_proj"))
    assert [line.partition(": ")[2] for line in unknown] == 2 * [
        "this model has nothing that it fits"
    ] + [f"{CONFIG} means it, but the file has no factors"]
    assert "layers.1.q_proj" in unknown[0] and "layers.1.self_attn.q_proj" in unknown[2]
    (half,) = problems(key=lambda key: None if "layers.2.self_attn.v_proj.lora_B" in key else key)
    assert half.endswith("v_proj: has a; expected a, b")
    deep = problems(key=lambda key: key.replace("layers.2.self_attn.q", "layers.7.self_attn.q"))
    assert [line.endswith("this model has nothing that it fits") for line in deep[:2]] == 2 * [True]
    (rank, *_) = problems({"rank_pattern": {"q_proj": 3}})
    assert rank.endswith("q_proj: a has shape [2, 32]; expected [3, 32]")
    (extra, *_) = problems({"target_modules": ["q_proj"]})
    assert extra.endswith(f"v_proj: the file has factors, but {CONFIG} means no such")
    (dora, *_) = problems({"use_dora": True})
    assert dora.endswith("has a, b; expected a, b, magnitude")
    whole = problems({"modules_to_save": ["final_norm", "model.norm"]})
    assert whole == ("model.norm.weight: in modules_to_save, but not in the file",)


REFUSED = {
    "peft_type": "LOHA",
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.w"],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "megatron_config": {"a": 1},
    "of_the_future": 3,
    "r": 0,
    "lora_alpha": "8",
    "rank_pattern": {"q_proj": 1.5},
    "target_modules": "([",
    "layers_to_transform": "all",
    "use_rslora": "yes",
}


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_are_not_supported_are_refused_by_name(field, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], field: REFUSED[field]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_adapter(tiny.model(CFG), tmp_path)
    text = str(error.value)
    assert "\n" not in text and (field in text or repr(REFUSED[field]) in text)


def test_fields_that_change_nothing_pass(tmp_path):
    model, settings = tiny.model(CFG), Lora(rank=2, target_modules=("q_proj",))
    folder = save_adapter(filled(model, settings), tmp_path / "a", settings)
    silent = {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "of_the_future": None,
              "base_model_name_or_path": "x", "loftq_config": {}, "task_type": None}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_adapter(model, changed(folder, tmp_path, silent))
    jax.tree.map(np.testing.assert_array_equal, loaded, load_adapter(model, folder))
    assert any(np.any(one.b) for one in factors_of(loaded).values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"no PEFT adapter: {CONFIG} is missing"):
        load_adapter(tiny.model(CFG), tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing beside {CONFIG}"):
        load_adapter(tiny.model(CFG), tmp_path)


def test_the_rules_are_those_of_peft():
    """`check_target_module_exists` and `get_pattern_key` of PEFT 0.21."""
    path = "model.language_model.layers.3.self_attn.q_proj"
    for rules, meant in (
        (dict(target_modules=["q_proj"]), True),
        (dict(target_modules=["proj"]), False),  # a dot stands before the name
        (dict(target_modules=["self_attn.q_proj"]), True),
        (dict(target_modules="q_proj"), False),  # one text is an expression for all of the path
        (dict(target_modules=r".*layers\.\d\..*q_proj"), True),
        (dict(target_modules=["q_proj"], exclude_modules=["layers.3.self_attn.q_proj"]), False),
        (dict(target_modules=["q_proj"], modules_to_save=["self_attn"]), False),
        (dict(target_modules=["q_proj"], layers_to_transform=[3]), True),
        (dict(target_modules=["q_proj"], layers_to_transform=2), False),
        (dict(target_modules=["q_proj"], layers_to_transform=[3], layers_pattern="blocks"), False),
        (dict(target_modules=["q_proj"], layers_to_transform=[3], layers_pattern=["layers"]), True),
    ):
        assert PeftRules(2, 4, **rules).targets(path) == meant, rules
    ranks = PeftRules(2, 4, rank_pattern={"k_proj": 9, r"layers\.3\..*": 5, "q_proj": 7})
    assert ranks.rank(path) == 5  # the first that fits
    assert PeftRules(4, 6, alpha_pattern={"q_proj": 8}, use_rslora=True).scale(path) == 4.0
    saved = PeftRules(2, 4, modules_to_save=["norm"])
    assert saved.saves("model.layers.0.input_layernorm") and not saved.saves("model.normal.w")


def test_a_tied_head_that_is_not_is_refused(tmp_path):
    model, settings = tiny.model(CFG), SETTINGS["tied"]
    folder = save_adapter(filled(model, settings), tmp_path / "a", settings)
    arrays = load_file(folder / WEIGHTS)
    name = next(name for name in arrays if "lm_head.lora_A" in name)
    save_file(arrays | {name: arrays[name] + 1}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="lm_head a differs from that of embed_tokens"):
        load_adapter(model, folder)


def test_narrow_factors_are_read_in_full(tmp_path):
    model, settings = tiny.model(CFG), Lora(rank=2, target_modules=("q_proj",))
    folder = save_adapter(filled(model, settings), tmp_path / "a", settings)
    arrays = load_file(folder / WEIGHTS)
    save_file({k: a.astype(jnp.bfloat16) for k, a in arrays.items()}, folder / WEIGHTS)
    for one in factors_of(load_adapter(model, folder)).values():
        assert one.a.dtype == one.b.dtype == np.float32


def test_adapted_models_are_not_saved_as_plain_ones(tmp_path):
    adapted = filled(tiny.model(CFG), Lora(rank=2))
    for format in ("hf", "orbax"):
        with pytest.raises(ValueError, match="merge the adapters, or save them alone"):
            gj.save(adapted, None, tmp_path / format, format=format)


def test_peft_reads_what_we_save(tmp_path):
    """With PEFT and transformers at hand: its logits are ours."""
    torch = pytest.importorskip("torch", reason="PEFT runs in torch: pip install torch peft")
    peft = pytest.importorskip("peft", reason="read by PEFT itself: pip install peft")
    transformers = pytest.importorskip("transformers", reason="PEFT needs transformers")
    model = load_weights(DATA / "g3_text", dtype="float32")
    settings = Lora(rank=2, dora=True, target_modules=("q_proj", "o_proj", "down_proj"))
    adapted = filled(model, settings)
    folder = save_adapter(adapted, tmp_path / "a", settings, base=str(DATA / "g3_text"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        DATA / "g3_text", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    ids = np.array([[2, 5, 7, 100, 33, 12]])
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(gj.forward(adapted, ids).logits, expected, atol=1e-4)
