"""The shipped Gemma 3n holds smaller models: each is as good as the stored results say."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax.config import share_kv
from gemma_jax.experiments.elastic import train
from gemma_jax.matformer import Slice, at, shares_cache
from gemma_jax.weights.tree import map_params

RUN_LONG = True  # programs of this module: see compile_effort
FOLDER = Path(__file__).parents[2] / "checkpoints" / "elastic"
RESULTS = json.loads((FOLDER / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def elastic():
    return gj.load(str(FOLDER))


@pytest.fixture(scope="module")
def held_out_BT(elastic):
    tokenizer = elastic[1]
    text = (FOLDER / "held_out.txt").read_text("utf-8")
    return train.rows(tokenizer, train.encode(tokenizer, [text]))


@pytest.fixture(scope="module")
def losses(elastic, held_out_BT):
    """Nats per token on all of the held-out text."""
    return {
        name: train.measure(*elastic, held_out_BT, submodel)["nats_per_token"]
        for name, submodel in train.SLICES.items()
    }


@pytest.mark.nightly
def test_every_slice_is_as_good_as_stored(losses):
    stored = {name: row["nats_per_token"] for name, row in RESULTS["held_out"].items()}
    assert losses == pytest.approx(stored, abs=0.01)


def test_the_half_slice_is_nearly_as_good_as_the_model(elastic, held_out_BT):
    """By day, on a part of the text: closer to the stored loss than to that of a quarter."""
    stored = {name: row["nats_per_token"] for name, row in RESULTS["held_out"].items()}
    half = train.measure(*elastic, held_out_BT[::4], train.SLICES["half"])["nats_per_token"]
    assert abs(half - stored["half"]) < 0.5 * (stored["quarter"] - stored["half"])


@pytest.mark.nightly
def test_smaller_slices_lose_more(losses):
    assert losses["full"] < losses["shared"] < losses["quarter"]
    assert losses["full"] < losses["half"] < min(losses["quarter"], losses["e2b"])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["half", "e2b"])
def test_a_nested_model_is_nearly_as_good_as_one_trained_alone(losses, name):
    assert losses[name] - RESULTS["separate"][name]["nats_per_token"] < 0.1


@pytest.mark.nightly
def test_the_first_channels_are_the_ones_that_matter(elastic, held_out_BT, losses):
    """Channels in reverse make the same model, but its slices were not trained."""
    model, tokenizer = elastic

    def flipped(param):
        axis = param.dims.find("F")
        whole = param.get_value()
        return whole if axis < 0 else jnp.flip(whole, axis - len(param.dims))

    reverse = map_params(model, flipped)
    for name, least, most in (("full", -1e-3, 1e-3), ("half", 0.2, 99), ("e2b", 0.2, 99)):
        row = train.measure(reverse, tokenizer, held_out_BT, train.SLICES[name])
        assert least < row["nats_per_token"] - losses[name] < most


@pytest.mark.nightly
def test_slices_mostly_write_what_the_model_writes(elastic, held_out_BT):
    shares = train.agreement(*elastic, held_out_BT[::14], train.SLICES)
    assert min(shares[name] for name in ("half", "e2b", "shared")) > 0.5, shares
    assert min(RESULTS["agreement"].values()) > 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("name, temperature", [("e2b", 0.0), ("shared", 0.0), ("shared", 1.0)])
def test_more_than_half_of_the_drafts_are_kept(elastic, name, temperature):
    """With a cache of the draft's own, and with the model's; greedy text is the model's."""
    text = (FOLDER / "held_out.txt").read_text("utf-8")
    prompts = [text[start : start + 250] for start in range(6000, 102_000, 6000)]
    options = dict(max_new_tokens=64, temperature=temperature)
    drafted = gj.generate(*elastic, prompts, draft=train.SLICES[name], draft_tokens=4, **options)
    kept, made = (sum(getattr(d, f"{w}_drafts") for d in drafted) for w in ("accepted", "proposed"))
    assert kept / made > 0.5
    if temperature == 0:
        plain = gj.generate(*elastic, prompts, **options)
        assert [d.token_ids for d in drafted] == [d.token_ids for d in plain]


def test_all_parts_of_gemma_3n_are_there(elastic):
    cfg = elastic[0].cfg
    assert (cfg.altup.num_streams, cfg.laurel_rank, cfg.per_layer.width) == (3, 8, 8)
    assert cfg.v_norm and cfg.final_soft_cap == 30 and not cfg.scale_plus_one
    assert [spec.kind for spec in cfg.layers] == (["local"] * 4 + ["global"]) * 2
    assert [spec.kv for spec in cfg.layers] == [*["own"] * 3, "lent", "lent", *["shared"] * 5]
    assert [spec.sparsity > 0 for spec in cfg.layers] == [True] * 3 + [False] * 7
    assert shares_cache(cfg, train.SLICES["shared"])
    assert not shares_cache(cfg, train.SLICES["e2b"])


def test_nothing_that_is_held_out_is_trained_on():
    texts = train.documents()
    kept, held_out = train.split(texts)
    both = [{p for text in side for p in text.split("\n\n")} for side in (kept, held_out)]
    assert not both[0] & both[1]
    assert 1 / 50 < sum(map(len, held_out)) / sum(map(len, kept)) < 1 / 4


@pytest.mark.nightly
@pytest.mark.parametrize("steps, layers, gain", [(15, 1, 0.7), (60, 4, 1.0)])
def test_training_teaches_the_nested_models_too(elastic, steps, layers, gain):
    """A plain model of few layers, by the script that made the checkpoint."""
    tokenizer = elastic[1]
    cfg = elastic[0].cfg
    specs = [dataclasses.replace(spec, d_ff=64, kv="own") for spec in cfg.layers[3:5] * 2]
    kept = (layers + 1) // 2
    cfg = dataclasses.replace(
        cfg, layers=share_kv(specs[:layers], layers - kept),
        altup=None, laurel_rank=None, per_layer=None,
    )  # fmt: skip
    nested = Slice(ffn_widths=(32,) * kept, skip_layers=tuple(range(kept, layers)))
    ids = train.encode(tokenizer, [(FOLDER / "held_out.txt").read_text("utf-8")])
    model = train.train(tokenizer, cfg, ids, steps=steps, seed=0, nested=nested)
    tokens_BT = train.rows(tokenizer, ids)[:4]
    quarter = Slice(ffn_widths=(16,) * layers)
    for submodel in (Slice.whole(cfg), nested, quarter):
        assert gj.loss(at(model, submodel), tokens_BT) < np.log(cfg.vocab_size) - gain


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 3_000_000
