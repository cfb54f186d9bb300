"""`gemma-jax encode-audio`: what the audio tower reads of sound files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common

if TYPE_CHECKING:
    from gemma_jax.audio.waves import Audio
    from gemma_jax.encoder_config import SoundProcessing


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Sound files.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="Safetensors file to write.")],
    model: Annotated[str | None, common.settings_of("Gemma 3n")] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Cut clips that are too long at quiet places.")
    ] = False,
) -> None:
    """Decode sound files and compute their mel frames.

    Writes input_features, float32 [clips, frames, mels], and input_features_mask, bool [clips,
    frames]: true where a frame begins within the clip. All are filled up with silence to the
    longest. A clip of more than 30 s is refused, or cut by --split, which adds num_clips, int64
    [files].
    """
    import numpy as np

    from gemma_jax.atomic_files import replacing
    from gemma_jax.audio.mel import NUM_MELS, log_mel_batch
    from gemma_jax.encoder_config import SoundProcessing

    sounds, num_mels = SoundProcessing(), NUM_MELS
    if model is not None:
        audio = common.find_config(model)[0].audio
        if audio is None:
            raise ValueError(f"{model} has no audio tower")
        sounds, num_mels = audio.sounds, audio.num_mels
    with replacing(output) as path:
        clips = [_parts(file, sounds, split) for file in files]
        samples = [part.samples for parts in clips for part in parts]
        features, mask = log_mel_batch(samples, sounds, num_mels)
        arrays = {"input_features": features, "input_features_mask": mask}
        if split:
            arrays["num_clips"] = np.array([len(parts) for parts in clips], np.int64)
        common.save_arrays(arrays, path, output)


def _parts(file: Path, sounds: "SoundProcessing", split: bool) -> "list[Audio]":
    """The clips of a file, at the rate and of the length that the tower takes."""
    from gemma_jax.audio.waves import split_at_quiet

    clip = common.read_clip(file).at(sounds.sampling_rate)
    longest = sounds.max_samples / sounds.sampling_rate
    if len(clip.samples) > sounds.max_samples and not split:
        raise ValueError(
            f"{file} is {clip.seconds:.1f} s long; expected at most {longest:g} s: give --split"
        )
    return split_at_quiet(clip, longest)
