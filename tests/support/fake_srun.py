"""Local stand-in for srun: starts SLURM_NTASKS processes and forwards signals to all of them.

Exits with the highest exit code. Writes its process id to $FAKE_SLURM/srun.pid.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the command in all tasks of the step."""
    count = int(os.environ["SLURM_NTASKS"])
    command = [item for item in sys.argv[1:] if not item.startswith("--")]
    rest = sys.argv[sys.argv.index(command[0]) :]
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            rest,
            env={**os.environ, **step, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            start_new_session=True,
        )
        for number in range(count)
    ]
    for number in (signal.SIGTERM, signal.SIGUSR1):  # to the tasks and their children
        signal.signal(number, lambda n, _: [os.killpg(task.pid, n) for task in tasks])
    (Path(os.environ["FAKE_SLURM"]) / "srun.pid").write_text(str(os.getpid()))
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))


if __name__ == "__main__":
    main()
