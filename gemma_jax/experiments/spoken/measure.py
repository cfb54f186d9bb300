"""How well the model writes down what is said by voices that it never heard, and reads pictures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

import gemma_jax as gj
from gemma_jax.experiments.digits.train import accuracy as pictures_right
from gemma_jax.experiments.digits.train import held_out as held_out_scenes
from gemma_jax.experiments.spoken.clips import HELD_OUT, RATE, VOICES, Clip, draw
from gemma_jax.experiments.spoken.espeak import Speaker
from gemma_jax.experiments.spoken.model import TRANSCRIBE
from gemma_jax.text import Tokenizer

BATCH = 100  # clips that are transcribed together
SCENES, SAMPLES = 500, 4  # held-out pictures that are read, and clips that are kept


def held_out(speaker: Speaker, count: int, voices: Sequence[str] = HELD_OUT) -> list[Clip]:
    """Clips that are none of training's, the voices in turn."""
    random = np.random.default_rng(1)
    return [draw(random, speaker, voices[i % len(voices) :][:1]) for i in range(count)]


def silent(clip: Clip) -> Clip:
    """The clip without its sound."""
    return replace(clip, samples=np.zeros_like(clip.samples))


def transcripts(
    model: gj.Gemma, tokenizer: Tokenizer, clips: Sequence[Clip], question: str = TRANSCRIBE[0]
) -> list[str]:
    """What the model writes down of each, greedily."""
    messages = [
        [{"role": "user", "content": [question, gj.Audio(clip.samples, sampling_rate=RATE)]}]
        for clip in clips
    ]
    batches = (messages[i : i + BATCH] for i in range(0, len(messages), BATCH))
    return [
        done.text.strip()
        for batch in batches
        for done in gj.generate(model, tokenizer, batch, max_new_tokens=8)
    ]


def score(clips: Sequence[Clip], texts: Sequence[str]) -> dict[str, float]:
    """Shares of digits that stand in their places, and of clips written down without a mistake."""
    right = [sum(a == b for a, b in zip(clip.text, text)) for clip, text in zip(clips, texts)]
    exact = [clip.text == text for clip, text in zip(clips, texts)]
    return {
        "digits": round(sum(right) / sum(len(clip.digits) for clip in clips), 4),
        "clips": round(float(np.mean(exact)), 4),
    }


def measure(model: gj.Gemma, tokenizer: Tokenizer, count: int) -> dict:
    """Scores on so many clips of held-out voices, on fewer of those of training, on pictures."""
    speaker = Speaker()
    clips = held_out(speaker, count)
    texts = transcripts(model, tokenizer, clips)
    own = {voice: slice(i, None, len(HELD_OUT)) for i, voice in enumerate(HELD_OUT)}
    known = held_out(speaker, count // 4, VOICES)
    silence = [silent(clip) for clip in clips[:BATCH]]
    return {
        "held_out_voices": score(clips, texts),
        "by_voice": {voice: score(clips[some], texts[some]) for voice, some in own.items()},
        "voices_of_training": score(known, transcripts(model, tokenizer, known)),
        "without_language": score(
            clips[:BATCH], transcripts(model, tokenizer, clips[:BATCH], TRANSCRIBE[1])
        ),
        "silence": score(silence, transcripts(model, tokenizer, silence)),
        "pictures": pictures_right(model, tokenizer, held_out_scenes(SCENES)),
    }


def save_samples(folder: Path) -> None:
    """A few clips of held-out voices and a held-out picture; the names say what is in them."""
    import soundfile

    clips = [clip for clip in held_out(Speaker(), len(HELD_OUT)) if len(clip.digits) > 1]
    for clip in clips[:SAMPLES]:
        name = f"{clip.voice.variant}-{clip.text}.wav"
        soundfile.write(folder / name, clip.samples, RATE, subtype="PCM_16")
    scene = next(scene for scene in held_out_scenes(100) if len(scene.digits) == 3)
    name = f"picture-{scene.answer('Read the digits.')}.png"
    PIL.Image.fromarray(scene.picture).save(folder / name, optimize=True)
