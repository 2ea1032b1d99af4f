# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion training in plain PyTorch: bytes of Python's documentation, one op for each step of the method."""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from diffullama_ext import AttentionMask, attention, linear_shifted_cross_entropy, mask_tokens
from diffullama_ext.objective import draw_t
from diffullama_ext.schedules import AttentionAnnealing

LAYERS, LENGTH, WIDTH, HEADS, SEED = 2, 64, 128, 4, 0
MASK_ID, VOCAB = 256, 257  # 256 bytes, then the mask


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(0.05 * torch.randn(VOCAB, WIDTH))  # also the head
        self.position = nn.Parameter(0.05 * torch.randn(LENGTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )

    def forward(self, ids: Tensor, mask: AttentionMask) -> Tensor:
        x = self.token[ids] + self.position  # [B, L, WIDTH]
        for layer in range(LAYERS):
            qkv = self.qkv[layer](self.norms[2 * layer](x))
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each [B, HEADS, L, D]
            x = x + attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = x + self.mlp[layer](self.norms[2 * layer + 1](x))
        return self.norms[-1](x)


def main(steps: int = 300, batch: int = 16, anneal_steps: int = 100) -> list[float]:
    torch.manual_seed(SEED)
    data = torch.tensor(list("\n".join(topics.values()).encode()))
    model, annealing, nll = Model(), AttentionAnnealing(anneal_steps), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        x0 = data[torch.randint(len(data) - LENGTH, (batch, 1)) + torch.arange(LENGTH)]
        sample_index = step * batch + torch.arange(batch)
        t = draw_t(sample_index, SEED, strata=batch)
        xt, masked, _, _ = mask_tokens(x0, t, mask_id=MASK_ID, seed=SEED, sample_index=sample_index)
        hidden = model(xt, AttentionMask.annealed(LENGTH, annealing(step), seed=SEED, step=step))
        loss, stats = linear_shifted_cross_entropy(hidden, model.token, x0, masked, loss_weight=1 / t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nll.append((stats.nll_sum / stats.n_scored).item())
    return nll


if __name__ == "__main__":
    print([round(value, 2) for value in main()[::20]])
