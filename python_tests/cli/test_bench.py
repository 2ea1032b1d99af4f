# SPDX-License-Identifier: Apache-2.0
"""`diffullama bench`."""

import json

import pytest
import torch

from diffullama_ext.cli.bench import parse_shape

QUICK = ("--device", "cpu", "--seconds", 0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_time_and_share_are_shown(run, impl) -> None:
    result = run("bench", "--op", "mask_tokens", "--shape", "B=3,L=65", "--impl", impl, *QUICK)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["op"] == f"mask_tokens, impl {impl}"
    assert lines["shape"] == "B=3 L=65"
    assert "% of the copy bandwidth" in lines["rate"]
    assert "median" in lines["time"]


@pytest.mark.ext
def test_the_plan_is_shown(run) -> None:
    result = run("bench", "--op", "linear_shifted_cross_entropy", "--dtype", "bfloat16", *QUICK)
    assert result.exit_code == 0, result.output
    assert "chunk_gradient_kernel" in result.stdout
    assert "matrix-product rate" in result.stdout or "copy bandwidth" in result.stdout
    assert "bfloat16" in result.stdout


def test_json(run) -> None:
    shape = "N=5,V=70,temperature=0.7,top_p=0.5"
    result = run("bench", "--op", "token_stats", "--shape", shape, "--json", *QUICK)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["shape"] == {"N": 5, "V": 70, "temperature": 0.7, "top_k": 0, "top_p": 0.5}
    assert record["median_s"] > 0
    assert record["bytes"] >= 5 * 70 * 4
    assert record["peaks"]["copy_bandwidth"] > 0
    assert "kernels" not in record


@pytest.mark.ext
@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_profile(run, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    options = ("--shape", "B=2,rule=factor", "--profile", "--trace", trace)
    result = run("bench", "--op", "unmask", *options, *QUICK)
    assert result.exit_code == 0, result.output
    assert "traceEvents" in trace.read_text()
    (command,) = [line for line in result.stdout.splitlines() if line.startswith("ncu: ")]
    assert "regex:^(unmask_kernel)$" in command
    assert "--shape B=2,rule=factor" in command
    assert "--device cuda" in command


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--op", "softmax"), "--op must be one of mask_tokens, "),
        (("--op", "unmask", "--shape", "B"), "--shape must be like N=4096,V=32000, got 'B' in it"),
        (("--op", "unmask", "--shape", "V=3"), "unmask has no size 'V'; it has B, L, rule, amount"),
        (("--op", "unmask", "--dtype", "int8"), "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (("--op", "unmask", "--impl", "fast"), "--impl must be auto, ext or reference, got 'fast'"),
        (("--op", "unmask", "--nvtx", "--device", "cpu"), "--nvtx needs a CUDA device"),
    ],
)
def test_bad_usage(fails, arguments, text) -> None:
    fails(2, (text,), "bench", *arguments)


def test_shape() -> None:
    assert parse_shape("") == {}
    assert parse_shape("N=4096, top_p=0.9,rule=quota,p=1e-3") == {"N": 4096, "top_p": 0.9, "rule": "quota", "p": 1e-3}
    assert isinstance(parse_shape("N=4")["N"], int)


@pytest.mark.cuda
def test_on_cuda(run, tmp_path) -> None:
    result = run("bench", "--op", "mask_tokens", "--profile", "--trace", tmp_path / "t.json", "--nvtx", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["device"] == torch.cuda.get_device_name()
    assert any("mask_tokens_kernel" in kernel["name"] for kernel in record["kernels"])
    assert record["calls"] > 1
    assert 0 < record["share"] < 1.2
