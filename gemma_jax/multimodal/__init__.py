"""Prompts of several modalities: what is not text stands in it as soft tokens.

`modality.Modality` says all that the rest of the library knows of a kind of input. Each kind has a
file that registers its `Modality` for the type of its config, and is named here.
"""

from gemma_jax.multimodal import audio_prompt as audio_prompt
from gemma_jax.multimodal import image_prompt as image_prompt
