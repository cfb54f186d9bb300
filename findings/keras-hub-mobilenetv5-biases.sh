#!/usr/bin/env bash
# Expected: the vision tower that keras-hub builds for Gemma 3n has as many parameters as timm's
# mobilenetv5_300m_enc, whose weights it loads: 294,126,912, where the convolution of the stem alone
# has a bias (64 numbers).
# Seen with keras-hub 0.32.0: 294,284,096. Every convolution that a normalisation follows has a bias
# as well, 157,184 numbers that no published file holds: they stay zero until someone trains them.
# So parameter totals of Gemma 3n counted with keras-hub (5,439,595,456 and 7,850,135,376) lie 157,184
# above those of the files.
# Exits with 0 while all of this is so, and with 1 when not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "keras-hub==0.32.0" "keras==3.15.1" "jax[cpu]==0.10.2"
KERAS_BACKEND=jax "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import keras
import keras_hub
import numpy as np
from keras_hub.src.models.mobilenetv5.mobilenetv5_backbone import MobileNetV5Backbone
from keras_hub.src.utils.transformers import convert_gemma3n

IN_TIMM, ITS_STEM = 294_126_912, 64
keras.config.set_dtype_policy("bfloat16")
config = convert_gemma3n.MODEL_CONFIGS["mobilenetv5_300m_enc"]
tower = MobileNetV5Backbone(**config, image_shape=(768, 768, 3))
biases = {w.path: np.asarray(w) for w in tower.weights if w.path.endswith("/bias")}
inner = {path: bias for path, bias in biases.items() if not path.startswith("conv_stem")}
numbers = sum(bias.size for bias in inner.values())

print("keras-hub", keras_hub.__version__, "keras", keras.__version__)
print(f"parameters: {tower.count_params():,}, in timm {IN_TIMM:,}")
print(f"convolutions with a bias besides the stem: {len(inner)}, {numbers:,} numbers")
so = tower.count_params() - IN_TIMM == numbers == 157_184
so = so and sum(bias.size for bias in biases.values()) == numbers + ITS_STEM
so = so and not any(np.any(bias) for bias in inner.values())
sys.exit(0 if so else 1)
PYTHON
