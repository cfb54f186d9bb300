#!/usr/bin/env bash
# Expected: an MP3 read in blocks through soundfile gives the samples that one read of all gives.
# Seen with soundfile 0.14.0 (libsndfile 1.2.2 in its wheel): it does not. SoundFile.read(n) seeks
# after each block to where it stands already, and the MP3 decoder begins anew there, without what
# it knows of the frame before. Of a tone at half of the full scale, 4,096 samples at a time, the
# first block is right; from its end on samples are off by up to 0.59. WAV and FLAC are the same
# either way, and so is the MP3 if the file says that it cannot be sought in.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "soundfile==0.14.0" "numpy==2.4.6"
"$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import io
import sys

import numpy as np
import soundfile

RATE, BLOCK = 16_000, 4_096
tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(4 * RATE) / RATE)).astype(np.float32)
print("soundfile", soundfile.__version__, "libsndfile", soundfile.__libsndfile_version__)


def in_blocks(data, seeks):
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        if not seeks:
            file.seekable = lambda: False
        parts = [file.read(BLOCK, dtype="float32") for _ in range(0, file.frames, BLOCK)]
        return np.concatenate(parts)


off = {}
for form in ("WAV", "FLAC", "MP3"):
    made = io.BytesIO()
    soundfile.write(made, tone, RATE, format=form)
    data = made.getvalue()
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    for seeks in (True, False):
        error = float(np.abs(in_blocks(data, seeks) - whole).max())
        off[form, seeks] = error
        print(f"{form:5}{'sought in' if seeks else 'not sought in':15} off by up to {error:.2f}")
broken = {key for key, error in off.items() if error > 0.01}
sys.exit(0 if broken == {("MP3", True)} else 1)
PYTHON
