# SPDX-License-Identifier: Apache-2.0
"""Only the loss of existing code is replaced: same value and gradients, no logits [B, L, V] in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffullama_ext import linear_shifted_cross_entropy


def before(hidden: Tensor, head: Tensor, x0: Tensor, masked: Tensor, t: Tensor) -> Tensor:
    """What training code of the DiffuLLaMA kind does."""
    logits = hidden @ head.T  # [B, L, V]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), x0[:, 1:], reduction="none")  # [B, L - 1]
    return (nll * masked[:, 1:] / t[:, None]).sum() / masked[:, 1:].sum()


def after(hidden: Tensor, head: Tensor, x0: Tensor, masked: Tensor, t: Tensor) -> Tensor:
    """The same in one op. normalizer="tokens" would make it the ELBO per token."""
    loss, _ = linear_shifted_cross_entropy(hidden, head, x0, masked, loss_weight=1 / t, normalizer="masked")
    return loss


def main() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(loss, gradient of hidden, gradient of the head), before and after."""
    torch.manual_seed(0)
    x0, masked, t = torch.randint(500, (4, 64)), torch.rand(4, 64) < 0.5, torch.rand(4) * 0.9 + 0.1
    results = []
    for loss_of in (before, after):
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(4, 64, 32, generator=generator, requires_grad=True)
        head = torch.randn(500, 32, generator=generator, requires_grad=True)
        loss = loss_of(hidden, head, x0, masked, t)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    return results


if __name__ == "__main__":
    print([result[0].item() for result in main()])
