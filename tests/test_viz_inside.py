"""Plots of a model's inside hold the arrays that they are given; read back from the axes."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_imports import ROOT

import gemma_jax as gj
from gemma_jax.multimodal.placeholders import soft_tokens

WORDS = ["<bos>", "How", "␣many", "␣digits", "?"]


@pytest.fixture
def plt():
    """matplotlib, whose figures are closed again."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="pip install 'gemma-jax[notebook]'")
    yield plt
    plt.close("all")


@pytest.fixture(scope="module")
def digits():
    return gj.load(str(ROOT / "checkpoints" / "digits"))


@pytest.fixture(scope="module")
def lens(digits):
    model, tok = digits
    rows = [tok.encode("Read the digits.", bos=True), tok.encode("How many digits?", bos=True)]
    return gj.logit_lens(model, gj.Batch.padded(rows, 6), top_k=2)


def names(labels) -> list[str]:
    return [label.get_text() for label in labels]


def colour_bar(figure):
    """The axes of the figure's one colour bar."""
    (bar,) = (ax for ax in figure.axes if ax.get_label() == "<colorbar>")
    return bar


def test_the_lens_shows_each_layers_likeliest_token(plt, digits, lens):
    _, tok = digits
    ax = gj.viz.plot_logit_lens(lens, tok, WORDS, row=1)
    (heat,) = ax.images
    np.testing.assert_array_equal(heat.get_array(), lens.probs_LBTX[:, 1, :5, 0])
    assert heat.origin == "lower" and heat.get_clim() == (0, 1)
    shown = {text.get_position(): text.get_text() for text in ax.texts}
    ids = np.asarray(lens.ids_LBTX[:, 1, :5, 0])
    expected = {(t, l): gj.viz.token_labels(tok, [i])[0] for (l, t), i in np.ndenumerate(ids)}
    assert shown == expected and len(set(shown.values())) > 2
    assert names(ax.get_xticklabels()) == WORDS
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("token", "layer")
    assert colour_bar(ax.figure).get_ylabel() == "probability of the token"
    other = gj.viz.plot_logit_lens(lens, tok, ["a"] * 6)
    np.testing.assert_array_equal(other.images[0].get_array(), lens.probs_LBTX[:, 0, :, 0])


def test_text_stands_out_from_its_cell(plt, digits, lens):
    ax = gj.viz.plot_logit_lens(lens, digits[1], WORDS, row=1)
    (heat,) = ax.images
    colours = set()
    for text in ax.texts:
        token, layer = text.get_position()
        cell = np.mean(heat.to_rgba(heat.get_array())[layer, token, :3])
        assert abs(cell - (1 if text.get_color() == "white" else 0)) > 0.35
        colours.add(text.get_color())
    assert colours == {"white", "black"}


def test_labels_are_as_short_and_plain_as_plots_need(plt, digits):
    class Spoken:
        def decode(self, ids):
            return {0: " a\tb\n", 1: "x" * 13, 2: "你 $x$", 3: "", 4: "é", 5: "的就是"}[ids[0]]

    labels = gj.viz.token_labels(Spoken(), np.arange(6))
    assert labels == ["␣a⇥b↵", "x" * 11 + "…", "\\u4f60␣$x$", "", "é", "\\u7684\\u5c31…"]
    ax = gj.viz.plot_attention(np.eye(2), ["$x$", "$"])
    plt.close(ax.figure)  # not drawn: a lone `$` as a formula would fail
    assert not any(label.get_parse_math() for label in ax.get_xticklabels())
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())


def test_patches_are_seen_on_a_scale_around_nothing(plt):
    restored = np.array([[0.0, 0.2, -0.5], [1.0, np.nan, 0.1]], np.float32)
    ax = gj.viz.plot_patching(restored, WORDS[:3])
    (heat,) = ax.images
    np.testing.assert_array_equal(np.ma.filled(heat.get_array(), np.nan), restored)
    assert heat.get_clim() == (-1, 1) and heat.origin == "lower"
    red, _, blue, _ = heat.cmap(heat.norm(1.0))
    assert blue > red
    assert names(ax.get_xticklabels()) == WORDS[:3]
    assert "restored logit difference" in colour_bar(ax.figure).get_ylabel()
    assert gj.viz.plot_patching(np.zeros((2, 1)), ["a"]).images[0].get_clim() == (-1, 1)


def test_each_part_has_bars_of_its_colour_at_its_layer(plt):
    parts = {
        "embedding": np.array([0.25], np.float32),
        "attention": np.array([[1.0], [-2.0], [0.5]], np.float32),
        "ffn": np.array([0.5, 3.0, -1.0], np.float32),
    }
    ax = gj.viz.plot_contributions(parts, label="logit of 'cold'")
    legend = dict(zip(names(ax.get_legend().get_texts()), ax.get_legend().get_patches()))
    assert list(legend) == list(parts)
    for name, part in parts.items():
        colour = legend[name].get_facecolor()
        bars = [bar for bar in ax.patches if bar.get_facecolor() == colour]
        assert [bar.get_height() for bar in bars] == part.ravel().tolist()
        middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        places = [-1] if name == "embedding" else [0, 1, 2]
        np.testing.assert_allclose(middles, places, atol=0.41)
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
    assert (np.diff(np.ravel(spans)) > -1e-6).all()  # beside each other, not on
    assert ax.get_ylabel() == "logit of 'cold'" and ax.get_xticks().tolist() == [0, 1, 2]


