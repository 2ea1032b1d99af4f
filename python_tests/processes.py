# SPDX-License-Identifier: Apache-2.0
"""Several processes of one program, as torchrun starts them."""

import os
import random
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
    """Below those that Linux gives to connections, which another test could be given before the launcher listens."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        try:
            with socket.create_server(("localhost", port)):
                return port
        except OSError:
            continue
    raise OSError("no free port among a hundred of 20000 to 31999")


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
