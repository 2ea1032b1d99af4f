# SPDX-License-Identifier: Apache-2.0
"""What the straight-line versions of the policies have in common: one row, plain Python numbers."""

import math

import torch

from diffullama_ext.sampling import fill

VOCAB, MASK = 11, 10
TAG_UNMASK, TAG_CHOICE = 4, 7


def one_row(length, rate=1.0, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randint(0, VOCAB - 1, (1, length), generator=generator)
    masked = torch.rand(1, length, generator=generator) < rate
    masked[:, 0] = False
    return xt, masked


def start(xt, masked):
    """Ids with masks, and the positions that may be written."""
    ids = [MASK if m else i for i, m in zip(xt[0].tolist(), masked[0].tolist(), strict=True)]
    return ids, [j for j, m in enumerate(masked[0].tolist()) if m]


class Prediction:
    """Of one position: the distribution without the mask, in float64."""

    def __init__(self, logits):
        allowed = [-math.inf if v == MASK else value for v, value in enumerate(logits)]
        top = max(allowed)
        total = sum(math.exp(value - top) for value in allowed)
        self.p = [math.exp(value - top) / total for value in allowed]
        self.token = max(range(len(self.p)), key=lambda v: allowed[v])
        ordered = sorted(allowed, reverse=True)
        self.gap = ordered[0] - ordered[1]
        self.prob, self.second = sorted(self.p, reverse=True)[:2]
        self.margin = self.prob - self.second
        self.entropy = -sum(p * math.log(p) for p in self.p if p > 0)

    def kl(self, other):
        return sum(p * math.log(p / q) for p, q in zip(self.p, other.p, strict=True) if p > 0)


def predict(denoise, ids, shift=True):
    """{position: Prediction}, of every position that a row of logits scores."""
    rows = denoise(torch.tensor([ids]))[0].double().tolist()
    return {j + shift: Prediction(row) for j, row in enumerate(rows) if j + shift < len(ids)}


def best(positions, key):
    """By falling key, ties to the lowest position."""
    return sorted(positions, key=lambda j: (-key(j), j))


def philox_word(seed, sample, position, step, tag=TAG_UNMASK):
    """One 32-bit word of Philox4x32-10 in plain integers; counter (position / 4, sample, tag, step)."""
    c, k = [position // 4, sample, tag, step], [seed & 0xFFFFFFFF, seed >> 32]
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
    return c[position % 4]


def uniform(seed, sample, position, step):
    """The number in (0, 1) of a policy's own choices."""
    return (philox_word(seed, sample, position, step, TAG_CHOICE) + 0.5) / 2**32


def assert_fills(expected, denoise, xt, masked, policy, *, nfe=None, **options):
    """fill's greedy text is the expected one; more rows of the same tokens do not change it."""
    filled = fill(denoise, xt, masked, mask_id=MASK, policy=policy, **{"temperature": 0.0} | options)
    assert filled.xt[0].tolist() == expected
    if nfe is not None:
        assert filled.nfe.tolist() == [nfe]
    return filled
