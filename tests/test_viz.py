"""The pictures show what they say."""

import functools

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import gemma_jax as gj
from gemma_jax.decoder.model import abstract_model

GREY = np.full((60, 90, 3), 100, np.uint8)


def one_hot(rows: int, columns: int, row: int, column: int) -> np.ndarray:
    grid = np.zeros((rows, columns), np.float32)
    grid[row, column] = 0.01
    return grid


def redness(picture) -> np.ndarray:
    values = np.asarray(picture).astype(int)
    return values[..., 0] - values[..., 2]


@given(st.integers(0, 3), st.integers(0, 5))
def test_hottest_where_the_weight_is(row, column):
    overlay = gj.viz.attention_overlay(GREY, one_hot(4, 6, row, column))
    assert overlay.size == (90, 60)
    heat = redness(overlay)
    patch = np.zeros_like(heat, bool)
    patch[15 * row : 15 * row + 15, 15 * column : 15 * column + 15] = True
    assert heat[patch].max() == heat.max() > 150
    assert heat[patch].mean() > 4 * heat[~patch].mean()
    far = np.abs(np.arange(90) - (15 * column + 7)) > 15  # smooth transitions reach one patch on
    assert (np.asarray(overlay)[:, far] == 100).all()


def test_veil_is_as_dense_as_the_weight():
    overlay = gj.viz.attention_overlay(GREY, [[0.0, 0.1, 0.2]], colour=(200, 0, 0), alpha=0.5)
    left, middle, right = np.asarray(overlay)[30, [0, 45, 89]]
    assert left.tolist() == [100, 100, 100]
    assert right.tolist() == pytest.approx([150, 50, 50], abs=1)
    assert middle.tolist() == pytest.approx([125, 75, 75], abs=2)


