"""ShieldGemma 2: the official prompt, and probabilities that are those of a plain forward pass."""

import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_vocabulary

from gemma_jax import forward, image_prompt, shield
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.model import abstract_model
from gemma_jax.evaluation.shieldgemma import POLICIES, PROMPT
from gemma_jax.multimodal.image_prompt import expand
from gemma_jax.multimodal.placeholders import soft_tokens
from gemma_jax.presets import SIGLIP
from gemma_jax.text import Tokenizer

FILE = Path(__file__).parent / "data" / "shieldgemma.json"
STORED = json.loads(FILE.read_text(encoding="utf-8"))
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
LENGTH = 400  # of one prompt, in the tiny vocabulary, at most
CUSTOM = {"cats": "No Cats: The image shall not show a cat {or two}.", "all": "Nothing."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = PROMPT.format(definition="\n".join([*POLICIES.values(), *CUSTOM.values()]))
    return Tokenizer.from_sentencepiece_bytes(tiny_vocabulary.train(700, text))


@pytest.fixture(scope="module")
def model(tokenizer):
    vision = tiny.vision(
        image_token=tokenizer.vocab_size,
        start_token=tokenizer.id_of("<start_of_image>"),
        end_token=tokenizer.id_of("<end_of_image>"),
    )
    cfg = tiny.gemma3(3, vocab_size=tokenizer.vocab_size, vision=vision)
    shapes, rng = abstract_model(cfg), np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.array(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("stored", STORED["prompts"], ids=lambda stored: stored["policy"])
def test_official_prompts(stored):
    assert PROMPT.format(definition=POLICIES[stored["policy"]]) == stored["rendered"]


def test_every_official_policy_is_there():
    assert [stored["policy"] for stored in STORED["prompts"]] == [*POLICIES]


@pytest.mark.parametrize("stored", STORED["prompts"], ids=lambda stored: stored["policy"])
def test_official_ids(real_tokenizer, stored):
    ids = expand(real_tokenizer, stored["rendered"], [0], SIGLIP)
    assert [[i, len(list(run))] for i, run in groupby(ids)] == stored["ids"]
    assert (real_tokenizer.id_of("Yes"), real_tokenizer.id_of("No")) == (10784, 3771)


@pytest.mark.parametrize("policies", [POLICIES, CUSTOM])
def test_probabilities_are_those_of_a_forward_pass(model, tokenizer, policies):
    """One policy at a time, padded on the other side, with an encoding of the image of its own."""
    verdicts = shield(model, tokenizer, IMAGE, policies)
    assert [*verdicts] == [*policies]
    for name, definition in policies.items():
        text = PROMPT.format(definition=definition)
        prompt = image_prompt(tokenizer, text, [IMAGE], model.cfg.vision)
        padding = LENGTH - len(prompt.token_ids)
        tokens_BT = jnp.array([[0] * padding + prompt.token_ids])
        positions_BT = jnp.maximum(jnp.arange(LENGTH) - padding, -1)[None]
        soft = soft_tokens(model, tokens_BT, prompt.pixels)
        logits = forward(model, Batch(tokens_BT, positions_BT, soft=soft)).logits[0, -1]
        yes, no = (float(logits[tokenizer.id_of(answer)]) for answer in ("Yes", "No"))
        expected = 1 / (1 + np.exp(no - yes))
        assert verdicts[name].yes == pytest.approx(expected, abs=1e-5)
        assert verdicts[name].yes + verdicts[name].no == pytest.approx(1)


def test_choice_of_policies(model, tokenizer):
    """What is judged beside a policy does not change its verdict."""
    every = shield(model, tokenizer, IMAGE)
    for names in ("violence", ["violence", "dangerous"], ["violence"]):
        some = shield(model, tokenizer, IMAGE, names)
        assert [*some] == ([names] if isinstance(names, str) else names)
        assert all(
            verdict.yes == pytest.approx(every[n].yes, abs=1e-5) for n, verdict in some.items()
        )


def test_the_image_counts(model, tokenizer):
    verdicts = [shield(model, tokenizer, image, "sexual") for image in (IMAGE, 255 - IMAGE)]
    assert verdicts[0] != verdicts[1]


@pytest.mark.parametrize(
    ("policies", "match"),
    [
        (["hate"], "unknown policy 'hate'; choose from dangerous, sexual, violence"),
        ("hate", "unknown policy 'hate'"),
        ([], "no policy given"),
        ({}, "no policy given"),
    ],
)
def test_refused_policies(model, tokenizer, policies, match):
    with pytest.raises(ValueError, match=match):
        shield(model, tokenizer, IMAGE, policies)


def test_refused_models_and_images(model, tokenizer):
    with pytest.raises(ValueError, match="has no vision tower"):
        shield(SimpleNamespace(cfg=tiny.gemma3()), tokenizer, IMAGE)
    with pytest.raises(ValueError, match="no image"):
        shield(model, tokenizer, b"no image")