def test_contributions_of_a_model_are_drawn_as_they_come(plt, digits):
    model, tok = digits
    parts = gj.logit_contributions(model, [tok.encode("How many digits?", bos=True)], 5)
    heights = [bar.get_height() for bar in gj.viz.plot_contributions(parts).patches]
    expected = np.concatenate([np.ravel(part) for part in parts.values()])
    np.testing.assert_allclose(heights, expected, rtol=1e-6)


def test_attention_has_a_row_for_each_token_that_looks(plt):
    weights = np.random.default_rng(0).random((2, 5)).astype(np.float32)
    ax = gj.viz.plot_attention(weights, WORDS, queries=WORDS[3:])
    (heat,) = ax.images
    np.testing.assert_array_equal(heat.get_array(), weights)
    assert heat.origin == "upper" and heat.get_clim()[0] == 0
    assert names(ax.get_xticklabels()) == WORDS and names(ax.get_yticklabels()) == WORDS[3:]
    assert colour_bar(ax.figure).get_ylabel() == "attention weight"


def test_attention_over_an_image_lies_on_its_soft_tokens(plt):
    """The path of SigLIP, from pixels to the plot: 2 x 2 soft tokens, each over its quarter."""
    cfg = tiny.gemma3(2, every=2, vision=tiny.vision())
    model, size = tiny.model(cfg), cfg.vision.image_size
    count = cfg.vision.num_soft_tokens
    ids = [2, *[cfg.vision.image_token] * count, 5, 7]
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    soft = soft_tokens(model, jnp.array([ids]), jnp.array(pixels))
    out = gj.forward(model, gj.Batch(jnp.array([ids]), soft=soft), capture="attention_weights")
    weights = out.captured["attention_weights"]
    heat = gj.viz.image_attention(weights[-1], -1, (1, 1 + count))
    ax = gj.viz.plot_image_attention(np.full((40, 60, 3), 128, np.uint8), heat)
    picture, veil = ax.images
    assert (np.asarray(picture.get_array()) == 128).all()
    seen = np.asarray(weights[-1, 0, :, -1, 1 : 1 + count].mean(0)).reshape(heat.shape)
    np.testing.assert_allclose(veil.get_array(), seen, rtol=1e-6)
    assert veil.get_extent() == [-0.5, 59.5, 39.5, -0.5] == picture.get_extent()
    assert veil.cmap(0.0)[3] == 0 and veil.cmap(1.0)[3] == pytest.approx(0.8)
    assert f"({100 * seen.sum():.0f}% in all)" in colour_bar(ax.figure).get_ylabel()


def test_plots_go_where_they_are_asked_to(plt, digits, lens):
    _, row = plt.subplots(1, 5)
    drawn = [
        gj.viz.plot_logit_lens(lens, digits[1], WORDS, ax=row[0]),
        gj.viz.plot_patching(np.ones((2, 5)), WORDS, ax=row[1]),
        gj.viz.plot_contributions({"ffn": [1.0, 2.0]}, ax=row[2]),
        gj.viz.plot_attention(np.ones((5, 5)), WORDS, ax=row[3]),
        gj.viz.plot_image_attention(np.zeros((8, 8, 3), np.uint8), np.ones((2, 2)), ax=row[4]),
    ]
    assert drawn == list(row)


def test_what_does_not_fit_is_refused(plt, digits, lens):
    tok = digits[1]
    wrong = {
        "7 words for 6 tokens": lambda: gj.viz.plot_logit_lens(lens, tok, ["a"] * 7),
        r"row=2 must lie in \[-2, 2\)": lambda: gj.viz.plot_logit_lens(lens, tok, WORDS, row=2),
        r"values \[L, 2\].*shape \[2, 3\]": lambda: gj.viz.plot_patching(np.ones((2, 3)), "ab"),
        r"shapes \{'a': \[2\], 'b': \[3\]\}": lambda: gj.viz.plot_contributions(
            {"a": np.ones(2), "b": np.ones(3)}
        ),
        r"of one row; got shapes \{'a': \[2, 2\]\}": lambda: gj.viz.plot_contributions(
            {"a": np.ones((2, 2))}
        ),
        r"weights \[2, 2\].*shape \[2, 3\]": lambda: gj.viz.plot_attention(np.ones((2, 3)), "ab"),
        r"none negative; got shape \[4\]": lambda: gj.viz.plot_image_attention(
            np.zeros((8, 8, 3), np.uint8), np.ones(4)
        ),
    }
    for message, plot in wrong.items():
        with pytest.raises(ValueError, match=message):
            plot()


def test_without_matplotlib_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'gemma-jax\[note"):
        gj.viz.plot_attention(np.eye(2), ["a", "b"])