def test_nothing_to_show_changes_nothing():
    for weights, alpha in ((np.zeros((4, 4)), 1), (np.ones((4, 4)), 0)):
        assert (np.asarray(gj.viz.attention_overlay(GREY, weights, alpha=alpha)) == GREY).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(4), r"got shape \[4\]"),
        (np.ones((0, 2)), r"got shape \[0, 2\]"),
        (-np.ones((2, 2)), "values from -1 to -1"),
        (np.full((2, 2), np.nan), "values from nan"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        gj.viz.attention_overlay(GREY, weights)


def test_wrong_alpha():
    with pytest.raises(ValueError, match=r"alpha=1.5 must lie in \[0, 1\]"):
        gj.viz.attention_overlay(GREY, np.ones((2, 2)), alpha=1.5)


@pytest.fixture
def weights_LBNTS():
    return np.random.default_rng(0).random((3, 2, 4, 5, 12)).astype(np.float32)


def test_attention_to_an_image(weights_LBNTS):
    grid = gj.viz.image_attention(weights_LBNTS, query=-1, span=(2, 11), row=1)
    for cell in range(9):
        mean = weights_LBNTS[:, 1, :, 4, 2 + cell].mean()
        assert grid[cell // 3, cell % 3] == pytest.approx(mean, rel=1e-6)
    assert grid.shape == (3, 3) and grid.dtype == np.float32


def test_attention_of_a_layer_or_a_head(weights_LBNTS):
    layer = gj.viz.image_attention(weights_LBNTS[1], 3, (0, 4))
    np.testing.assert_allclose(layer.ravel(), weights_LBNTS[1, 0, :, 3, :4].mean(0), rtol=1e-6)
    head = gj.viz.image_attention(weights_LBNTS[1, :, 2:3], 3, (0, 4))
    np.testing.assert_array_equal(head.ravel(), weights_LBNTS[1, 0, 2, 3, :4])


@pytest.mark.parametrize(
    ("query", "span", "row", "message"),
    [
        (5, (0, 4), 0, r"query=5 must lie in \[-5, 5\)"),
        (-6, (0, 4), 0, r"query=-6 must lie in \[-5, 5\)"),
        (0, (0, 4), 2, r"row=2 must lie in \[-2, 2\)"),
        (0, (0, 5), 0, r"span=\(0, 5\) must lie in \[0, 12\] and hold a square number"),
        (0, (9, 13), 0, "must lie in"),
        (0, (-1, 3), 0, "must lie in"),
        (0, (4, 4), 0, "must lie in"),
        (0, (4, 3), 0, "must lie in"),
    ],
)
def test_outside_the_weights(weights_LBNTS, query, span, row, message):
    """JAX would clamp such indices silently."""
    with pytest.raises(ValueError, match=message):
        gj.viz.image_attention(weights_LBNTS, query, span, row=row)


def test_weights_of_the_wrong_rank(weights_LBNTS):
    with pytest.raises(ValueError, match=r"expected weights \[L, B, N, T, S\]"):
        gj.viz.image_attention(weights_LBNTS[0, 0], 0, (0, 4))


def test_what_forward_captures_fits():
    model = abstract_model(tiny.gemma3(layers=2))
    capture = functools.partial(gj.forward, capture=("attention_weights",))
    tokens = jax.ShapeDtypeStruct((1, 12), np.int32)
    weights = jax.eval_shape(capture, model, tokens).captured["attention_weights"]
    grid = gj.viz.image_attention(np.full(weights.shape, 1 / 12), -1, (0, 9))
    np.testing.assert_allclose(grid, np.full((3, 3), 1 / 12), rtol=1e-6)


def test_crops_are_framed():
    boxes = gj.PanAndScan(min_crop_size=20).boxes(90, 60)
    assert boxes == ((0, 0, 45, 60), (45, 0, 90, 60))
    framed = np.asarray(gj.viz.draw_crops(GREY, boxes))
    changed = (framed != 100).any(-1)
    expected = np.zeros((60, 90), bool)
    expected[[0, -1]] = expected[:, [0, 44, 45, 89]] = True
    assert (changed == expected).all()
    first, second = framed[30, 44], framed[30, 45]
    assert (first != second).any() and (first == framed[30, 0]).all()


def test_frames_are_seen_on_large_images():
    framed = gj.viz.draw_crops(np.zeros((1000, 2000), np.uint8), [(500, 0, 1500, 1000)])
    assert framed.size == (2000, 1000)
    assert (np.asarray(framed)[500].any(-1).nonzero()[0] // 10 == np.repeat([50, 149], 10)).all()


def test_the_image_given_stays_as_it_is():
    image = gj.Image(GREY)
    gj.viz.draw_crops(image, [(0, 0, 50, 60)])
    gj.viz.attention_overlay(image, np.ones((2, 2)))
    assert (image.rgb == 100).all()


@pytest.fixture
def plt():
    """matplotlib, whose figures are closed again."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="pip install 'gemma-jax[notebook]'")
    yield plt
    plt.close("all")


def test_sensitivity_has_layers_across_and_widths_down(plt):
    matrix = np.array([[0.0, 0.1], [-0.2, 0.4], [0.0, 0.0]])
    ax = gj.viz.plot_sensitivity(matrix, (0.5, 0.25))
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), matrix.T, rtol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["50%", "25%"]
    shades = image.to_rgba(image.get_array()).sum(axis=-1)
    assert np.argmin(shades) == 4 and shades[0, 1] == shades.max()  # darkest: layer 1 at a quarter
    with pytest.raises(ValueError, match=r"expected a matrix \[L, 3\].*got shape \[3, 2\]"):
        gj.viz.plot_sensitivity(matrix, (0.75, 0.5, 0.25))


def test_widths_are_not_rounded(plt):
    ax = gj.viz.plot_sensitivity(np.zeros((3, 2)), (0.5, 0.125))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["50%", "12.5%"]


def test_layers_have_whole_numbers_and_the_colour_of_their_kind(plt):
    layers = tiny.gemma3(layers=3).layers
    kinds = [spec.kind for spec in layers]
    ax = gj.viz.plot_layers([3.0, 1.0, 2.0], layers, label="norm")
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in ax.patches}
    assert [bars[i].get_height() for i in range(3)] == [3, 1, 2]
    colours = {(kinds[i], bars[i].get_facecolor()) for i in range(3)}
    assert len(colours) == len(set(kinds)) == 2
    assert ax.get_xticks().tolist() == [0, 1, 2] and ax.get_ylabel() == "norm"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "local layer",
        "global layer",
    ]
    with pytest.raises(ValueError, match="2 values for 3 layers"):
        gj.viz.plot_layers([1.0, 2.0], layers)


def test_plots_leave_the_settings_of_matplotlib_alone(plt):
    plt.figure()  # chooses a backend
    before = dict(plt.rcParams)
    gj.viz.plot_sensitivity(np.zeros((3, 1)), (0.5,))
    assert dict(plt.rcParams) == before
    with pytest.raises(ValueError, match="no points"):
        gj.viz.plot_slices([])
    assert dict(plt.rcParams) == before
    with plt.style.context(gj.viz.STYLE):  # all of it is known to matplotlib
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == list(gj.viz.COLOURS)


def test_what_a_backend_sets_at_the_first_figure_stays(plt, monkeypatch):
    """Notebooks show figures because their backend says so when it is loaded."""
    subplots = plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda **options: [plt.ion(), subplots(**options)][1])
    with plt.ioff():
        gj.viz.plot_sensitivity(np.zeros((3, 1)), (0.5,))
        assert plt.isinteractive()


def test_the_line_joins_the_slices_that_none_smaller_is_as_good_as(plt):
    submodel = gj.matformer.Slice(ffn_widths=(1,))
    sizes = {300: 1.0, 100: 3.0, 200: 2.0, 250: 2.5, 260: 2.0}
    points = [gj.matformer.Point(submodel, size, loss) for size, loss in sizes.items()]
    ax = gj.viz.plot_slices(points, names=("full", "", "half"))
    assert ax.lines[0].get_xydata().tolist() == [[100, 3], [200, 2], [300, 1]]
    assert ax.collections[0].get_offsets().tolist() == [list(p) for p in sizes.items()]
    assert {text.get_text(): text.xy for text in ax.texts if text.get_text()} == {
        "full": (300, 1.0),
        "half": (200, 2.0),
    }
    assert ax.get_legend() is None
    assert gj.viz.plot_slices(points[:1], line=False, label="by hand", ax=ax) is ax
    assert len(ax.lines) == 1 and len(ax.collections) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["by hand"]
    for wrong, message in (([], "no points"), (points[:1], "2 names for 1 points")):
        with pytest.raises(ValueError, match=message):
            gj.viz.plot_slices(wrong, names=("a", "b"))


def test_attention_to_a_sound(weights_LBNTS):
    """By hand: the mean over layers and heads, a row for each query."""
    heat = gj.viz.sound_attention(weights_LBNTS, [0, -1], (1, 4), row=1)
    expected = weights_LBNTS[:, 1][:, :, [0, -1], 1:4].mean(axis=(0, 1))
    np.testing.assert_allclose(heat, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="query=-99 must lie in"):
        gj.viz.sound_attention(weights_LBNTS, [0, -99], (1, 4))
    with pytest.raises(ValueError, match=r"span=\(4, 4\) must lie in"):
        gj.viz.sound_attention(weights_LBNTS, [0], (4, 4))


def test_mel_frames_have_seconds_across_and_low_bands_below(plt):
    mel = np.arange(600, dtype=np.float32).reshape(50, 12)
    ax = gj.viz.plot_mel(mel)
    (image,) = ax.images
    assert image.get_extent() == [0, 0.5, 0, 12] and image.origin == "lower"
    np.testing.assert_array_equal(image.get_array(), mel.T)
    with pytest.raises(ValueError, match="expected mel frames"):
        gj.viz.plot_mel(mel[0])


def test_words_have_rows_on_a_scale_of_their_own(plt):
    ax = gj.viz.plot_sound_attention([[0.1, 0.2, 0], [0, 0, 0.001]], ["four", "two"], 0.16)
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), [[0.5, 1, 0], [0, 0, 1]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["four", "two"]
    assert image.get_extent()[1] == pytest.approx(0.48)
    with pytest.raises(ValueError, match="a row for each word"):
        gj.viz.plot_sound_attention([[0.1]], ["four", "two"], 0.16)
