"""A text with images becomes the ids and the pixels that the official processor makes of them."""

import io
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from words import Words

from gemma_jax import Image, PanAndScan, image_prompt
from gemma_jax.encoder_config import VisionConfig
from gemma_jax.multimodal.image_prompt import MARKER, expand
from gemma_jax.text import images_of, render
from gemma_jax.vision.images import preprocess

DATA = Path(__file__).parent / "data"
CHATS = Path(__file__).parent.parent / "text" / "data" / "chat.json"
STORED = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))["prompts"]
STORED_CHATS = json.loads(CHATS.read_text(encoding="utf-8"))["chats"]
CROPPING = PanAndScan(min_crop_size=8)
SIZES = {0: (40, 40), 2: (40, 80), 3: (40, 120), 4: (40, 160)}  # crops -> height, width


def vision(**changes) -> VisionConfig:
    fields = dict(
        d_tower=8, d_ff=8, num_layers=1, num_heads=1, image_size=32, patch_size=2,
        num_soft_tokens=256, image_token=262_144, start_token=255_999, end_token=256_000,
    )  # fmt: skip
    return VisionConfig(**fields | changes)


SMALL = vision(num_soft_tokens=4, image_token=90, start_token=91, end_token=92)
SPAN = [91, 90, 90, 90, 90, 92]
NEWLINE = 4  # of `Words`, which never joins newlines


@pytest.fixture
def words() -> Words:
    return Words(96)


def picture(crops: int = 0, level: int = 0) -> Image:
    """An image of one grey that `CROPPING` cuts into so many crops."""
    return Image(np.full((*SIZES[crops], 3), level, np.uint8))


def run_lengths(ids: list[int]) -> list[list[int]]:
    return [[i, len(list(run))] for i, run in groupby(ids)]


@pytest.mark.parametrize("stored", STORED)
def test_stored_prompts(real_tokenizer, stored):
    """Whole prompts as transformers expands them, with and without crops."""
    images = [picture(crops) for crops in stored["num_crops"]]
    made = image_prompt(real_tokenizer, stored["text"], images, vision(), pan_and_scan=CROPPING)
    assert run_lengths(made.token_ids) == stored["ids"]
    assert len(made.pixels) == len(images) + sum(stored["num_crops"])


@pytest.mark.parametrize("stored", [chat for chat in STORED_CHATS if "num_images" in chat])
def test_stored_chats(real_tokenizer, stored):
    text = render(stored["messages"], add_generation_prompt=stored["add_generation_prompt"])
    images = [picture()] * stored["num_images"]
    made = image_prompt(real_tokenizer, text, images, vision())
    assert run_lengths(made.token_ids) == stored["expanded_ids_run_length"]
    assert len(made.token_ids) == stored["expanded_length"]


def test_ids_of_images_come_from_the_config(words):
    """The vocabulary need not have pieces for them."""
    made = image_prompt(words, f"a{MARKER}b", [picture()], SMALL)
    a, b = words.encode("a b")
    assert made.token_ids == [2, a, NEWLINE, NEWLINE, *SPAN, NEWLINE, NEWLINE, b]


def test_crops_come_with_the_official_words(words):
    said = "Here is the original image {} and here are some crops to help you see better {} {}"
    view = [NEWLINE, NEWLINE, *SPAN, NEWLINE, NEWLINE]
    parts = [words.encode(part) for part in said.split("{}")]
    expected = [2, *parts[0], *view, *parts[1], *view, *parts[2], *view]
    assert expand(words, MARKER, [2], SMALL) == expected


def test_images_without_a_marker_come_first(words):
    images = [picture(), picture()]
    for text, marked in [("a", f"{MARKER * 2}a"), ("<bos>a", f"<bos>{MARKER * 2}a")]:
        made, same = (image_prompt(words, t, images, SMALL).token_ids for t in (text, marked))
        assert made == same
        assert made[0] == 2 and made.count(2) == 1


def test_bos_can_be_left_out(words):
    whole = image_prompt(words, "a", [picture()], SMALL).token_ids
    assert image_prompt(words, "a", [picture()], SMALL, bos=False).token_ids == whole[1:]


def test_text_alone(words):
    made = image_prompt(words, "a", [], SMALL)
    assert made.token_ids == words.encode("a", bos=True)
    assert made.pixels.shape == (0, 3, 32, 32)


def test_pixels_follow_the_markers_each_image_before_its_crops(words):
    images = [picture(0, 0), picture(3, 100), picture(2, 200)]
    made = image_prompt(words, MARKER * 3, images, SMALL, pan_and_scan=CROPPING)
    assert made.pixels.shape == (1 + 4 + 3, 3, 32, 32)
    assert made.pixels.dtype == np.float32
    levels = np.rint((made.pixels.mean((1, 2, 3)) + 1) * 127.5)
    assert levels.tolist() == [0] + [100] * 4 + [200] * 3
    boxes = CROPPING.boxes(images[1].width, images[1].height)
    np.testing.assert_array_equal(made.pixels[1:5], preprocess(images[1], 32, boxes))
    whole = image_prompt(words, MARKER * 3, images, SMALL)
    np.testing.assert_array_equal(whole.pixels, made.pixels[[0, 1, 5]])


def test_images_of_every_kind(words, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    file, data = tmp_path / "a.png", io.BytesIO()
    Image(array).to_pil().save(file)
    Image(array).to_pil().save(data, "PNG")
    kinds = [array, Image(array), Image(array).to_pil(), file, str(file), data.getvalue()]
    made = image_prompt(words, "a", kinds, SMALL)
    np.testing.assert_array_equal(made.pixels, made.pixels[:1].repeat(len(kinds), 0))
    messages = [{"role": "user", "content": [*(k for k in kinds if not isinstance(k, str)), "a"]}]
    same = image_prompt(words, render(messages), images_of(messages), SMALL)
    np.testing.assert_array_equal(same.pixels, made.pixels[1:])


@pytest.mark.parametrize(
    ("text", "images", "match"),
    [
        (MARKER, [], "text .<start_of_image>.: 1, images given: 0"),
        (MARKER, ["x.png"] * 2, "text .<start_of_image>.: 1, images given: 2"),
        (MARKER * 3, ["x.png"], "text .<start_of_image>.: 3, images given: 1"),
        ("<image_soft_token>", [], "<image_soft_token>, which belongs to runs"),
        (MARKER + "<image_soft_token>", ["x.png"], "mark images by <start_of_image>"),
        ("a", [3], "got int"),
        ("a", [b"no image"], "no image"),
    ],
)
def test_refused(words, text, images, match):
    with pytest.raises(ValueError, match=match) as caught:
        image_prompt(words, text, images, SMALL)
    assert "\n" not in str(caught.value)


def test_missing_file(words):
    with pytest.raises(FileNotFoundError):
        image_prompt(words, "a", ["x.png"], SMALL)


def test_model_without_a_tower(words):
    with pytest.raises(ValueError, match="has no vision tower; images need one that has"):
        image_prompt(words, "a", [picture()], None)
