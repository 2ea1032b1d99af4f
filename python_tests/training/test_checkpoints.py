# SPDX-License-Identifier: Apache-2.0
"""A run survives kill -9 and a full disk; a checkpoint that is not its own or not whole is refused."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from test_trainer import adapted, curve, examples, resumes_on_cpus, run_in_processes, trained, weights
from tiny_models import MASK_ID
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from diffullama_ext.objective import ObjectiveConfig
from diffullama_ext.training import DiffusionTrainer
from diffullama_ext.training.checkpoints import MANIFEST, STAGING, checkpoints, clear

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 9, "save_total_limit": 2}
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}  # so that torch's own random state matters

# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path += {path!r}
from pathlib import Path
from transformers import TrainerCallback
from test_trainer import adapted, examples, trained
import diffullama_ext.training.trainer as trainer
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if {when!r} == "saving":
    commit, count = trainer.commit, []
    def dying(*arguments):
        count.append(1)
        die() if len(count) == 3 else commit(*arguments)
    trainer.commit = dying
else:
    compute, steps = trainer.DiffusionTrainer.compute_loss, []
    def dying(self, *a, **k):
        return die() if self.state.global_step == 5 else compute(self, *a, **k)
    trainer.DiffusionTrainer.compute_loss = dying
trained(Path({out!r}), adapted("gpt2", **{dropout!r}), train_dataset=examples({samples}), **{changed!r})
"""


@pytest.mark.parametrize("when", ["training", "saving"])
def test_kill_9_changes_nothing(tmp_path: Path, when: str) -> None:
    out = tmp_path / "run"
    code = KILLED.format(path=sys.path, when=when, out=str(out), dropout=DROPOUT, changed=SAVING, samples=18)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    assert (out / STAGING).exists() == (when == "saving")

    resumed = trained(out, adapted("gpt2", **DROPOUT), resume=True, **SAVING)
    whole = trained(tmp_path / "whole", adapted("gpt2", **DROPOUT), **SAVING)
    assert len(curve(whole)) == 9
    assert curve(resumed) == curve(whole)
    assert curve(resumed, "grad_norm") == curve(whole, "grad_norm")
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-8", "checkpoint-9"]


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    """Killed as it had given the last checkpoint its name, or while processes looked whether they share the folder."""
    trained(tmp_path, **SAVING)
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-6")
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / STAGING / "checkpoint-4")
    (tmp_path / ".shared").touch()
    trained(tmp_path, resume=True, **SAVING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-8", "checkpoint-9"]


@pytest.mark.parametrize("stop", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["an error", "a kill"])
def test_a_checkpoint_that_was_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    """Stopped between the two renames: the old one gets its name back, at once or when the run goes on."""
    settings = SAVING | {"max_steps": 4, "save_steps": 4}
    trained(tmp_path, **settings)
    manifest, rename = tmp_path / "checkpoint-4" / MANIFEST, Path.rename
    inode = manifest.stat().st_ino

    def stopped(path: Path, target: Path) -> Path:
        if path.name == Path(target).name:  # not of the old one's way back
            raise stop
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(type(stop)):
        trained(tmp_path, **settings)
    if isinstance(stop, KeyboardInterrupt):
        assert not manifest.exists()
        clear(tmp_path)
    assert manifest.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.slow
@resumes_on_cpus
def test_kill_9_of_the_main_one_of_two_processes(tmp_path: Path) -> None:
    """While it saves, before the checkpoint has its name; the other one fails, and both start again."""
    shared = SAVING | {"per_device_train_batch_size": 2}
    out = tmp_path / "run"
    code = KILLED.format(path=sys.path, when="saving", out=str(out), dropout=DROPOUT, changed=shared, samples=16)
    run_processes(code, 2, exit_codes=(-signal.SIGKILL, 1))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    resumed = run_in_processes(out, 2, model={"family": "gpt2"} | DROPOUT, resume=True, **shared)
    (tmp_path / "whole").mkdir()
    whole = run_in_processes(tmp_path / "whole", 2, model={"family": "gpt2"} | DROPOUT, **shared)
    assert len(whole[0]) == 9
    assert resumed[0] == whole[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed[1], whole[1], strict=True))


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 9}, {"max_steps": 10}, {"max_steps": -1, "num_train_epochs": 1.7}],
    ids=["in an epoch", "an epoch's end", "epochs"],
)
def test_a_run_that_has_all_its_steps_makes_no_other(tmp_path: Path, length: dict) -> None:
    """Killed after its last checkpoint, and started again."""
    changed = SAVING | length | {"lr_scheduler_type": "constant"}
    whole = trained(tmp_path, **changed)
    left = checkpoints(tmp_path)
    resumed = trained(tmp_path, resume=True, **changed)
    assert resumed.state.global_step == whole.state.global_step
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert checkpoints(tmp_path) == left


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow: what a full disk or a quota does, under the real writers."""
    trained(tmp_path, **SAVING | {"max_steps": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be saved: .*nothing of it is kept; .*checkpoint-2"):
            trained(tmp_path, resume=True, **SAVING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert len(curve(trained(tmp_path, resume=True, **SAVING))) == 9


@pytest.mark.parametrize("call", ["torch.save", "os.fsync"])
def test_a_disk_that_fills_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The weights fit; the optimiser's state does not, or only the flush finds out."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be saved: .*No space left.*no earlier checkpoint"):
        trained(tmp_path, **SAVING)
    assert not list(tmp_path.iterdir())


# --- torn and foreign checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    trained(out, **SAVING | {"max_steps": 4})
    return out


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            cut("model.safetensors"),
            r"is torn: model\.safetensors has \d+ of \d+ bytes; other checkpoints: checkpoint-2",
        ),
        (lambda folder: (folder / "optimizer.pt").unlink(), r"is torn: optimizer\.pt has 0 of \d+ bytes"),
        (cut(MANIFEST), r"is torn: diffullama\.json is not readable"),
        (lambda folder: (folder / MANIFEST).unlink(), r"is no checkpoint of DiffusionTrainer: it has no diffullama"),
    ],
    ids=["cut", "a file gone", "manifest cut", "of another program"],
)
def test_torn_checkpoints_are_refused(run: Path, tmp_path: Path, damage: Callable, message: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "run", resume=True, **SAVING)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 3}, "seed was 42, is 3"),
        ({"anneal_steps": 9}, "anneal_steps was 5, is 9"),
        ({"objective": ObjectiveConfig(MASK_ID, normalizer="masked")}, r"objective was \{.*'tokens'.*is \{.*'masked'"),
        ({"train_dataset": examples(17)}, "samples was 18, is 17"),
        ({"train_dataset": examples(18)[::-1]}, "digest of some samples was"),
        (
            {"train_dataset": [e | {"maskable": torch.arange(len(e["input_ids"])) > 2} for e in examples(18)]},
            "digest of some samples was",
        ),
        ({"per_device_train_batch_size": 2}, "samples a step was 4, is 2"),
    ],
    ids=["seed", "annealing", "objective", "fewer samples", "other samples", "other prompts", "batch"],
)
def test_another_runs_checkpoint_is_refused(run: Path, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint-4 belongs to another run: .*{message}"):
        trained(run, resume=True, **SAVING | changed)


def test_a_remainder_that_is_dropped_belongs_to_the_run(tmp_path: Path) -> None:
    """18 samples make 4 steps of 4 an epoch, or 5 of 2 times 2."""
    changed = SAVING | {"dataloader_drop_last": True}
    trained(tmp_path, **changed | {"max_steps": 4})
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="drop_last of micro-batches of was 4, is 2"):
        trained(tmp_path, resume=True, **changed | split)
    with pytest.raises(ValueError, match="drop_last of micro-batches of was 4, is None"):
        trained(tmp_path, resume=True, **SAVING)
    assert len(curve(trained(tmp_path, resume=True, **changed))) == 9


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        trained(tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_is_pushed_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload reads its files while training goes on."""
    pushed = []

    def push(self: Trainer, folder: str) -> None:
        pushed.append((folder, (Path(folder) / MANIFEST).is_file(), (tmp_path / STAGING).exists()))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    trained(tmp_path, push_to_hub=True, **SAVING | {"max_steps": 4})
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True, False) for step in (2, 4)]


