# SPDX-License-Identifier: Apache-2.0
"""The kernel of mask_tokens as it is agrees with a loop on the host; broken in one place, it is found out."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from host_compiler import CSRC, build, run

SOURCES = ("noising/noising_kernel.cu", "testing/mutations/mask_tokens.cu")


class Mutation(NamedTuple):
    """One edit of one file, and a word of what it leads to."""

    path: str
    old: str
    new: str
    outcome: str = "differs"
    variant: str = "sanitized"


KERNEL, BLOCK = "noising/noising_kernel.cu", "common/cuda_block.cuh"
MUTATIONS = {
    "no barrier before the warps' sums are read": Mutation(
        BLOCK, "shared[threadIdx.x / kWarp] = v;\n  __syncthreads();", "shared[threadIdx.x / kWarp] = v;"
    ),
    "no barrier before the warps' sums are reused": Mutation(
        BLOCK, "__syncthreads();  // shared may still be read from an earlier call", ""
    ),
    "no barrier before the warps' sums are reused, as a race": Mutation(
        BLOCK, "__syncthreads();  // shared may still be read from an earlier call", "", "ThreadSanitizer", "races"
    ),
    "no grid barrier": Mutation(KERNEL, "cooperative_groups::this_grid().sync();", "", "AddressSanitizer"),
    "shifted position": Mutation(KERNEL, "p.positions[slot++] = i;", "p.positions[++slot] = i;"),
    "shifted input": Mutation(KERNEL, "p.mask_id : p.x0[i]", "p.mask_id : p.x0[i + 1]"),
    "dropped bound of the row": Mutation(KERNEL, "if (position >= p.L) break;", "", "AddressSanitizer"),
    "dropped bound of the block": Mutation(KERNEL, "if (i < end) write_item", "write_item", "AddressSanitizer"),
    "barrier in a loop whose trips differ": Mutation(
        KERNEL, "first < end; first += kThreads", "first + threadIdx.x < end; first += kThreads", "thread ("
    ),
    "signed overflow": Mutation(KERNEL, "{index / items_per_row,", "{(index << 60) / items_per_row,", "runtime error"),
}


def test_kernel_as_it_is(variant: str) -> None:
    assert run(build(SOURCES, variant)) == (0, "agrees\n")


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    root = tmp_path / "csrc"
    for folder in ("common", "noising", "testing"):
        shutil.copytree(CSRC / folder, root / folder)
    path = root / mutation.path
    text = path.read_text()
    assert mutation.old in text, "the kernel has changed: change the mutation"
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    assert mutation.outcome in run(build(SOURCES, mutation.variant, root=root))[1]
