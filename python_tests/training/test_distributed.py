# SPDX-License-Identifier: Apache-2.0
"""Two processes compute what one does: losses, gradients and noise of the same global batch, under DDP and FSDP2."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from tiny_models import MASK_ID, VOCAB, causal_lm
from torch import Tensor, nn

from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SEED, STEP = 5, 3


def global_batch() -> dict[str, Tensor]:
    """Six samples, the last three almost all prompt: the halves have very different numbers of masked tokens."""
    generator = torch.Generator().manual_seed(1)
    maskable = torch.ones(6, 20, dtype=torch.bool)
    maskable[3:] = False
    maskable[5, 17:] = True
    x0 = torch.randint(VOCAB, (6, 20), generator=generator)
    return {"x0": x0, "maskable": maskable, "sample_index": torch.arange(40, 46)}


def wrapped(kind: str, model: nn.Module) -> Any:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def share(kind: str, normalizer: str, rank: int, count: int) -> dict[str, Any]:
    """Loss, gradients and masked tokens of one of ``count`` processes."""
    base = adapt(causal_lm("llama", tie_word_embeddings=True), mask_token=MASK_ID).train()
    model, objective = wrapped(kind, base), DiffusionObjective(ObjectiveConfig(MASK_ID, normalizer=normalizer))
    part = {name: tensor.chunk(count)[rank] for name, tensor in global_batch().items()}
    total = objective.denominator(**part, seed=SEED, step=STEP)
    if count > 1:
        torch.distributed.all_reduce(total)
    out = objective(model, **part, seed=SEED, step=STEP, attn_mask_ratio=0.5)
    (out.stats.weighted_sum / total * count).backward()  # wrappers average gradients over processes
    loss = out.stats.weighted_sum.detach() / total
    if count > 1:
        torch.distributed.all_reduce(loss)
    full = {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in base.named_parameters()}  # fmt: skip
    return {"loss": loss, "grads": full, "masked": out.masked, "t": out.t}


def in_two_processes(path: Path, kind: str, normalizer: str) -> list[dict[str, Any]]:
    code = f"""
import sys; sys.path += {sys.path!r}
import os, torch
from test_distributed import share
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.save(share({kind!r}, {normalizer!r}, rank, 2), {str(path)!r} + f"/{{rank}}.pt")
torch.distributed.destroy_process_group()
"""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    processes = [subprocess.Popen(command, env=shared | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "normalizer"), [("ddp", "tokens"), ("ddp", "masked"), ("fsdp2", "masked")])
def test_two_processes_are_one(tmp_path: Path, kind: str, normalizer: str) -> None:
    one, parts = share("none", normalizer, 0, 1), in_two_processes(tmp_path, kind, normalizer)
    for name in ("masked", "t"):  # the noise is the same for any split
        assert torch.equal(torch.cat([part[name] for part in parts]), one[name])
    counts = [int(part["masked"].sum()) for part in parts]
    assert counts[0] > 5 * max(counts[1], 1)
    for part in parts:
        torch.testing.assert_close(part["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        for name, grad in one["grads"].items():
            torch.testing.assert_close(
                part["grads"][name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_accelerate_reads_the_configs(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
