"""A stream of sound for a whole model: its soft tokens are as wide as the decoder.

Local letters: C width of the tower.
"""

from functools import partial

import jax

from gemma_jax.audio.streaming import AudioStream
from gemma_jax.decoder.model import Gemma
from gemma_jax.multimodal.audio_prompt import require_audio
from gemma_jax.multimodal.encode import embedder_of
from gemma_jax.nn.embed import ModalityEmbedder
from gemma_jax.numerics import Numerics


def audio_stream(model: Gemma, *, tokens_per_step: int = 1) -> AudioStream:
    """Begins to hear a clip: `push(samples)` gives the soft tokens `[n, D]` that are complete.

    They are those that `encode_audio` makes of the whole clip, without padding.

    Args:
      model: One that hears.
      tokens_per_step: See `AudioStream`.

    Raises:
      ValueError: The model does not hear.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.audio_stream(gj.load_model("checkpoints/digits"))
      Traceback (most recent call last):
      ...
      ValueError: this model has no audio tower; sounds need one that has, such as gemma3n-e2b-it
    """
    cfg = require_audio(model.cfg.audio)
    embed = partial(_soft, embedder_of(model, cfg.audio_token), numerics=model.runtime.numerics)
    return AudioStream(model.audio, model.runtime, embed=embed, tokens_per_step=tokens_per_step)


@partial(jax.jit, static_argnames="numerics")
def _soft(embedder: ModalityEmbedder, x_TC: jax.Array, numerics: Numerics) -> jax.Array:
    return embedder.soft(x_TC[None], numerics)[0]