BEST = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


def evaluating_to(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    loop, given = DiffusionTrainer.evaluation_loop, iter(losses)

    def evaluation_loop(self: DiffusionTrainer, *arguments: Any, **options: Any) -> Any:
        output = loop(self, *arguments, **options)
        return output._replace(metrics=output.metrics | {"eval_loss": next(given)})

    monkeypatch.setattr(DiffusionTrainer, "evaluation_loop", evaluation_loop)


def test_rotation_keeps_the_best_checkpoint_and_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluating_to([2.0, 1.0, 4.0, 3.0], monkeypatch)
    kept = []

    class Kept(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            kept.append([path.name for path in checkpoints(tmp_path)])

    changed = {"eval_steps": 2, "save_total_limit": 1, "max_steps": 8}
    trainer = trained(tmp_path, callbacks=[Kept()], **SAVING | BEST | changed)
    assert kept == [["checkpoint-2"], ["checkpoint-4"], ["checkpoint-4", "checkpoint-6"],
                    ["checkpoint-4", "checkpoint-8"]]  # fmt: skip
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


def test_the_best_step_that_was_saved_is_loaded_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 is better than step 3, but has no checkpoint."""
    evaluating_to([5.0, 5.0, 3.0, 1.0, 2.0, 4.0], monkeypatch)
    changed = {"eval_steps": 1, "save_steps": 3, "max_steps": 6}
    trainer = trained(tmp_path, **SAVING | BEST | changed)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), weights(trainer), strict=True))
