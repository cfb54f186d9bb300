"""The shipped model reads digits it has never seen: the whole path from a picture to an answer."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from marks import nightly

import gemma_jax as gj
from gemma_jax.multimodal.placeholders import soft_tokens

FOLDER = Path(__file__).parents[2] / "checkpoints" / "digits"


@pytest.fixture(scope="module")
def train():
    for needed in ("sklearn", "PIL"):
        pytest.importorskip(needed, reason="pip install 'gemma-jax[notebook,vision]'")
    from gemma_jax.experiments.digits import train

    return train


@pytest.fixture(scope="module")
def digits():
    return gj.load(str(FOLDER))


@pytest.fixture(scope="module")
def measured(train, digits):
    # Other pictures than those of results.json.
    random = np.random.default_rng(2)
    scenes = [train.draw(random, held_out=True) for _ in range(50)]
    return scenes, train.accuracy(*digits, scenes)


def test_answers_questions_about_held_out_digits(measured):
    assert all(share >= 0.9 for share in measured[1].values()), measured[1]


def test_without_its_pictures_it_guesses(train, digits, measured):
    """Each question asked about the picture of another scene: no better than the common answers."""
    scenes, _ = measured
    others = scenes[1:] + scenes[:1]
    swapped = [train.Scene(o.picture, scene.digits) for scene, o in zip(scenes, others)]
    shares = train.accuracy(*digits, swapped)
    assert shares["How many digits?"] < 0.5
    assert all(shares[question] < 0.25 for question in shares if question != "How many digits?")


def test_the_stored_results_hold_and_the_blind_model_is_at_chance():
    results = json.loads((FOLDER / "results.json").read_text("utf-8"))
    assert all(share >= 0.9 for share in results["accuracy"].values())
    blind = results["blind"]
    assert blind.pop("How many digits?") < 0.45
    assert all(share < 0.25 for share in blind.values())


def test_no_held_out_digit_is_trained_on(train):
    """Every scan in a training picture differs from all scans that are held out."""
    random = np.random.default_rng(3)

    def seen(held_out: bool) -> set[bytes]:
        cell, found = 8, set()
        for _ in range(3000):
            picture = train.draw(random, held_out=held_out).picture
            cells = picture.reshape(-1, cell, picture.shape[1] // cell, cell).swapaxes(1, 2)
            found |= {c.tobytes() for c in cells.reshape(-1, cell, cell) if c.any()}
        return found

    assert not seen(False) & seen(True)


def test_the_script_makes_the_shipped_vocabulary(train):
    tokenizer = train.Tokenizer.from_sentencepiece_bytes(train.train_tokenizer())
    shipped = gj.load_tokenizer(str(FOLDER))
    assert all(tokenizer.encode(q) == shipped.encode(q) for q in train.QUESTIONS)


@pytest.mark.nightly
@pytest.mark.parametrize("steps, most", [(15, 4.0), (100, 2.0)])
def test_training_lowers_the_loss(train, digits, monkeypatch, steps, most):
    """On single digits, by the script that made the checkpoint; one layer, or all."""
    _, tokenizer = digits
    cfg = train.config(tokenizer)
    if steps < 100:
        monkeypatch.setattr(train, "BATCH", 8)
        tower = dataclasses.replace(cfg.vision, num_layers=1)
        cfg = dataclasses.replace(cfg, layers=cfg.layers[:1], vision=tower)
    model = train.train(tokenizer, cfg, steps=steps, seed=0)
    tokens, positions, weights, pixels = train.rows(np.random.default_rng(9), tokenizer, cfg, 1)
    batch = gj.Batch(tokens, positions, soft=soft_tokens(model, tokens, pixels))
    assert gj.loss(model, batch, weights_BT=weights) < most


@pytest.mark.parametrize("count, name", [(2, "two"), *nightly((1, "one"), (3, "three"))])
def test_samples(digits, count, name):
    picture = FOLDER / f"{name}.png"
    assert gj.generate(*digits, "How many digits?", images=[picture]).text == str(count)


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 3_000_000
