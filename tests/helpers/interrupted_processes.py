"""One of several processes in which one at a time interrupts a call, breaks off a stream, or fails.

    python tests/helpers/interrupted_processes.py FOLDER ADDRESS PROCESSES PROCESS FAULTS

FAULTS is a JSON list of "interrupt", "stream", "streamer", "processor", "argument" and "difference". After each fault a
call must give the right tokens.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxgen

SECONDS = 10  # within which all processes must have ended a call, once one has stopped it


class Broken(Exception):
    pass


class BrokenStreamer:
    """Fails after some tokens."""

    def __init__(self, tokens: int):
        self.left = tokens

    def put(self, value: np.ndarray) -> None:
        self.left -= 1
        if self.left < 0:
            raise Broken("the streamer broke")

    def end(self) -> None:
        pass


def main(folder: Path, address: str, processes: int, process: int, faults: list[str]) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(address, processes, process)
    alone = jaxgen.load(folder)
    shape = (processes, 2) if len(faults) % 2 else (1, 2 * processes)  # rows of their own, or the same rows
    model = jaxgen.load(folder, mesh=jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor")))
    ids = [[5, 6, 7]]
    long = {"max_new_tokens": 900, "eos_token_id": None}
    expected = jaxgen.generate(alone, ids, max_new_tokens=8)
    np.testing.assert_array_equal(jaxgen.generate(model, ids, max_new_tokens=8), expected)
    jaxgen.generate(model, ids, **long)  # compiles
    allowed = lambda row, tokens: list(range(3, 60))
    rng = np.random.default_rng(len(faults))
    ended = 0
    for number, fault in enumerate(faults):
        victim, moment = number % processes, rng.random()
        if fault == "processor" and shape[0] == 1:
            victim = 0  # with the same rows in all processes, the function of the first one runs
        outcome, started = "whole", time.monotonic()
        try:
            if process == victim:
                start_fault(fault, model, ids, long, moment, allowed)
            elif fault == "processor" and shape[0] == 1:
                jaxgen.generate(model, ids, prefix_allowed_tokens_fn=allowed, **long)
            else:
                jaxgen.generate(model, ids, **long)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        print(f"process {process}, {number}: {fault} in {victim}, after {seconds:.1f} s: {outcome:.150}", flush=True)
        assert seconds < SECONDS, (fault, seconds)
        if fault == "difference":
            assert outcome.startswith("ValueError: `max_time` is "), outcome
        elif process == victim:
            wanted = {"interrupt": "KeyboardInterrupt", "stream": "whole", "argument": "ValueError"}.get(
                fault, "Broken"
            )
            assert outcome.startswith(wanted), (fault, outcome)
        else:
            assert f"process {victim} stopped this call" in outcome, (fault, outcome)
            ended += 1
        np.testing.assert_array_equal(jaxgen.generate(model, ids, max_new_tokens=8), expected, err_msg=fault)
    print(f"process {process}: {ended} calls ended by another process", flush=True)
    jax.distributed.shutdown()


def start_fault(fault: str, model: Any, ids: Any, long: dict[str, Any], moment: float, allowed: Any) -> None:
    if fault == "interrupt":
        timer = threading.Timer(moment * 0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        jaxgen.generate(model, ids, **long)
        timer.join()
    elif fault == "stream":
        for number, _ in enumerate(jaxgen.stream(model, ids, **long)):
            if number == int(moment * 8):
                break
    elif fault == "streamer":
        jaxgen.generate(model, ids, streamer=BrokenStreamer(int(moment * 300)), **long)
    elif fault == "processor":
        jaxgen.generate(model, ids, prefix_allowed_tokens_fn=breaking(int(moment * 100)), **long)
    elif fault == "difference":
        jaxgen.generate(model, ids, max_time=60.0, **long)
    else:
        jaxgen.generate(model, ids, temperature=-1.0, do_sample=True, **long)


def breaking(after: int) -> Any:
    def allowed(row: int, tokens: np.ndarray) -> list[int]:
        if len(tokens) > 3 + after:
            raise Broken("the function broke")
        return list(range(3, 60))

    return allowed


if __name__ == "__main__":
    folder, address, processes, process, faults = sys.argv[1:]
    main(Path(folder), address, int(processes), int(process), json.loads(faults))
