"""`skipstone train`, started by torchrun, with a process that fails in a step.

    torchrun --nproc-per-node 2 crashing.py HOW RANK STEP train RECIPE.yaml ...

HOW: raise (an error), kill (SIGKILL), or slow (an error, while the other processes are in a step that takes minutes).
"""

from __future__ import annotations

import os
import signal
import sys
import time

from skipstone_cli.main import main
from train.tool import at_step


def fail(how: str, failing: bool) -> None:
    """Let this process fail in a step if `failing`; else go on, or take minutes for the step if `how` is "slow".

    how: "raise", "kill" or "slow", as in the module's docstring.
    """
    if failing and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if failing:
        raise ZeroDivisionError("the error of the process that failed")
    if how == "slow":
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            time.sleep(0.1)


if __name__ == "__main__":
    how, rank, step, *words = sys.argv[1:]
    sys.argv = ["skipstone", *words]
    with at_step(int(step), lambda: fail(how, os.environ["RANK"] == rank)):
        main()
