"""Pan & Scan crops exactly where transformers does."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_jax import PanAndScan

# Slices that `pan_and_scan_batched` of transformers 5.23 takes: size, options, boxes.
OFFICIAL = [
    ((896, 896), {}, ()),
    ((640, 960), {}, ((0, 0, 640, 480), (0, 480, 640, 960))),
    ((700, 300), {}, ((0, 0, 350, 300), (350, 0, 700, 300))),
    ((300, 700), {}, ((0, 0, 300, 350), (0, 350, 300, 700))),
    ((1199, 1000), {}, ()),
    ((1200, 1000), {}, ((0, 0, 600, 1000), (600, 0, 1200, 1000))),
    ((1000, 1200), {}, ((0, 0, 1000, 600), (0, 600, 1000, 1200))),
    ((511, 256), {}, ((0, 0, 256, 256), (256, 0, 511, 256))),
    ((510, 256), {}, ()),
    ((1000, 255), {}, ()),
    ((1279, 512), {}, ((0, 0, 640, 512), (640, 0, 1279, 512))),
    ((1280, 512), {}, ((0, 0, 427, 512), (427, 0, 854, 512), (854, 0, 1280, 512))),
    ((512, 1280), {}, ((0, 0, 512, 427), (0, 427, 512, 854), (0, 854, 512, 1280))),
    ((1001, 333), {}, ((0, 0, 334, 333), (334, 0, 668, 333), (668, 0, 1001, 333))),
    ((1801, 600), {}, ((0, 0, 601, 600), (601, 0, 1202, 600), (1202, 0, 1801, 600))),
    ((4032, 3024), {}, ((0, 0, 2016, 3024), (2016, 0, 4032, 3024))),
    (
        (1081, 270),
        {},
        ((0, 0, 271, 270), (271, 0, 542, 270), (542, 0, 813, 270), (813, 0, 1081, 270)),
    ),
    (
        (500, 5000),
        {},
        ((0, 0, 500, 1250), (0, 1250, 500, 2500), (0, 2500, 500, 3750), (0, 3750, 500, 5000)),
    ),
    ((3, 2), {}, ()),
    ((2, 10000), {}, ()),
    ((700, 300), {"min_crop_size": 300}, ((0, 0, 350, 300), (350, 0, 700, 300))),
    ((700, 300), {"min_crop_size": 301}, ()),
    ((5000, 500), {"min_crop_size": 501}, ()),
    ((700, 300), {"max_num_crops": 1}, ((0, 0, 700, 300),)),
    ((2000, 500), {"max_num_crops": 2}, ((0, 0, 1000, 500), (1000, 0, 2000, 500))),
    ((5000, 500), {"max_num_crops": 12}, tuple((i, 0, i + 500, 500) for i in range(0, 5000, 500))),
    ((1000, 1000), {"min_ratio": 1.0}, ((0, 0, 500, 1000), (500, 0, 1000, 1000))),
    ((900, 600), {"min_ratio": 1.5}, ((0, 0, 450, 600), (450, 0, 900, 600))),
    ((900, 600), {"min_ratio": 1.51}, ()),
    (
        (100, 37),
        {"min_crop_size": 10, "max_num_crops": 5},
        ((0, 0, 34, 37), (34, 0, 68, 37), (68, 0, 100, 37)),
    ),
    ((10, 3), {"min_crop_size": 2}, ((0, 0, 4, 3), (4, 0, 8, 3), (8, 0, 10, 3))),
]


@pytest.mark.parametrize(("size", "options", "boxes"), OFFICIAL)
def test_as_in_transformers(size, options, boxes):
    assert PanAndScan(**options).boxes(*size) == boxes


def test_no_crop_is_empty():
    """transformers takes a fourth crop of no width here, and fails on it."""
    boxes = PanAndScan(min_crop_size=2).boxes(9, 2)
    assert boxes == ((0, 0, 3, 2), (3, 0, 6, 2), (6, 0, 9, 2))


sides = st.integers(2, 6000)
options = st.builds(
    PanAndScan,
    min_crop_size=st.integers(1, 600),
    max_num_crops=st.integers(2, 12),
    min_ratio=st.floats(0.5, 5),
)


@given(sides, sides, options)
def test_crops_tile_the_image(width, height, pan_and_scan):
    boxes = pan_and_scan.boxes(width, height)
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < pan_and_scan.min_ratio or shorter < pan_and_scan.min_crop_size:
        assert boxes == ()
    if not boxes:
        return
    assert 2 <= len(boxes) <= pan_and_scan.max_num_crops
    assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (width, height)
    along = 0 if width >= height else 1
    for box, following in pairwise(boxes):
        assert box[along + 2] == following[along]
        assert box[along + 2] - box[along] >= pan_and_scan.min_crop_size
    across = {(box[1 - along], box[3 - along]) for box in boxes}
    assert across == {(0, shorter)}


@given(sides, sides, options)
def test_turning_the_image_turns_the_crops(width, height, pan_and_scan):
    if width == height:
        return
    turned = tuple((t, l, b, r) for l, t, r, b in pan_and_scan.boxes(width, height))
    assert pan_and_scan.boxes(height, width) == turned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_crop_size": 0}, "min_crop_size=0 must be at least 1"),
        ({"max_num_crops": 0}, "max_num_crops=0 must be at least 1"),
        ({"min_ratio": 0.0}, "min_ratio=0.0 must be positive"),
        ({"min_ratio": float("nan")}, "min_ratio=nan must be positive"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        PanAndScan(**options)
