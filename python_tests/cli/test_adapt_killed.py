# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt`, killed before each renaming and each folder that goes, then started again."""

import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

SETTINGS = (
    "--steps",
    5,
    "--length",
    16,
    "--batch-size",
    4,
    "--learning-rate",
    0.01,
    "--schedule",
    "constant_with_warmup",
)
SETTINGS += ("--save-steps", 2, "--eval-steps", 2, "--save-total-limit", 1, "--device", "cpu")

# Forks, so that what takes seconds to import is imported once. argv: the command.
PROGRAM = """
import os, signal, sys
import accelerate, datasets, peft, transformers
from diffullama_ext.cli import adapt_run, main
import diffullama_ext.training

command = sys.argv[1:]
out = command[-1]


def adapt(place):
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seen = []

    def hook(event, arguments):
        if event in ("os.rename", "shutil.rmtree") and out in str(arguments[0]):
            seen.append(event)
            if len(seen) == place:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.argv = ["diffullama", *command]
    try:
        main.main()
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code or 0)


place = 1
while True:
    codes = [adapt(place)]
    if codes == [0]:
        break
    if not os.path.exists(out + "/metrics.json"):
        codes.append(adapt(None))
    assert codes in ([-signal.SIGKILL, 0], [-signal.SIGKILL]), (place, codes)
    os.rename(out, f"{out}{place}")
    place += 1
print(place - 1)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_as_if_it_were_not(models, text_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models / "gpt2")
    model.config.resid_pdrop = 0.1  # so that torch's own random state matters
    model.save_pretrained(tmp_path / "model")
    for file in (models / "gpt2").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    command = ("adapt", "--model", tmp_path / "model", "--data", text_file, *SETTINGS, "--out", tmp_path / "run")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, *(str(word) for word in command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    places = int(done.stdout.splitlines()[-1])
    assert places > 20
    names = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*"))
    contents = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "curves.json")}
    contents["metrics.json"] = (tmp_path / "run" / "metrics.json").read_bytes()
    for place in range(1, places + 1):
        run = tmp_path / f"run{place}"
        assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == names, place
        for name, content in contents.items():
            assert (run / name).read_bytes() == content, (place, name)
