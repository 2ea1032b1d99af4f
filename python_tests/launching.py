# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt` in several processes on the CPU, by the launchers and configurations that users have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from processes import free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from diffullama_ext.data import train_tokenizer

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Counter:\n    n = 0\n" * 40
SETTINGS = ["--model", "model", "--data", "text.txt", "--steps", "6", "--length", "16", "--save-steps", "2"]
SETTINGS += ["--learning-rate", "0.01", "--device", "cpu"]

# accelerate shards on accelerators only; from here on its FSDP2 is its own, over gloo. Then a process that dies. A run
# that ends well leaves no thread of the process group: one that outlives the interpreter may abort the process. Nor may
# DDP's wrapper be the last to hold the group: it waits for the threads while they wait for the GIL. Under FSDP2 and
# DeepSpeed caches of their own keep the group, so there the interpreter is not taken down.
PROGRAM = """
import gc, os, pathlib, signal, sys
import torch
import accelerate.state as state
from accelerate.utils import DistributedType
init = state.AcceleratorState.__init__
def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
state.AcceleratorState.__init__ = with_fsdp
from diffullama_ext.training import DiffusionTrainer
compute, at = DiffusionTrainer.compute_loss, int(os.environ.get("KILLED_AT", "-1"))
def compute_loss(self, *args, **kwargs):
    if self.state.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, *args, **kwargs)
DiffusionTrainer.compute_loss = compute_loss
destroy = torch.distributed.destroy_process_group
def destroy_process_group():
    assert not any(type(o) is torch.nn.parallel.DistributedDataParallel for o in gc.get_objects())
    destroy()
torch.distributed.destroy_process_group = destroy_process_group
from diffullama_ext.cli.main import main
try:
    main()
except SystemExit as end:
    if os.environ.keys() & {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"}:
        sys.stdout.flush(), sys.stderr.flush(), os._exit(end.code or 0)
    threads = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    assert end.code or not [name for name in threads if "gloo" in name], threads
    raise
"""


def demo_model(folder: Path, family: str = "gpt2") -> None:
    """A model, its text and the program in ``folder``; without dropout, whose draws differ between processes."""
    tokenizer = train_tokenizer([TEXT], 300, max_length=32)
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**common, **shape))
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        model = LlamaForCausalLM(LlamaConfig(**common, **shape, max_position_embeddings=32))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "program.py").write_text(PROGRAM)


def _environment(killed_at: int | None = None) -> dict[str, str]:
    given = os.environ | {"OMP_NUM_THREADS": "1", "DIFFULLAMA_CACHE": "cache", "DS_ACCELERATOR": "cpu"}
    given["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return given | ({} if killed_at is None else {"KILLED_AT": str(killed_at)})


def one_process(folder: Path, out: str, *options: str) -> None:
    """The batch of two processes, in one."""
    command = [sys.executable, "-W", "ignore", "program.py", "adapt", *SETTINGS, "--batch-size", "4"]
    command += ["--accumulate", "2", "--out", out, *options]
    subprocess.run(command, cwd=folder, env=_environment(), check=True, timeout=300, capture_output=True)


def launch(
    folder: Path, config: str, out: str, *options: str, killed_at: int | None = None, fails: bool = False
) -> None:
    """``accelerate launch`` of two CPU processes with a shipped configuration, in float32."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    settings |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True, "main_process_port": free_port()}
    environment = _environment(killed_at)
    (folder / f"{config}.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file", f"{config}.yaml"]
    if "fsdp_config" in settings:  # which `accelerate launch` drops on the CPU: the environment that it makes of it
        environment |= {name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()}
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        environment |= {"FSDP_STATE_DICT_TYPE": settings["fsdp_config"]["fsdp_state_dict_type"]}
        command = [*command[:4], "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command += ["program.py", "adapt", *SETTINGS, "--batch-size", "2", "--accumulate", "2", "--out", out, *options]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=300, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr


def launch_nodes(folder: Path, outs: list[str], *options: str) -> list[tuple[int, str]]:
    """``torchrun`` as on so many nodes of one process each: exit code and stderr of each."""
    port, agents = str(free_port()), []
    for node, out in enumerate(outs):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", str(len(outs))]
        command += ["--node_rank", str(node), "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
        command += ["--master_port", port, "program.py", "adapt", *SETTINGS, "--batch-size", "2", "--accumulate", "2"]
        command += ["--out", out, *options]
        with (folder / f"node{node}.log").open("w") as log:
            agents.append(subprocess.Popen(command, cwd=folder, env=_environment(), stdout=log, stderr=log))
    try:
        for agent in agents:
            agent.wait(timeout=240)
    except subprocess.TimeoutExpired:
        pass  # the logs say more
    finally:
        for agent in agents:
            agent.kill()  # its worker ends with it
    logs = [(folder / f"node{node}.log").read_text() for node in range(len(agents))]
    return [(agent.wait(), log) for agent, log in zip(agents, logs, strict=True)]


def assert_same_run(run: Path, one: Path) -> None:
    """Losses, gradient norms and the saved model, within sums of float32; plain transformers loads the model whole."""
    a, b = ([{name: entry[name] for name in ("loss", "grad_norm", "masked_nll")}
             for entry in json.loads((path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]]
            for path in (run, one))  # fmt: skip
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    model, found = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not model.config.is_causal
    weights = model.state_dict()
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
