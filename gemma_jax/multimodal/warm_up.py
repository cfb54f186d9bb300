"""Programs of encoders, made ahead.

Local letters: M mel bands.
"""

from collections.abc import Callable

import numpy as np

from gemma_jax.audio.encoder import frames_per_token
from gemma_jax.decoder.model import Gemma
from gemma_jax.multimodal.audio_prompt import BUCKET, audio_modality
from gemma_jax.multimodal.image_prompt import image_modality


def warm_up_towers(model: Gemma, progress: Callable[[str], None]) -> None:
    """Encodes one picture, and one sound of each length that a program is made for.

    Args:
      progress: Is told the name of each program before it is made.
    """
    vision, audio = model.cfg.vision, model.cfg.audio
    if vision is not None:
        progress("read an image")
        side = vision.image_size
        image_modality(vision).encode(model, np.zeros((1, 3, side, side), np.float32))
    if audio is not None:
        most = audio.num_soft_tokens * frames_per_token(audio)
        for frames in sorted({min(n, most) for n in range(BUCKET, most + BUCKET, BUCKET)}):
            progress(f"read a sound, {frames} frames")
            mel_1TM = np.zeros((1, frames, audio.num_mels), np.float32)
            audio_modality(audio).encode(model, mel_1TM)
