"""`gemma-jax encode-image`: what the library makes, in a file."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gemma_jax import Image, PanAndScan
from gemma_jax.vision.images import preprocess


@pytest.fixture
def photo(tmp_path):
    """`photo(width, height)` writes a picture of noise."""

    def write(width: int, height: int):
        path = tmp_path / f"{width}x{height}.png"
        rgb = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(rgb).save(path)
        return path

    return write


@pytest.fixture
def encode(cli, tmp_path):
    """`encode(*words)` returns pixel_values and num_crops."""

    def call(*words) -> tuple[np.ndarray, list[int]]:
        output = tmp_path / "out.safetensors"
        ran = cli("encode-image", *words, "--output", output)
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        arrays = load_file(output)
        assert arrays.keys() == {"pixel_values", "num_crops"}
        assert [str(array.dtype) for array in arrays.values()].count("float32") == 1
        assert arrays["num_crops"].dtype == np.int64
        return arrays["pixel_values"], arrays["num_crops"].tolist()

    return call


def test_images_in_order(encode, photo):
    files = photo(60, 40), photo(30, 30)
    pixels, num_crops = encode(*files, "--size", 56)
    expected = [preprocess(Image(file), 56) for file in files]
    assert np.array_equal(pixels, np.concatenate(expected)) and num_crops == [0, 0]


def test_the_size_of_the_published_models(encode, photo):
    pixels, _ = encode(photo(60, 40))
    assert pixels.shape == (1, 3, 896, 896) and pixels.dtype == np.float32


def test_the_settings_of_a_model(encode, photo):
    """Gemma 3n reads images of 768 pixels, in [0, 1]."""
    file = photo(60, 40)
    pixels, _ = encode(file, "--model", "gemma3n-e2b")
    assert pixels.shape == (1, 3, 768, 768) and 0 <= pixels.min() < 0.1 < 0.9 < pixels.max() <= 1
    levels = np.asarray(Image(file).to_pil().resize((768, 768), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_allclose(pixels[0], levels.transpose(2, 0, 1) / 255, atol=1e-7)


def test_crops_follow_their_image(encode, photo):
    files = photo(600, 300), photo(300, 300), photo(256, 1024)
    pixels, num_crops = encode(*files, "--pan-and-scan", "--size", 28)
    assert num_crops == [2, 0, 4] and len(pixels) == 9
    image = Image(files[2])
    boxes = PanAndScan().boxes(image.width, image.height)
    assert np.array_equal(pixels[4:], preprocess(image, 28, boxes))


@pytest.mark.parametrize(
    ("options", "crops"),
    [
        ((), 4),
        (("--max-crops", 3), 3),
        (("--min-crop-size", 300), 3),
        (("--min-ratio", 4), 0),
    ],
)
def test_pan_and_scan_options(encode, photo, options, crops):
    _, num_crops = encode(photo(1050, 300), "--pan-and-scan", *options, "--size", 8)
    assert num_crops == [crops]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-crops", 3), "need --pan-and-scan"),
        (("--pan-and-scan", "--max-crops", 0), "max_num_crops=0 must be at least 1"),
        (("--pan-and-scan", "--model", "gemma3n-e2b"), "trained on whole images"),
        (("--model", "gemma3-1b"), "gemma3-1b has no vision tower"),
        (("--size", 0), "--size"),
        (("--size", 1_000_000), "--size"),
    ],
)
def test_wrong_options(refused, photo, tmp_path, words, message):
    words = (photo(8, 8), *words, "--output", tmp_path / "out")
    assert message in refused("encode-image", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "bad is empty"),
        (b"hello", "bad is no image that can be read"),
    ],
)
def test_one_bad_file_leaves_no_output(refused, photo, tmp_path, content, message):
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    error = refused("encode-image", photo(8, 8), bad, "--output", tmp_path / "out")
    assert message in error and str(bad) in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_no_files(refused, tmp_path):
    assert "missing argument 'FILE'" in refused("encode-image", "--output", tmp_path / "out")


def test_full_disk_keeps_the_old_output(refused, photo, tmp_path, monkeypatch):
    def fail(arrays, path):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    (tmp_path / "out").write_text("old")
    error = refused("encode-image", photo(8, 8), "--output", tmp_path / "out", code=1)
    assert error.startswith(str(tmp_path / "out")) and "No space left" in error
    assert (tmp_path / "out").read_text() == "old"


def test_jax_stays_out(photo, tmp_path):
    code = (
        "import sys; from gemma_jax.cli.app import run; code = run(sys.argv[1:]); "
        "print(code, *(name for name in ('jax', 'flax') if name in sys.modules))"
    )
    words = ["encode-image", str(photo(8, 8)), "--output", str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("0", "")
