"""Gemma 3 in JAX and Flax.

    import gemma_jax as gj

    model, tok = gj.load("gemma3-270m")
    print(gj.generate(model, tok, "The capital of France is"))

Names below are imported at first use: `import gemma_jax` itself costs next to nothing.
"""

import importlib

_HOMES = {
    "gemma_jax.config": ("GemmaConfig", "LayerSpec"),
    "gemma_jax.decoder.batch": ("Batch",),
    "gemma_jax.decoder.cache": ("Cache", "cache_bytes", "init_cache"),
    "gemma_jax.decoder.forward": ("Output", "forward"),
    "gemma_jax.decoder.losses": ("loss", "token_losses"),
    "gemma_jax.decoder.model": ("Gemma",),
    "gemma_jax.evaluation.scoring": ("score",),
    "gemma_jax.evaluation.shieldgemma": ("Verdict", "shield"),
    "gemma_jax.inference.conversation": ("Conversation",),
    "gemma_jax.inference.generate": ("Completion", "generate"),
    "gemma_jax.inference.sampling": ("Sampling",),
    "gemma_jax.inference.session": ("Session",),
    "gemma_jax.loading": ("load", "load_model", "load_tokenizer"),
    "gemma_jax.multimodal.image_prompt": ("Prompt", "image_prompt"),
    "gemma_jax.numerics": ("Numerics",),
    "gemma_jax.presets": ("PRESETS", "preset"),
    "gemma_jax.runtime": ("Runtime",),
    "gemma_jax.text": ("Tokenizer", "encode_chat"),
    "gemma_jax.vision.images": ("Image",),
    "gemma_jax.vision.pan_and_scan": ("PanAndScan",),
}
_MODULES = ("matformer", "viz")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"gemma_jax.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gemma_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_MODULES]
