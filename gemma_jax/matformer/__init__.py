"""MatFormer: smaller models inside a larger one, by prefixes of feed-forward widths and by layers.

    small = matformer.slice(model, submodel)     a model of its own, to be saved
    small = matformer.at(model, submodel)        a view: same weights in memory, nothing is copied

Devvrit et al., "MatFormer: Nested Transformer for Elastic Inference", 2023; Gemma 3n E2B is such a
slice of E4B.
"""

from .presets import PRESETS, preset
from .sensitivity import sensitivity
from .slice_search import Point, search
from .slicing import at, slice_model
from .submodel import Slice, shares_cache, slice_config

slice = slice_model  # as users call it; inside the package the builtin keeps its name

__all__ = [
    "PRESETS",
    "Point",
    "Slice",
    "at",
    "preset",
    "search",
    "sensitivity",
    "shares_cache",
    "slice",
    "slice_config",
    "slice_model",
]
