# SPDX-License-Identifier: Apache-2.0
"""Several processes of one program, as torchrun starts them."""

import os
import socket
import subprocess
import sys

# Not by the interpreter's own end: threads of gloo that outlive it may abort the process.
PROGRAM = """
import os, sys, traceback
sys.path += {path!r}
exit_code = 0
try:
    exec(sys.argv[1])
except BaseException:
    traceback.print_exc()
    exit_code = 1
sys.stdout.flush(), sys.stderr.flush(), os._exit(exit_code)
"""


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return probe.getsockname()[1]


def run_processes(code: str, count: int, exit_codes: tuple[int, ...] | None = None, **environment: str) -> None:
    """``code`` in ``count`` processes that find each other and the tests; each must end as said (None: with 0)."""
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), **environment}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(path=sys.path), code]
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)
    ]
    try:
        assert tuple(process.wait(timeout=240) for process in processes) == (exit_codes or (0,) * count)
    finally:
        for process in processes:
            process.kill()
            process.wait()
