"""After a warm-up, no encoder compiles."""

import jax
import numpy as np
import pytest
import tiny

from gemma_jax.audio.encoder import frames_per_token
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.warm_up import warm_up_towers


@pytest.mark.nightly
def test_towers_are_ready():
    model = tiny.model(tiny.seeing_and_hearing(tiny.gemma3n(4, 1)))
    told = []
    warm_up_towers(model, told.append)
    most = model.cfg.audio.num_soft_tokens * frames_per_token(model.cfg.audio)
    assert told == ["read an image", f"read a sound, {most} frames"]
    image, sound = modalities_of(model.cfg)
    made = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: made.append(name))
    side = model.cfg.vision.image_size
    image.encode(model, np.ones((1, 3, side, side), np.float32))
    sound.encode(model, np.ones((1, most // 2, model.cfg.audio.num_mels), np.float32))
    assert not [name for name in made if name.endswith("backend_compile_duration")]
