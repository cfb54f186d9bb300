"""Pan & Scan: crops of an image that is far from square, so that its details survive the resize.

The whole image is always encoded; the crops come on top of it (Gemma 3 report, section 2.1; the
rule is that of hf `Gemma3ImageProcessor`). Off unless asked for.
"""

import math
from dataclasses import dataclass

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive."""


@dataclass(frozen=True, kw_only=True)
class PanAndScan:
    """Says when an image is cropped (Pan & Scan), and into how many parts along its longer side.

    Attributes:
      min_crop_size: No side of a crop may be shorter, in pixels; otherwise there are no crops.
      max_num_crops: At most this many crops.
      min_ratio: Images with a ratio of longer to shorter side below it are not cropped.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.PanAndScan().boxes(width=1600, height=800)
      ((0, 0, 800, 800), (800, 0, 1600, 800))
    """

    min_crop_size: int = 256
    max_num_crops: int = 4
    min_ratio: float = 1.2

    def __post_init__(self):
        for field in ("min_crop_size", "max_num_crops"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if not self.min_ratio > 0:
            raise ValueError(f"min_ratio={self.min_ratio} must be positive")

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """Crops of an image of this size, from left to right or from top to bottom; or none.

        They are equally long but for the last, which ends with the image, and cover the image
        without overlap.
        """
        longer, shorter = max(width, height), min(width, height)
        if longer / shorter < self.min_ratio:
            return ()
        fitting = min(math.floor(longer / shorter + 0.5), longer // self.min_crop_size)
        length = math.ceil(longer / min(max(fitting, 2), self.max_num_crops))
        if min(length, shorter) < self.min_crop_size:
            return ()
        parts = [(start, min(start + length, longer)) for start in range(0, longer, length)]
        if width >= height:
            return tuple((start, 0, end, height) for start, end in parts)
        return tuple((0, start, width, end) for start, end in parts)
