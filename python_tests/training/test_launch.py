# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt` by accelerate's FSDP2 and by torchrun on two nodes: the run of one process."""

from pathlib import Path

import pytest
import torch
from launching import assert_same_run, demo_model, launch, launch_nodes, one_process
from test_trainer import resumes_on_cpus
from transformers import AutoModelForCausalLM


@pytest.mark.slow
@resumes_on_cpus
def test_fsdp2_is_one_process_and_goes_on(tmp_path: Path) -> None:
    """Killed after its second checkpoint, started again."""
    demo_model(tmp_path)
    one_process(tmp_path, "one")
    launch(tmp_path, "fsdp2", "cut", killed_at=5, fails=True)
    assert (tmp_path / "cut" / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()  # a shard of each process
    launch(tmp_path, "fsdp2", "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--lora-rank", "2"], ["--compile"]], ids=["lora", "compiled"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_fsdp2_saves_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    demo_model(tmp_path, "llama")
    one_process(tmp_path, "one", *options)
    launch(tmp_path, "fsdp2", "run", *options)
    merged, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run", "one"))
    torch.testing.assert_close(merged.state_dict(), one.state_dict(), rtol=1e-3, atol=1e-4)
    assert merged.config.mask_token_id == one.config.mask_token_id
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.slow
def test_two_nodes_are_one_process(tmp_path: Path) -> None:
    demo_model(tmp_path)
    one_process(tmp_path, "one")
    (code, first), (other_code, second) = launch_nodes(tmp_path, ["nodes", "nodes"])
    assert (code, other_code) == (0, 0), first + second
    assert_same_run(tmp_path / "nodes", tmp_path / "one")
    assert "The adapted model is in" in first
    assert "The adapted model is in" not in second


@pytest.mark.slow
def test_what_fails_on_one_node_ends_all(tmp_path: Path) -> None:
    """Before the processes meet, where the others would wait for half an hour."""
    demo_model(tmp_path)
    (tmp_path / "of node 1").mkdir()
    (tmp_path / "of node 1" / "something").touch()
    (code, first), (other_code, second) = launch_nodes(tmp_path, ["of node 0", "of node 1"])
    message = "of node 1 is not empty; give another --out"
    assert code > 0, first
    assert other_code > 0, second
    assert f"diffullama: 1 of 2 processes failed; process 1: {message}" in first
    assert f"diffullama: {message}" in second
    assert not (tmp_path / "of node 0").exists()


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_see(tmp_path: Path) -> None:
    demo_model(tmp_path)
    for code, log in launch_nodes(tmp_path, ["of node 0", "of node 1"]):
        assert code > 0, log
        assert "output_dir must be on a file system that all nodes see, but 1 of 2 processes do not see" in log
    assert not list(tmp_path.glob("of node *[01]/checkpoint-*"))
