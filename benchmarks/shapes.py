# SPDX-License-Identifier: Apache-2.0
"""The shapes of the benchmarks, in one place. The first of each op is the one its target speaks of."""

import torch

F32 = torch.float32

TOKENS = {
    "64x2048": {"batch": 64, "length": 2048},
    "8x512": {"batch": 8, "length": 512},
}
MASKS = {
    "2048": {"length": 2048},
    "512": {"length": 512},
}
ATTENTION = {
    "2x8x512x64": {"batch": 2, "heads": 8, "length": 512, "width": 64, "dtype": F32},
    "1x8x1024x64": {"batch": 1, "heads": 8, "length": 1024, "width": 64, "dtype": F32},
}
# GPT-2's vocabulary on a small width too: there the head is most of the work.
LOSS = {
    "4x512x256x16384": {"batch": 4, "length": 512, "width": 256, "vocab": 16384, "p": 0.5, "dtype": F32},
    "4x512x256x16384-p0.15": {"batch": 4, "length": 512, "width": 256, "vocab": 16384, "p": 0.15, "dtype": F32},
    "4x512x256x16384-p1": {"batch": 4, "length": 512, "width": 256, "vocab": 16384, "p": 1.0, "dtype": F32},
    "1x256x128x50257": {"batch": 1, "length": 256, "width": 128, "vocab": 50257, "p": 0.5, "dtype": F32},
}
LOSS_HALF = {name: LOSS[name] for name in list(LOSS)[:2]}
LOGITS = {
    "256x32000-top-p": {"rows": 256, "vocab": 32000, "temperature": 0.9, "top_p": 0.9, "dtype": F32},
    "256x32000": {"rows": 256, "vocab": 32000, "temperature": 1.0, "top_p": 1.0, "dtype": F32},
    "64x2048-top-p": {"rows": 64, "vocab": 2048, "temperature": 0.9, "top_p": 0.9, "dtype": F32},
}
UNMASK = {
    "64x2048-quota": {"batch": 64, "length": 2048, "rule": "quota", "amount": 64.0},
    "64x2048-threshold": {"batch": 64, "length": 2048, "rule": "threshold", "amount": 0.9},
    "64x2048-factor": {"batch": 64, "length": 2048, "rule": "factor", "amount": 1.0},
    "8x256-quota": {"batch": 8, "length": 256, "rule": "quota", "amount": 8.0},
}
# GPT-2's vocabulary, half of the positions masked, 32 steps left.
_STEP = {"batch": 16, "length": 256, "vocab": 50257, "steps": 32}  # eager takes seconds for the first, 25 for the last
SAMPLING_STEP = {
    "16x256x50257-llada": _STEP | {"policy": "confidence", "temperature": 0.0, "top_p": 1.0},
    "16x256x50257-diffullama": _STEP | {"policy": "random", "temperature": 0.9, "top_p": 0.9},
}
