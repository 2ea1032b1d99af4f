# SPDX-License-Identifier: Apache-2.0
"""The reference itself: cases small enough to work out by hand, and identities with torch's own functions."""

import math

import pytest
import torch
from torch import Tensor

from diffullama_ext.reference import attention, attention_mask, noising, shifted_cross_entropy, unmasking

KEY = torch.tensor([0])


def test_mask_tokens_by_hand() -> None:
    """Seed 0, sample 0: the words of counter (0, 0, TAG_NOISE, 0) decide the first four positions."""
    words = noising.noise_words(4, KEY, torch.tensor([0]))[0]
    second = int(words.argsort()[1])
    between = (int(words.sort().values[1]) + 1) / 2**32  # masks exactly the two smallest words
    p_mask = torch.tensor([[between]], dtype=torch.float64).expand(1, 4)
    xt, masked, positions, counts = noising.mask_tokens(
        torch.tensor([[10, 11, 12, 13]]), p_mask, None, KEY, torch.tensor([0]), 99
    )
    chosen = sorted([int(words.argmin()), second])
    assert masked[0].nonzero().flatten().tolist() == chosen
    assert xt[0].tolist() == [99 if j in chosen else 10 + j for j in range(4)]
    assert positions.tolist() == [*chosen, -1, -1]
    assert counts.tolist() == [2]


def test_pack_mask_by_hand() -> None:
    allowed = torch.zeros(1, 1, 34, dtype=torch.bool)
    allowed[0, 0, [0, 3, 31, 33]] = True
    assert attention_mask.pack_mask(allowed).tolist() == [[[1 + 8 - 2**31, 2]]]


def test_attention_by_hand() -> None:
    """Two keys with scores 0 and ln 3: weights 1/4 and 3/4; a query of no key gives 0."""
    q = torch.tensor([[[[1.0], [1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3.0)]]]])
    v = torch.tensor([[[[8.0], [4.0]]]])
    allowed = torch.tensor([[[True, True], [False, True], [False, False]]])
    out, lse = attention.attention(q, k, v, allowed, None, 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.25 * 8 + 0.75 * 4, 4.0, 0.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(4.0), math.log(3.0), -math.inf]))


def test_shifted_cross_entropy_by_hand() -> None:
    """Row 0 gives token 1 the probability 3/4, row 1 gives token 0 one half; row 2 predicts nothing with the shift."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, -9.0]]])
    x0, masked = torch.tensor([[0, 1, 0]]), torch.ones(1, 3, dtype=torch.bool)
    nll = shifted_cross_entropy.shifted_cross_entropy(logits, x0, masked, True)
    torch.testing.assert_close(nll, torch.tensor([[0.0, math.log(4.0 / 3.0), math.log(2.0)]]))
    unshifted = shifted_cross_entropy.shifted_cross_entropy(logits, x0, masked, False)
    torch.testing.assert_close(unshifted, torch.tensor([[math.log(4.0), math.log(2.0), math.log1p(math.exp(-18.0))]]))


def test_token_stats_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4: entropy 1.5 ln 2, gap ln 2."""
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    _, _, _, p1, p2, gap, entropy, lse, current = unmasking.token_stats(
        logits, torch.tensor([2]), torch.tensor([0]), KEY, KEY, 1.0, 0, 1.0, -1
    )
    got = torch.cat([p1, p2, gap, entropy, lse, current])
    ln2 = math.log(2.0)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.25, ln2, 1.5 * ln2, 2 * ln2, 0.25]))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_annealed_ends_are_torch_attention(ratio: float) -> None:
    """Ratio 0 is causal and 1 is full scaled_dot_product_attention."""
    q, k, v = (torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(3))
    words = attention_mask.annealed_mask(20, torch.tensor([ratio]), KEY, KEY)
    out, _ = attention.attention(q, k, v, attention_mask.unpack_mask(words, 20), None, 8**-0.5)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=ratio == 0.0)
    torch.testing.assert_close(out, sdpa)


def test_attention_gradcheck() -> None:
    q, k, v = (torch.randn(1, h, 4, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    allowed = torch.rand(1, 4, 4) < 0.6
    allowed[0, 2] = False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attention(q, k, v, allowed, torch.tensor([[True, True, True, False]]), 0.7)[0]

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_loss_without_masking_is_torch_cross_entropy() -> None:
    hidden, weight, bias = torch.randn(2, 6, 4), torch.randn(9, 4), torch.randn(9)
    x0, masked = torch.randint(0, 9, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    nll = shifted_cross_entropy.linear_shifted_cross_entropy(hidden, weight, bias, x0, masked, False)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    torch.testing.assert_close(nll, expected)
