# SPDX-License-Identifier: Apache-2.0
"""Child process of harness.peak_extra_bytes: prints the peak extra memory of one call. Linux only."""

import importlib
import re
import sys
from pathlib import Path


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def main(module: str, shape: str, contender: str) -> None:
    bench = importlib.import_module(module).BENCH
    inputs = bench.inputs(shape, "cpu")
    run = bench.contenders[contender]
    run(inputs)  # threads, libraries and autograd exist before the measurement
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _resident("VmRSS")
    result = run(inputs)
    print(_resident("VmHWM") - before)
    del result


if __name__ == "__main__":
    main(*sys.argv[1:])
