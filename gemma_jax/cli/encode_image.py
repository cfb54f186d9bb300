"""`gemma-jax encode-image`: what the vision tower reads of image files."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common
from gemma_jax.vision.pan_and_scan import PanAndScan


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Image files.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="Safetensors file to write.")],
    model: Annotated[str | None, common.settings_of("Gemma 3")] = None,
    pan_and_scan: Annotated[
        bool, typer.Option("--pan-and-scan", help="Add crops of images far from square.")
    ] = False,
    max_crops: Annotated[
        int | None, typer.Option(help=f"Crops per image. Default: {PanAndScan.max_num_crops}.")
    ] = None,
    min_crop_size: Annotated[
        int | None,
        typer.Option(help=f"Shortest side of a crop. Default: {PanAndScan.min_crop_size}."),
    ] = None,
    min_ratio: Annotated[
        float | None,
        typer.Option(help=f"Longer to shorter side, to crop. Default: {PanAndScan.min_ratio}."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Side of the squares that come out, in pixels. Default: the model's, 896.",
        ),
    ] = None,
) -> None:
    """Decode and resize image files.

    Writes pixel_values, float32 [images and crops, 3, size, size] in [-1, 1] (of Gemma 3n in
    [0, 1]), each image before its crops, and num_crops, int64 [images].
    """
    import numpy as np

    from gemma_jax.atomic_files import replacing
    from gemma_jax.encoder_config import VisionConfig
    from gemma_jax.presets import SIGLIP
    from gemma_jax.vision.images import Image, preprocess

    given = {"max_num_crops": max_crops, "min_crop_size": min_crop_size, "min_ratio": min_ratio}
    cropping = _cropping(pan_and_scan, given)
    vision = SIGLIP if model is None else common.find_config(model)[0].vision
    if vision is None:
        raise ValueError(f"{model} has no vision tower")
    if cropping and not isinstance(vision, VisionConfig):
        raise ValueError("--pan-and-scan: this model was trained on whole images; leave it out")
    size = size or vision.image_size
    with replacing(output) as path:
        pixels, num_crops = [], []
        for image in map(Image, files):
            boxes = cropping.boxes(image.width, image.height) if cropping else ()
            pixels.append(preprocess(image, size, boxes, vision.images))
            num_crops.append(len(boxes))
        common.save_arrays(
            {
                "pixel_values": np.concatenate(pixels),
                "num_crops": np.array(num_crops, np.int64),
            },
            path,
            output,
        )


def _cropping(wanted: bool, options: dict[str, float | None]) -> PanAndScan | None:
    given = {name: value for name, value in options.items() if value is not None}
    if given and not wanted:
        raise ValueError("--max-crops, --min-crop-size and --min-ratio need --pan-and-scan")
    return PanAndScan(**given) if wanted else None
