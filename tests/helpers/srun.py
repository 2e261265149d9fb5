"""Stands in for Slurm's srun on one machine: a command in several processes, with the variables that JAX reads.

    SLURM_NTASKS=2 python tests/helpers/srun.py [--option ...] COMMAND ...

As under mpirun, only the first process has the standard input. A process that fails ends the others. What they print
comes at the end, one process after the other, so that their lines are whole.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time


def main(command: list[str]) -> int:
    while command[0].startswith("--"):
        command = command[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # From a job's id JAX would choose a port that may be taken on this machine.
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": str(port)}
    processes = int(os.environ["SLURM_NTASKS"])
    printed = [tempfile.TemporaryFile() for _ in range(processes)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | job | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            stdin=subprocess.DEVNULL if number else None,
            stdout=file,
        )
        for number, file in enumerate(printed)
    ]
    try:
        while any(process.poll() is None for process in started):
            if any(process.returncode for process in started):
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    for file in printed:
        file.seek(0)
        sys.stdout.write(file.read().decode())
    return max(abs(process.returncode) for process in started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
