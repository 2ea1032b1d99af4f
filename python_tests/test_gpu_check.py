# SPDX-License-Identifier: Apache-2.0
"""The GPU script without a GPU: its stages, what it makes of reports, its table; and a dry run."""

import copy
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("benchmarks", reason="no benchmarks beside the tests")

from benchmarks import gpu_bench, gpu_check, gpu_reports, gpu_stages, gpu_training
from benchmarks.gpu_agreement import agree
from benchmarks.gpu_peers import peers_of
from benchmarks.gpu_table import table
from benchmarks.training_step import own_loss, plain_loss
from diffullama_ext.benchmarking import CASES
from diffullama_ext.integrations import adapt

CPU = torch.device("cpu")

# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stages replaced; each notes what it was called with."""
    called: dict[str, Any] = {}

    def stage(name: str, facts: dict[str, Any]):
        def run(context: gpu_stages.Context) -> dict[str, Any]:
            called[name] = context
            if name == "tests":
                raise RuntimeError("broken\nstage")
            return facts

        return run

    made = {name: stage(name, {"problems": [], "missing": []}) for name in gpu_stages.STAGES}
    monkeypatch.setattr(gpu_check, "STAGES", made)
    return called


def test_one_stage_alone(stages: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert gpu_check.main([str(out), "--stage", "build"]) == 0
    assert list(stages) == ["build"]
    assert stages["build"].device == "cuda"
    assert json.loads((out / "gpu_check.json").read_text())["stages"]["build"]["problems"] == []
    assert (out / "gpu_check.txt").read_text().startswith("build    ok (0 s): built nothing, all was there")


def test_a_failing_stage_keeps_what_others_wrote(
    stages: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main([str(tmp_path), "--stage", "machine"]) == 0
    assert gpu_check.main([str(tmp_path), "--stage", "tests"]) == 1
    written = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert list(written) == ["machine", "tests"]
    assert written["tests"]["problems"] == ["RuntimeError: broken stage"]
    assert "Traceback" in (tmp_path / "tests.log").read_text()
    assert "tests    1 problems" in capsys.readouterr().out
    assert gpu_check.main([str(tmp_path), "--stage", "machine"]) == 0  # the exit code is of the stage that ran


def test_all_stages_run_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process a stage; one that dies or hangs is a problem, and the next still runs."""
    commands = []

    def process(command: list[str], timeout: float, **_: Any) -> Any:
        stage = command[command.index("--stage") + 1]
        commands.append(stage)
        assert timeout <= 480
        if stage == "build":
            raise gpu_check.subprocess.TimeoutExpired(command, timeout)
        if stage not in ("sanitize",):
            gpu_check._record(tmp_path, stage, {"problems": [], "seconds": 1.0})
        return gpu_check.subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(gpu_check.subprocess, "run", process)
    assert gpu_check.main([str(tmp_path)]) == 1
    assert commands == list(gpu_stages.STAGES) == ["machine", "build", "tests", "sanitize", "bench", "train"]
    written = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert written["build"]["problems"] == ["took too long and wrote nothing"]
    assert written["sanitize"]["problems"] == ["ended with -11 and wrote nothing"]
    assert written["bench"]["problems"] == []


# --- build -----------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_built(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    assert gpu_stages.missing_targets(tmp_path) == ["diffullama_cpu", "diffullama_cuda", "_C"]
    (library / "libdiffullama_cpu.so").touch()
    (library / "libdiffullama_cuda.so").touch()
    (tmp_path / "_C.cpython-27-x86_64-linux-gnu.so").touch()  # of another Python
    assert gpu_stages.missing_targets(tmp_path) == ["_C"]
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert gpu_stages.missing_targets(tmp_path) == []


def test_the_module_alone_needs_no_nvcc(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "kernel_resources.json").write_text('{"cuda": "13.0.88", "archs": "80 90"}')
    command = gpu_stages.configure_command(tmp_path, tmp_path / "tree", ["_C"])
    assert {"-DDIFFULLAMA_WITH_CUDA=OFF", "-DDIFFULLAMA_BUILT_CUDA=13.0.88", "-DDIFFULLAMA_BUILT_ARCHS=80 90"} <= set(
        command
    )
    command = gpu_stages.configure_command(tmp_path, tmp_path / "tree", ["diffullama_cuda", "_C"])
    assert "-DDIFFULLAMA_WITH_CUDA=ON" in command
    assert not [word for word in command if "BUILT" in word]


# --- reports ---------------------------------------------------------------------------------------------------------

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="ops.test_a" name="good" time="0.5"/>
<testcase classname="ops.test_a" name="bad" time="2.5"><failure message="assert 1 == 2&#10; long">x</failure></testcase>
<testcase classname="ops.test_b" name="broken" time="0.1"><error message="fixture">x</error></testcase>
<testcase classname="ops.test_b" name="left" time="0.0"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_junit(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    facts = gpu_reports.read_junit(path)
    assert (facts["tests"], facts["passed"], facts["skipped"]) == (4, 1, 1)
    assert facts["failed"] == {"ops.test_a::bad": "assert 1 == 2 long", "ops.test_b::broken": "fixture"}
    assert next(iter(facts["slowest"])) == "ops.test_a::bad"


SANITIZER = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void diffullama::f_kernel<float>(diffullama::P)+0x70 in f.cu:12
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x3] in libdiffullama_cuda.so
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at sm90_xmma_gemm_bf16+0x10
=========         Host Frame: diffullama::gemm [0x3] in libdiffullama_cuda.so
=========
========= Error: Race reported between Write access at diffullama::g_kernel()+0x1 and Read access at x [4 hazards]
========= ERROR SUMMARY: 3 errors
"""


def test_sanitizer_findings_in_our_kernels_count(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(SANITIZER)
    facts = gpu_reports.read_sanitizer(path)
    assert (facts["ours"], facts["others"]) == (2, 1)
    assert facts["first"][0].startswith("Invalid __global__ read of size 4 bytes | at void diffullama::f_kernel")
    assert "Race reported" in facts["first"][1]
    assert gpu_reports.read_sanitizer(tmp_path / "none") == {"ours": 0, "others": 0, "first": []}
    path.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert gpu_reports.read_sanitizer(path)["ours"] == 0


# --- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", gpu_bench.ROWS, ids=lambda row: f"{row.op} {row.sizes}")
def test_every_row_is_a_case_with_a_peer(row: gpu_bench.Row) -> None:
    case = CASES[row.op].at(**row.sizes)
    assert peers_of(row.op, case.shape)
    assert row.goal != gpu_bench.Goal()


def record(**changes: Any) -> dict[str, Any]:
    sizes = {"V": 1000, "H": 100}
    base = {"op": "x", "shape": sizes, "dtype": "bfloat16", "contender": "ext", "median_s": 1e-3, "share": 0.8}
    return base | {"bound": "copy", "peak_extra_bytes": 1_400_000} | changes


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (gpu_bench.Goal(), []),
        (gpu_bench.Goal(ms=1.0, share=0.8, extra_mb=1.0), []),
        (gpu_bench.Goal(ms=0.9), ["over 0.9 ms"]),
        (gpu_bench.Goal(share=0.85), ["under 85 %"]),
        (gpu_bench.Goal(extra_mb=0.9), ["over 0.9 MB"]),  # 1.4 MB less the 0.4 of a float32 gradient
    ],
)
def test_goals(goal: gpu_bench.Goal, expected: list[str]) -> None:
    case = CASES["linear_shifted_cross_entropy"].at(V=1000, H=100)
    assert gpu_bench.missed(record(), goal, case) == expected
    assert gpu_bench.missed({"error": "oh"}, goal, case) == ["not measured"]


def test_table_shows_losing_and_failing_rows() -> None:
    goal = {"ms": None, "share": 0.85, "extra_mb": None}
    records = [
        record(goal=goal, missed=["under 85 %"]),
        record(contender="eager", median_s=5e-5, peak_extra_bytes=None),
        {"op": "x", "shape": {"V": 1}, "dtype": None, "contender": "CCE", "error": "ImportError: none"},
    ]
    lines = table({"copy_bandwidth": 4.2e12, "gemm_rate": 770e12}, records).splitlines()
    assert lines[0].startswith("copies 4.200 TB/s, multiplies 770.0 TFLOP/s")
    assert lines[3].split("  ")[-1] == "MISSED: under 85 %"
    assert "1.000 ms" in lines[3]
    assert ">= 85%" in lines[3]
    assert "50.0 us" in lines[4]
    assert "0.05x" in lines[4]
    assert lines[5].endswith("ImportError: none")


def test_a_contender_that_fails_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise ValueError("out of\nmemory")

    monkeypatch.setattr(gpu_bench, "peers_of", lambda *_: {"broken": broken, "liar, law": lambda i: (i.x0, ~i.x0 > 0)})
    row = gpu_bench.Row("mask_tokens", {})
    _, records = gpu_bench.bench_rows([row], CPU, seconds=0.0, report=lambda _: None)
    ours, failing, lying = records
    assert ours["median_s"] > 0
    assert failing["error"] == "ValueError: out of memory"
    assert lying["error"].startswith("AssertionError: ")
    assert "median_s" not in lying


def test_no_time_left() -> None:
    _, records = gpu_bench.bench_rows(gpu_bench.ROWS[:1], CPU, seconds=0.0, minutes=0.0, report=lambda _: None)
    assert {record["error"] for record in records} == {"TimeoutError: no time left"}


@pytest.mark.ext
@pytest.mark.parametrize("index", [0, 1, 2, 7, 10, 11, 13, 14, 15, 19])
def test_peers_agree(index: int) -> None:
    """Everything of a GPU's row but its shape and the compiled peers."""
    _, records = gpu_bench.bench_rows([gpu_bench.ROWS[index]], CPU, seconds=0.0, report=lambda _: None)
    assert len(records) >= 2
    assert not [record["error"] for record in records if "error" in record]


def test_disagreement_is_seen() -> None:
    loss, gradient = torch.tensor(1.0), torch.ones(3)
    agree("linear_shifted_cross_entropy", {}, (loss, gradient, gradient), (loss, 1.01 * gradient, gradient))
    for wrong in (1.1 * gradient, gradient * torch.nan):
        with pytest.raises(AssertionError, match="dhidden differs"):
            agree("linear_shifted_cross_entropy", {}, (loss, gradient, gradient), (loss, wrong, gradient))


@pytest.mark.parametrize(("faster", "n_missed"), [(1e-9, 0), (1e9, 1)])
def test_training_rows(faster: float, n_missed: int) -> None:
    """Both contenders run whole steps of a small model; a goal out of reach is said to be missed."""
    small = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    row = gpu_training.Row("small", lambda: GPT2LMHeadModel(small), 4, 16, 299, faster=faster, memory=1.0)
    record = gpu_training.compare(row, CPU)
    assert len(record["missed"]) == n_missed
    for contender in (gpu_training.OURS, gpu_training.PLAIN):
        assert record[contender]["tokens_per_s"] == pytest.approx(64 / record[contender]["median_s"])
    assert record["faster"] == record[gpu_training.PLAIN]["median_s"] / record[gpu_training.OURS]["median_s"]


def test_both_losses_of_the_training_benchmark_are_estimates_of_one_thing() -> None:
    """Of a model whose output no attention changes, over many draws of the noise."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=0, n_head=2, embd_pdrop=0.0)
    config.initializer_range = 0.5
    plain = GPT2LMHeadModel(config)
    own = adapt(copy.deepcopy(plain), mask_token=49)
    x0 = torch.randint(49, (64, 16))
    losses = {plain_loss(49): plain, own_loss(49, 64): own}
    with torch.no_grad():
        draws = [torch.stack([loss(model.train(), x0, step) for step in range(100)]) for loss, model in losses.items()]
    error = sum(d.var() / len(d) for d in draws) ** 0.5
    assert abs(draws[0].mean() - draws[1].mean()) < 4 * error
    assert error < 0.05 * draws[0].mean()


def test_gpu_stage_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    context = gpu_stages.Context(tmp_path, "cuda", gpu_stages.time.monotonic() + 60)
    assert gpu_stages.machine(context)["problems"] == ["torch finds no CUDA device"]
