"""Work in processes of its own that are killed at random moments."""

import os
import random
import signal
import subprocess
import sys
import time

__all__ = ["kill_at_random"]

SERVER = """
import os, sys
import torch._dynamo  # optimizers import it when they are made: once here, and not in every fork
imports, work = sys.argv[1:]
exec(imports)
for _ in sys.stdin:
    child = os.fork()
    if not child:
        exec(work)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def kill_at_random(imports, work, times, within):
    """Begin a work so often, and kill it some seconds (of a range) later; it must be still at work.

    Args:
        imports: statements that a process runs once; it computes nothing, as its threads would not survive a fork.
        work: statements that each of its forks runs.
        times: how many forks.
        within: the least and the most seconds.
    """
    chance = random.Random(0)
    command = [sys.executable, "-c", SERVER, imports, work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        for _ in range(times):
            server.stdin.write("\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            time.sleep(chance.uniform(*within))
            os.kill(child, signal.SIGKILL)
            assert int(server.stdout.readline()) == signal.SIGKILL
