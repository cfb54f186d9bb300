"""Speculation changes how fast text comes, never which: greedy text is equal, sampled text is
distributed alike."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly
from scipy import stats

from gemma_jax import forward, generate
from gemma_jax.inference.sampling import Sampling, SamplingRows, distribution, sample
from gemma_jax.inference.session import Session
from gemma_jax.inference.speculation import SpeculativeSession
from gemma_jax.matformer import Slice, at, shares_cache

CFG = tiny.gemma3n(6, 3)  # windows of 8
DRAFTS = {
    "own cache": Slice(ffn_widths=(24,) * 6),
    "own cache, fewer layers": Slice(ffn_widths=(24,) * 3, skip_layers=(3, 4, 5)),
    "the model's cache": Slice(ffn_widths=(48,) * 3 + (4, 5, 6)),
    "the model's cache, fewer layers": Slice(ffn_widths=(48,) * 3, skip_layers=(3, 4, 5)),
}
PROMPTS = [tiny.tokens(CFG, 1, n, seed=n)[0].tolist() for n in (5, 19, 3)]

# What is not a matter of shared keys and values is asked of a model that compiles faster.
SMALL = tiny.gemma3(2, every=2)
OWN, SHARED = Slice(ffn_widths=(24, 24)), Slice(ffn_widths=(48, 4))


@pytest.fixture(scope="module")
def small():
    return tiny.model(SMALL, "unrolled")


@pytest.fixture(scope="module")
def plain(small):
    return generate(small, None, PROMPTS, max_new_tokens=30)


def assert_same_text(ours, theirs):
    assert [done.token_ids for done in ours] == [done.token_ids for done in theirs]
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)
        assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize(
    "draft",
    [
        "the model's cache, fewer layers",
        *nightly("own cache", "own cache, fewer layers", "the model's cache"),
    ],
)
def test_greedy_text_is_the_models(draft):
    """Far beyond the windows, rows of different lengths, with many drafts thrown away."""
    model = tiny.model(CFG, "unrolled")
    plain = generate(model, None, PROMPTS, max_new_tokens=30)
    assert shares_cache(CFG, DRAFTS[draft]) == ("model's" in draft)
    done = generate(model, None, PROMPTS, max_new_tokens=30, draft=DRAFTS[draft], draft_tokens=3)
    assert_same_text(done, plain)
    assert all(0 < row.accepted_drafts < row.proposed_drafts for row in done)


@pytest.mark.parametrize("draft_tokens", [7, *nightly(1)])
def test_any_number_of_drafts(small, plain, draft_tokens):
    done = generate(small, None, PROMPTS, max_new_tokens=30, draft=OWN, draft_tokens=draft_tokens)
    assert_same_text(done, plain)


@pytest.mark.parametrize("shares", [True, *nightly(False)])
def test_the_model_itself_drafts_what_it_would_choose(small, plain, shares):
    whole = Slice.whole(SMALL)
    done = generate(
        small, None, PROMPTS, max_new_tokens=30, draft=whole if shares else at(small, whole)
    )
    assert_same_text(done, plain)
    for row in done:  # 29 tokens after the first: five are one pass
        assert row.accepted_drafts == row.proposed_drafts == 24


def test_any_other_model_may_draft(small, plain):
    other = tiny.model(tiny.gemma1(), seed=3)
    assert_same_text(generate(small, None, PROMPTS, max_new_tokens=30, draft=other), plain)


def test_stop_ids_end_a_row(small, plain):
    stop = [plain[0].token_ids[12], plain[2].token_ids[7]]
    expected = generate(small, None, PROMPTS, max_new_tokens=30, stop_ids=stop)
    assert {done.finish_reason for done in expected} >= {"stop"}
    for draft in (OWN, Slice.whole(SMALL)):
        done = generate(small, None, PROMPTS, max_new_tokens=30, stop_ids=stop, draft=draft)
        assert_same_text(done, expected)


def test_token_by_token_is_all_at_once(small):
    sampling = Sampling(temperature=1.0)
    sessions = []
    for steps in ([20], range(1, 21)):
        session = SpeculativeSession(small, 2, 48, draft=SHARED, sampling=sampling, seeds=[1, 2])
        session.prefill(PROMPTS[:2], max_new_tokens=20)
        for step in steps:
            chosen = session.decode(step)
            assert all(len(row) == step for row in chosen)
        sessions.append(chosen)
    assert sessions[0] == sessions[1]


def test_rows_do_not_depend_on_each_other(small):
    options = dict(max_new_tokens=20, draft=OWN, temperature=0.9, top_k=20)
    together = generate(small, None, PROMPTS, seed=[1, 2, 3], **options)
    for i in (0, 2):  # of lengths that one program reads
        (alone,) = generate(small, None, [PROMPTS[i]], seed=[1 + i], **options)
        assert alone.token_ids == together[i].token_ids


def pairs(model, prompt, sampling, legal=None):
    """Probability of each pair of second and third token, of ten tokens.

    Args:
      legal: bool `[100, 3, 10]`, tokens that are legal behind each pair's places; `None`: all.
    """
    firsts = np.arange(100)
    rows = np.array([[*prompt, first // 10, first % 10] for first in firsts], np.int32)
    logits = forward(model, rows).logits[:, 2:]
    if legal is not None:
        logits = jnp.where(legal, logits, -jnp.inf)
    p = np.exp(
        distribution(logits, SamplingRows.of([sampling] * 100, 10))
    )  # after the prompt, one, two tokens
    first = p[0, 0]  # [V]
    second = p[::10, 1]  # [first, second]
    third = p[:, 2].reshape(10, 10, 10)  # [first, second, third]
    return np.einsum("a,ab,abc->bc", first, second, third).ravel()


def p_value(seen, probabilities):
    """Of texts counted by pair, by chi-square; rare pairs are one kind."""
    count = seen.sum()
    likely = count * probabilities >= 5
    observed = np.append(seen[likely], seen[~likely].sum())
    expected = np.append(count * probabilities[likely], count * probabilities[~likely].sum())
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1]
        expected *= observed.sum() / expected.sum()
    return stats.chisquare(observed, expected, sum_check=False).pvalue


RULES = {
    "temperature": dict(temperature=1.3),
    "top-k": dict(temperature=1.0, top_k=5),
    "top-p, min-p": dict(temperature=0.8, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize(
    "rules, cfg, draft, sharper",
    [
        ("top-p, min-p", SMALL, OWN, 1),
        *nightly(
            ("temperature", SMALL, OWN, 1),
            ("top-k", CFG, DRAFTS["the model's cache, fewer layers"], 3),
        ),
    ],
    ids=["top-p, min-p", "temperature", "top-k"],
)
def test_sampled_text_is_distributed_as_the_models(rules, cfg, draft, sharper):
    """Second and third token of 2,000 texts against their exact probabilities, by chi-square.

    The draft model's own probabilities would fail the same test by far.
    """
    cfg = replace(cfg, vocab_size=10, final_soft_cap=None)
    model = tiny.model(cfg, "unrolled")
    model.embed.table[...] *= sharper  # differences worth telling apart
    sampling, count, prompt = Sampling(**RULES[rules]), 2000, [3, 5, 7]
    session = SpeculativeSession(
        model, count, 16, draft=draft, draft_tokens=3, sampling=sampling,
        seeds=list(range(count)),
    )  # fmt: skip
    session.prefill([prompt] * count, max_new_tokens=3)
    texts = np.array(session.decode(3))
    seen = np.bincount(texts[:, 1] * 10 + texts[:, 2], minlength=100)
    assert 0.2 < sum(session.accepted) / sum(session.proposed) < 0.98

    assert p_value(seen, pairs(model, prompt, sampling)) > 1e-3
    assert p_value(seen, pairs(at(model, draft), prompt, sampling)) < 1e-6


def test_distribution_is_what_sample_draws_from():
    logits_V = jax.random.normal(jax.random.key(0), (12,)) * 2
    for rules in RULES.values():
        sampling = Sampling(**rules)
        keys_B = jax.random.split(jax.random.key(1), 4000)
        rows = SamplingRows.of([sampling] * 4000, 12)
        drawn_B = sample(jnp.broadcast_to(logits_V, (4000, 12)), keys_B, rows)
        shares = np.bincount(drawn_B, minlength=12) / 4000
        one = SamplingRows.of([sampling], 12)
        p_V = np.exp(distribution(logits_V[None, None], one)[0, 0])
        assert p_V.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(shares, p_V, atol=0.03)
        assert not shares[p_V == 0].any()


def test_what_cannot_be_speculated(small):
    for options, message in (
        (dict(draft_tokens=0), "draft_tokens=0 must be at least 1"),
        (dict(repetition_penalty=1.1), "no repetition penalty"),
        (dict(draft=Slice(ffn_widths=(1,))), "1 ffn_widths for 2 kept layers"),
        (dict(draft=tiny.model(replace(SMALL, vocab_size=97))), "the same vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(small, None, [[1, 2]], **{"draft": Slice.whole(SMALL), **options})


def test_a_plain_session_has_no_slack(small):
    """Rings of plain decoding stay as small as the window."""
    assert Session(small, 1, 64)._state.cache.slack == 0
