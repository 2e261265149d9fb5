"""Kills conversions at random points, by the clock and by what they do to files, and looks at what is left.

    PYTHONPATH=tests python tests/convert/kills.py FOLDER COUNT SEED

Prints how many were killed by what they did to files; the clock may be too late. Children are forked, so that none of
them has to import anything.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

from checkpoints import hashes
from tqdm import tqdm

from jaxgen import CheckpointError, convert
from jaxgen.checkpoint.source import open_checkpoint

# A progress bar takes its lock even if it is disabled. By default forked children share it, and may be killed with it.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.flock"}


def work(source: Path, target: Path, back: bool, resume: bool) -> None:
    function = convert.convert_to_hugging_face if back else convert.convert_checkpoint
    function(source, target, workers=2, resume=resume, overwrite=True)


def killed(source: Path, target: Path, back: bool, resume: bool, *, after: float | int) -> bool:
    """Whether a child was killed: after so many seconds, or at its n-th change of a file."""
    child = os.fork()
    if child == 0:
        if isinstance(after, int):
            count = 0

            def hook(event: str, arguments: object) -> None:
                nonlocal count
                count += event in CHANGES
                if count == after and event in CHANGES:  # once: a kill is an event too
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
        try:
            work(source, target, back, resume)
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    if isinstance(after, float):
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def check_leftovers(folder: Path, complete: list[dict[str, str]]) -> None:
    """What is there is whole, or it does not load."""
    for left in folder.glob("*target*"):
        if (left / "config.json").exists():
            assert hashes(left) in complete, left
            continue
        try:
            open_checkpoint(left)
        except CheckpointError:
            continue
        raise AssertionError(f"{left} loads")


def main(folder: Path, count: int, seed: int) -> int:
    source, native, target = folder / "source", folder / "native", folder / "target"
    before = hashes(source)
    work(source, native, False, False)
    start = time.perf_counter()
    work(source, target, False, False)
    duration = time.perf_counter() - start
    shutil.rmtree(target)
    results = {False: hashes(native), True: before}
    rng = random.Random(seed)
    dead = 0
    for number in range(count):
        back, old = bool(rng.getrandbits(1)), bool(rng.getrandbits(1))
        complete = [results[back]]
        if old:  # there is something to overwrite
            shutil.copytree(native if back else source, target)
            complete.append(hashes(target))
        origin = native if back else source
        for attempt in range(rng.choice([1, 1, 3])):
            after = rng.uniform(0, duration) if number % 2 else rng.randrange(150)
            was_killed = killed(origin, target, back, attempt > 0, after=after)
            dead += was_killed and isinstance(after, int)
            check_leftovers(folder, complete)
        if (folder / "target.partial").exists() or not target.exists() or hashes(target) != results[back]:
            work(origin, target, back, True)
        assert hashes(target) == results[back]
        assert hashes(source) == before
        assert hashes(native) == results[False]
        shutil.rmtree(target)
        shutil.rmtree(folder / ".target.replaced", ignore_errors=True)  # killed after its end, before it had swept
        (folder / ".target.journal").unlink(missing_ok=True)
        assert sorted(folder.iterdir()) == [native, source]
    return dead


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
