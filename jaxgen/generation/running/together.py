"""Runs a call that several processes run together: all of them agree that it can begin, go on and end.

While it runs, every process sends a ballot with each chunk of steps, and reads the ballots of all with the chunk's
progress. So nobody waits for a ballot, and what is decided is the same everywhere:

    process 0   | prefill  ballot | chunk  ballot | chunk  ballot | ...
    process 1   | prefill  ballot | chunk  ballot | chunk  ballot | ...
                                 read with the progress of the prefill: how long the next chunk is, and who stops
"""

import hashlib
import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen.base import Model
from jaxgen.decoding.loop import Progress
from jaxgen.exchange import exchange, received, send
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.request import Request
from jaxgen.generation.running.driver import Chunks, ChunkSchedule, Run, drive
from jaxgen.generation.running.interrupts import interrupts
from jaxgen.generation.running.processes import Processes

# What a process wants; the largest number decides.
_GO_ON, _ENOUGH, _FAILED = 0, 1, 2


class _Ballot(NamedTuple):
    """What a process says with each chunk; as int32 [3].

    Attributes:
        verdict: one of the numbers above.
        finished: whether the rows of its group are finished.
        steps: the number of steps that it wants the next chunk to have.
    """

    verdict: int
    finished: bool
    steps: int


def prepare_together(
    processes: Processes, model: Model, request: Request, prepare: Callable[[Model, Request], PreparedCall]
) -> PreparedCall:
    """The call of this process, once all processes have prepared theirs and found that they fit together.

    Raises:
        ValueError: if something differs that has to be the same.
        RuntimeError: if another process could not prepare its call.
    """
    request = replace(request, entropy=processes.entropy())
    prepared, failure, facts = None, None, {}
    with interrupts.held_back(passed_on=True):  # to the run of the call, which the others begin
        try:
            if request.synced_gpus is False:
                raise ValueError(
                    "`synced_gpus`=False asks every process to go on alone, but the processes of a mesh run a call "
                    "together. Leave it out, or load the model on a mesh of this process's own devices."
                )
            assistant = _own_assistant(processes, model, request.assistant_model)
            prepared = prepare(processes.own(model), replace(request, assistant_model=assistant))
            facts = {"all": _facts_of_all(model, prepared), "group": _facts_of_group(prepared)}
            interrupts.raise_pending()
        except BaseException as error:  # the others are waiting
            failure = error
        processes.calls += 1
        texts = exchange(processes.mesh, _report(failure, facts))
    reports = {process: json.loads(text) for process, text in texts.items()}
    if failure is not None:
        raise failure
    assert prepared is not None
    for process, report in reports.items():
        if report["failure"]:
            raise _stopped_by(process, report["failure"])
    _check_equal(reports, "all", reports)
    for group in processes.groups:
        _check_equal(reports, "group", group)
    prepared.host.forgive()
    return replace(prepared, processes=processes)


def _own_assistant(processes: Processes, model: Model, assistant: Any) -> Any:
    """An assistant that is on the mesh of the model, as `Processes.own`; others are left to the checks."""
    if isinstance(assistant, type) or not callable(getattr(assistant, "make_cache", None)):
        return assistant
    return processes.own(assistant) if assistant.mesh == model.mesh else assistant


def _report(failure: BaseException | None, facts: Mapping[str, Any]) -> str:
    return json.dumps({"failure": "" if failure is None else _described(failure), **facts})


def _described(failure: BaseException) -> str:
    if isinstance(failure, GeneratorExit):
        return "it closed its stream"
    return ": ".join(part for part in (type(failure).__name__, str(failure)) if part)


def _stopped_by(process: int, reason: str) -> RuntimeError:
    return RuntimeError(
        f"process {process} stopped this call, which all processes run together: {reason.rstrip('.')}. All of them can "
        "call again."
    )


def _facts_of_all(model: Model, prepared: PreparedCall) -> dict[str, object]:
    config: Any = model
    return {"`model`": _digest(repr(config.config)), "`max_time`": prepared.config.max_time}


def _facts_of_group(prepared: PreparedCall) -> dict[str, object]:
    """What processes that share rows have to agree on: everything, with arrays and structures as digests."""
    settings: dict[str, Any] = prepared.config.merged.to_diff_dict()
    facts: dict[str, object] = {f"`{name}`": repr(value) for name, value in settings.items()}
    leaves, structure = jax.tree_util.tree_flatten_with_path(prepared.call)
    for path, leaf in leaves:
        if jax.tree_util.keystr(path).endswith(".number"):
            continue  # of a function of the first process, which runs for all; see `host_callbacks`
        data = str(leaf.aval) if isinstance(leaf, jax.Array) else np.asarray(leaf)
        shape = "" if isinstance(data, str) else f"{data.dtype}{[*data.shape]}"
        facts[f"`call{jax.tree_util.keystr(path)}`"] = f"{shape} {_digest(data)}"
    facts["the outputs"] = str(prepared.intermediates)
    # Addresses of objects differ between processes.
    facts["the structure of the call"] = _digest(re.sub(r" at 0x\w+", "", str(structure)))
    return facts


