# SPDX-License-Identifier: Apache-2.0
"""Several processes compute what one does: losses, gradients and noise of a global batch, under DDP and FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from processes import run_processes
from tiny_models import MASK_ID, VOCAB, causal_lm
from torch import Tensor, nn

from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig
from diffullama_ext.objective.config import NORMALIZERS

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SEED, STEP = 5, 3
# (wrapper, normaliser, micro-batches of each process)
CASES = [("ddp", name, 1) for name in NORMALIZERS] + [
    ("ddp", "masked", 2),
    ("fsdp2", "tokens", 2),
    ("fsdp2", "masked", 1),
]


def global_batch(device: str) -> dict[str, Tensor]:
    """Eight samples, the last four almost all prompt: shares of it have very different numbers of masked tokens."""
    generator = torch.Generator().manual_seed(1)
    maskable = torch.ones(8, 20, dtype=torch.bool)
    maskable[4:] = False
    maskable[5, 17:] = True
    maskable[7, 10:14] = True
    x0 = torch.randint(VOCAB, (8, 20), generator=generator)
    batch = {"x0": x0, "maskable": maskable, "sample_index": torch.arange(40, 48)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def wrapped(kind: str, model: nn.Module, device: str) -> Any:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def share(kind: str, normalizer: str, micro: int, rank: int, count: int, device: str = "cpu") -> dict[str, Any]:
    """Loss, gradients and noise of one of ``count`` processes that takes its share in ``micro`` batches."""
    base = adapt(causal_lm("llama", tie_word_embeddings=True), mask_token=MASK_ID).train().to(device)
    model, objective = wrapped(kind, base, device), DiffusionObjective(ObjectiveConfig(MASK_ID, normalizer=normalizer))
    part = {name: tensor.chunk(count)[rank] for name, tensor in global_batch(device).items()}
    batches = [{name: tensor.chunk(micro)[i] for name, tensor in part.items()} for i in range(micro)]
    total = torch.stack([objective.denominator(**batch, seed=SEED, step=STEP) for batch in batches]).sum()
    if count > 1:
        torch.distributed.all_reduce(total)
    outs, loss = [], torch.zeros((), device=device)
    for batch in batches:
        out = objective(model, **batch, seed=SEED, step=STEP, attn_mask_ratio=0.5)
        (out.stats.weighted_sum / total * count).backward()  # wrappers average gradients over processes
        loss += out.stats.weighted_sum.detach() / total
        outs.append(out)
    if count > 1:
        torch.distributed.all_reduce(loss)
    full = {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in base.named_parameters()}  # fmt: skip
    made = {"loss": loss, "grads": full, "masked": torch.cat([out.masked for out in outs])}
    made["t"] = torch.cat([out.t for out in outs])
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, made)


def several_gpus() -> Any:
    reason = f"needs 2 GPUs, has {torch.cuda.device_count()}"
    return [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason=reason)]


def in_processes(path: Path, backend: str, count: int) -> list[dict[Any, dict[str, Any]]]:
    """Of each process, what it computed of each case; all cases in one start of the processes."""
    code = f"""
import torch
from test_distributed import CASES, share
torch.distributed.init_process_group({backend!r})
rank = torch.distributed.get_rank()
device = f"cuda:{{rank}}" if {backend!r} == "nccl" else "cpu"
if device != "cpu":
    torch.cuda.set_device(device)
torch.save({{case: share(*case, rank, {count}, device) for case in CASES}}, {str(path)!r} + f"/{{rank}}.pt")
torch.distributed.destroy_process_group()
"""
    run_processes(code, count)
    return [torch.load(path / f"{rank}.pt") for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "count"), [("gloo", 2), ("gloo", 4), pytest.param("nccl", 2, marks=several_gpus())]
)
def test_several_processes_are_one(tmp_path: Path, backend: str, count: int) -> None:
    processes = in_processes(tmp_path, backend, count)
    for case in CASES:
        one, parts = share("none", case[1], 1, 0, 1), [process[case] for process in processes]
        for name in ("masked", "t"):  # the noise is the same for any split
            assert torch.equal(torch.cat([part[name] for part in parts]), one[name]), case
        counts = [int(part["masked"].sum()) for part in parts]
        assert counts[0] > 3 * max(counts[-1], 1)
        for part in parts:
            torch.testing.assert_close(part["loss"], one["loss"], rtol=1e-5, atol=1e-6)
            for name, grad in one["grads"].items():
                torch.testing.assert_close(
                    part["grads"][name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=(case, name): f"{n}: {m}"
                )


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_accelerate_reads_the_configs(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
