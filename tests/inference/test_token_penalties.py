"""Penalties on what was chosen: presence and frequency."""

import numpy as np
import pytest
import tiny

import gemma_jax as gj
from gemma_jax.inference.sampling import SamplingRows, penalised
from gemma_jax.matformer import Slice

CFG = tiny.gemma3(2, every=2)


def test_penalties_come_off_what_was_chosen():
    rules = SamplingRows.of(
        [gj.Sampling(presence_penalty=0.5), gj.Sampling(frequency_penalty=-0.25), gj.Sampling()], 4
    )
    logits_BV = np.ones((3, 4), np.float32)
    counts_BV = np.array([[0, 1, 2, 5]] * 3, np.int32)
    found_BV = penalised(logits_BV, None, rules, counts_BV)
    wanted_BV = [[1, 0.5, 0.5, 0.5], [1, 1.25, 1.5, 2.25], [1, 1, 1, 1]]
    np.testing.assert_allclose(found_BV, wanted_BV)


def test_generation_counts_its_own_tokens_alone():
    model = tiny.model(CFG, "unrolled")
    ids = tiny.tokens(CFG, 1, 9)[0].tolist()
    plain = gj.generate(model, None, ids, max_new_tokens=12)
    done = gj.generate(model, None, ids, max_new_tokens=12, frequency_penalty=2.0)
    assert done.token_ids[0] == plain.token_ids[0]  # of the prompt nothing counts
    text = list(ids)
    for place, token in enumerate(done.token_ids):
        padded = np.array([text + [0] * (24 - len(text))])  # one program
        logits_V = np.array(gj.forward(model, padded).logits[0, len(text) - 1])
        for before in done.token_ids[:place]:
            logits_V[before] -= 2.0
        assert token == logits_V.argmax()
        text.append(token)
    with pytest.raises(ValueError, match="speculation knows no presence or frequency penalty"):
        gj.generate(
            model, None, ids, draft=Slice(ffn_widths=(24, 24)), presence_penalty=1.0,
            max_new_tokens=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="presence_penalty=3 must be between -2 and 2"):
        gj.Sampling(presence_penalty=3)