def _digest(data: Any) -> str:
    raw = data.encode() if isinstance(data, str) else np.ascontiguousarray(data).tobytes()
    return hashlib.sha256(raw).hexdigest()[:8]


def _check_equal(reports: Mapping[int, Mapping[str, Any]], part: str, processes: Any) -> None:
    """Raises a ValueError for what differs between two of the processes."""
    first, *others = sorted(processes)
    expected = reports[first][part]
    for process in others:
        said = reports[process][part]
        for name in (*expected, *said):
            if expected.get(name) != said.get(name):
                why = "All processes have to pass the same."
                if part == "group":
                    why = "Both hold parts of the same rows, so they have to pass the same."
                raise ValueError(
                    f"{name} is {said.get(name)} in process {process}, but {expected.get(name)} in process {first}. "
                    f"{why}"
                )


def run_call(prepared: PreparedCall, schedule: ChunkSchedule) -> Chunks:
    """Runs a call alone or together with other processes; see `drive`."""
    return drive(prepared, schedule) if prepared.processes is None else drive_together(prepared, schedule)


def drive_together(prepared: PreparedCall, schedule: ChunkSchedule) -> Chunks:
    """As `drive`, in all processes. If one of them stops, for whatever reason, all end at the next chunk.

    Ctrl-C is held back until then, also while the reader of a stream has a chunk.

    Raises:
        RuntimeError: if another process failed, was interrupted or closed its stream. The next call works.
    """
    with interrupts.held_back():
        return (yield from _drive_together(prepared, schedule))


def _drive_together(prepared: PreparedCall, schedule: ChunkSchedule) -> Chunks:
    processes = prepared.processes
    assert processes is not None
    max_time = math.inf if prepared.config.max_time is None else prepared.config.max_time
    started = time.monotonic()
    run = Run(prepared)
    failure: BaseException | None = None
    # Chunks double from one step on. A guess that is too long for one of the processes would keep all of them waiting.
    ballot = _Ballot(_GO_ON, finished=False, steps=1)
    unread: deque[tuple[int, Progress | None, jax.Array]] = deque([(1, run.progress, _send(processes, ballot))])
    read, steps, before = None, ballot.steps, 0.0
    while True:
        chunk, progress, sent = unread.popleft()
        read = read if progress is None else jax.device_get(progress)
        ballots = [_Ballot(*row.tolist()) for row in received(processes.mesh, sent).values()]
        verdict = max(each.verdict for each in ballots)
        if verdict == _FAILED:
            break
        assert read is not None
        if verdict == _ENOUGH:
            return run.stopped(read)
        if all(each.finished for each in ballots):
            return run.state
        steps = min(each.steps for each in ballots if not each.finished)
        enough = False
        if failure is None:
            try:
                if progress is not None:
                    enough = bool((yield read))
                interrupts.raise_pending()
                prepared.host.check()
            except BaseException as error:
                failure = error
        if progress is not None:
            now = time.monotonic() - started - run.compiling
            finished = ballot.finished or not read.unfinished
            finished |= run.over and all(queued is None for _, queued, _ in unread)
            if read.full and not finished:
                run.make_room()
            enough |= now > max_time and read.length > prepared.prompt_length
            wanted = schedule.next(steps, (now - before) / chunk, max_time - now)
            ballot = _Ballot(_ENOUGH if enough else ballot.verdict, finished, wanted)
            before = now
        if failure is not None:
            ballot = ballot._replace(verdict=_FAILED)
        # With a limit nothing is queued ahead, since it could not be cancelled.
        while len(unread) < (1 if max_time < math.inf else 2):
            over = ballot.finished or run.over
            chunk, progress = (0, None) if over else run.advance(steps)
            unread.append((chunk, progress, _send(processes, ballot)))
    reasons = exchange(processes.mesh, "" if failure is None else _described(failure))
    run.wait()
    if failure is not None:
        raise failure
    raise _stopped_by(*next((process, reason) for process, reason in reasons.items() if reason))


def _send(processes: Processes, ballot: _Ballot) -> jax.Array:
    return send(processes.mesh, np.array(ballot, np.int32))
