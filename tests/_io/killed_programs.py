"""Programs in processes of their own that are killed at random moments."""

import random
import signal
import subprocess
import sys
import time

__all__ = ["kill_at_random"]


def kill_at_random(program, times, within):
    """Start a program so often, and kill it some seconds (of a range) after it printed "ready"."""
    chance = random.Random(0)
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(*within))
        process.kill()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
