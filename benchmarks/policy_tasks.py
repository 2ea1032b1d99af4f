# SPDX-License-Identifier: Apache-2.0
"""Tasks whose answers are right or wrong, and a small model trained on each in a minute or two of CPU."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from diffullama_ext import linear_shifted_cross_entropy, mask_tokens
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import draw_t

START, MASK_ID, VOCAB = 10, 11, 12  # behind the ten digits


@dataclass(frozen=True)
class Task:
    """Sequences [n, L] int64 with the start token in column 0, what of them is to be filled, and when that is right.

    Attributes:
        draw: (n, held_out, generator) -> x0.
        trained: bool [L], what is masked in training, at any rate.
        puzzle: (x0, generator) -> bool [n, L], what is to be filled in a test.
        right: (filled, x0) -> bool [n].
    """

    name: str
    about: str
    draw: Callable[[int, bool, torch.Generator], Tensor]
    trained: Tensor
    puzzle: Callable[[Tensor, torch.Generator], Tensor]
    right: Callable[[Tensor, Tensor], Tensor]


def addition(digits: int) -> Task:
    """a + b = c in columns, least significant first: a0 b0 c0 a1 b1 c1 ..., then c's last digit; all of c to be filled.

    Pairs whose sum is a multiple of 7 are held out.
    """
    columns = torch.arange(3 * digits + 2)
    trained = (columns > 0) & ((columns % 3 == 0) | (columns == 3 * digits + 1))

    def draw(n: int, held_out: bool, generator: torch.Generator) -> Tensor:
        pairs = torch.randint(10**digits, (20 * n + 100, 2), generator=generator)
        a, b = pairs[(pairs.sum(dim=1) % 7 == 0) == held_out][:n].T
        powers = 10 ** torch.arange(digits + 1)
        by_digit = torch.stack((a, b, a + b), dim=1)[:, None] // powers[:, None] % 10  # [n, digits + 1, 3]
        written = torch.cat((by_digit[:, :-1].flatten(1), by_digit[:, -1, 2:]), dim=1)
        return F.pad(written, (1, 0), value=START)

    return Task(
        "addition",
        f"the {digits + 1} digits of the sum of two {digits}-digit numbers",
        draw,
        trained,
        lambda x0, generator: trained.expand_as(x0),
        lambda filled, x0: (filled == x0).all(dim=1),
    )


def sudoku(givens: int) -> Task:
    """4x4 grids with ``givens`` cells shown; right is any valid grid that keeps them. 48 of the 288 are held out."""
    grids = all_grids()
    grids = grids[torch.randperm(len(grids), generator=torch.Generator().manual_seed(0))]

    def draw(n: int, held_out: bool, generator: torch.Generator) -> Tensor:
        own = grids[:48] if held_out else grids[48:]
        return F.pad(own[torch.randint(len(own), (n,), generator=generator)], (1, 0), value=START)

    def puzzle(x0: Tensor, generator: torch.Generator) -> Tensor:
        hidden = torch.rand(len(x0), 16, generator=generator).argsort(dim=1).argsort(dim=1) >= givens
        return F.pad(hidden, (1, 0), value=False)

    return Task(
        "sudoku",
        f"4x4 Sudoku from {givens} cells, {16 - givens} to fill; any valid grid is right",
        draw,
        torch.arange(17) > 0,
        puzzle,
        lambda filled, x0: valid_grids(filled[:, 1:]),
    )


def valid_grids(cells: Tensor) -> Tensor:
    """Whether each row, column and 2x2 box holds 1 to 4; cells int64 [n, 16] -> bool [n]."""
    grid = cells.view(-1, 4, 4)
    boxes = grid.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    groups = torch.cat((grid, grid.transpose(1, 2), boxes), dim=1)  # [n, 12, 4]
    return (groups.sort(dim=2).values == torch.arange(1, 5)).flatten(1).all(dim=1)


def all_grids() -> Tensor:
    """The 288 valid grids, int64 [288, 16]."""
    rows = torch.tensor(list(itertools.permutations(range(1, 5))))  # [24, 4]
    grids = rows[torch.cartesian_prod(*[torch.arange(24)] * 4)].flatten(1)
    return grids[valid_grids(grids)]


def small_model(length: int) -> GPT2LMHeadModel:
    """GPT-2 of 3 layers x 96, made a diffusion model before any training."""
    shape = {"n_positions": length, "n_embd": 96, "n_layer": 3, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCAB, bos_token_id=START, eos_token_id=START, **shape, **dropout)
    return adapt(GPT2LMHeadModel(config), mask_token=MASK_ID)


def train(task: Task, *, steps: int, batch: int = 128, learning_rate: float = 2e-3, seed: int = 0) -> GPT2LMHeadModel:
    """A model of the task by the masked diffusion loss (weight 1/t); prints the loss as it goes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = small_model(len(task.trained))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    begun, loss_sum = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        x0 = task.draw(batch, False, generator)
        sample_index = step * batch + torch.arange(batch)
        t, maskable = draw_t(sample_index, seed, strata=batch), task.trained.expand_as(x0)
        xt, masked, _, _ = mask_tokens(
            x0, t, mask_id=MASK_ID, maskable=maskable.contiguous(), seed=seed, sample_index=sample_index
        )
        loss, _ = linear_shifted_cross_entropy(
            model.transformer(xt).last_hidden_state,
            model.lm_head.weight,
            x0,
            masked,
            loss_weight=1 / t,
            normalizer=float(maskable.sum()),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.item()
        if step % (steps // 5) == 0:
            seconds = time.perf_counter() - begun
            print(f"{task.name}: step {step}, loss {5 * loss_sum / steps:.3f}, {seconds:.0f} s", flush=True)
            loss_sum = 0.0
    return model.eval()
