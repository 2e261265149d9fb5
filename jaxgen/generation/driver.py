"""The driver of every call: it dispatches the programs in chunks of steps, which can be watched and stopped.

While the device works on a chunk, the host reads the progress of the one before and has queued the next, so that the
device never waits:

    device   | prefill | chunk 1 | chunk 2 | chunk 3 | ...
    host     dispatch prefill, 1, 2 | read prefill, dispatch 3 | read 1, dispatch 4 | ...

Chunked and unchunked calls share their programs: the number of steps is a traced argument.
"""

import bisect
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxgen.base import Model
from jaxgen.buckets import bucket
from jaxgen.decoding.loop import DecodeState, Progress, advance, drop_programs_if_many, grow, prefill
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.compile_clock import compile_seconds
from jaxgen.processors.stopping_criteria import MaxLength

# For a guess at the first chunk of an unwatched call: a tenth of the bytes per second that weights are read with, since
# rows and cache take their time too.
_BANDWIDTH, _BANDWIDTH_ELSEWHERE = {"cpu": 2e9, "gpu": 3e11}, 1e11


@dataclass(frozen=True)
class ChunkSchedule:
    """How long chunks are.

    Attributes:
        seconds: what a chunk should take, which is what an interrupt or a limit of time has to wait for.
        max_steps: of a chunk.
        watched: whether somebody wants to see every chunk, the first token at once.
    """

    seconds: float
    max_steps: int
    watched: bool

    def first(self, weights: int) -> int:
        """Steps of a first chunk that takes no longer, with so many bytes of weights; of few the whole call."""
        bandwidth = _BANDWIDTH.get(jax.default_backend(), _BANDWIDTH_ELSEWHERE)
        return max(1, int(self.seconds * bandwidth / max(weights, 1)))

    def next(self, steps: int, per_step: float, left: float) -> int:
        """Steps of the next chunk: at most twice those of the last, and what `left` seconds are enough for."""
        return max(1, min(int(min(self.seconds, left) / max(per_step, 1e-6)), 2 * steps, self.max_steps))


WATCHED = ChunkSchedule(seconds=0.1, max_steps=16, watched=True)
UNWATCHED = ChunkSchedule(seconds=0.25, max_steps=2**20, watched=False)

# A cache smaller than this is not worth a program of its own.
_FEWEST_SLOTS = 256

# From here on the steps of a text cost so much more than a compile that sizes lie closer to each other.
_LONG = 2048


@dataclass(frozen=True)
class CacheSize:
    """A size of the cache, and how long it is enough.

    Attributes:
        slots: of each row.
        steps_until_full: decode steps until this size is full, with one in reserve for a call that ends early.
    """

    slots: int
    steps_until_full: int


def cache_sizes(model: Model, prepared: PreparedCall, weights: int) -> Generator[CacheSize]:
    """The sizes that the cache of a call grows through: powers of two up to 2048 slots, buckets beyond.

    Every step reads all slots, so there are at most twice as many as are needed, and beyond 2048 at most 1.5 times.
    Two exceptions: slots that are few bytes beside the weights, and a last size up to 1.5 times the one that it saves.
    Each size costs a compile, which takes a long text to pay for itself: 3072 slots instead of 4096 save 6 ms of each
    of a thousand steps (135M on a CPU, batch 1).
    """
    if prepared.reserved:  # and doubled, so that a conversation meets few sizes
        size, used = prepared.reserved, int(prepared.prompt_slots[-1]) + 1
        while size <= used + prepared.forward_passes:
            yield CacheSize(size, size - used - 1)
            size *= 2
        yield CacheSize(size, prepared.forward_passes)
        return
    strategy, columns, most = prepared.call.strategy, prepared.call.prompt_slots, prepared.cache_slots
    most_passes = prepared.forward_passes
    enough = min(most, strategy.cache_slots(columns, most_passes + 1))
    rows = prepared.call.model_rows * strategy.copies
    unnoticed = weights // 64 // (rows * model.cache_bytes_per_token)
    passes, whole = 0, "attentions" in prepared.collect  # whose buffers are as wide as the cache
    while True:
        needed = max(strategy.cache_slots(columns, passes + 2), unnoticed, _FEWEST_SLOTS)
        size = bucket(needed) if needed > _LONG else 1 << (needed - 1).bit_length()
        size = most if whole or (size <= _LONG and most <= size * 3 // 2) else min(size, most)
        if enough <= size:
            yield CacheSize(size, most_passes)
            return
        passes = bisect.bisect(range(most_passes), size, key=lambda new: strategy.cache_slots(columns, new + 1)) - 1
        yield CacheSize(size, passes)


Chunks = Generator[Progress, bool | None, DecodeState]


def drive(model: Model, prepared: PreparedCall, schedule: ChunkSchedule) -> Chunks:
    """Runs a call, yielding the progress of its chunks as host arrays; the generator returns the state at the end.

    True sent back ends it there: the state may then be a chunk ahead of the progress, which was queued already.
    Whatever ends it early, an interrupt or an error where it is read, leaves the device idle.
    """
    max_time = math.inf if prepared.config.max_time is None else prepared.config.max_time
    waits = schedule.watched or max_time < math.inf
    drop_programs_if_many()
    started, compiled = time.monotonic(), compile_seconds()
    weights = sum(each.nbytes for each in jax.tree.leaves(model))
    sizes = cache_sizes(model, prepared, weights)
    size, done = next(sizes), 0
    state, progress = prefill(model, prepared.call, prepared.collect, size.slots)
    compiling = compile_seconds() - compiled
    try:
        unread = deque([(1, progress)])
        steps = 1 if waits else schedule.first(weights)
        ahead = 0 if waits else 1  # the first token does not wait for the compiler
        before = 0.0
        while True:
            while done < prepared.forward_passes and len(unread) <= ahead:
                compiled = compile_seconds()  # here, since each chunk of a stream may be asked for by another thread
                if done == size.steps_until_full:
                    size = next(sizes)
                    state = replace(state, cache=grow(state.cache, size.slots))
                chunk = min(steps, size.steps_until_full - done)
                state, progress = advance(model, state, prepared.call.strategy, np.int32(chunk), prepared.collect)
                compiling += compile_seconds() - compiled
                unread.append((chunk, progress))
                done += chunk
            if not unread or not (done < prepared.forward_passes or waits):
                return state
            chunk, progress = unread.popleft()
            read = jax.device_get(progress)
            if (yield read):
                return _stopped(model, prepared, state, read)
            now = time.monotonic() - started - compiling
            if not read.unfinished:
                return state
            if now > max_time and read.length > prepared.prompt_length:  # one token there is, however short the time
                return _stopped(model, prepared, state, read)
            steps = schedule.next(steps, (now - before) / chunk, max_time - now)
            before = now
            if max_time == math.inf:  # or else nothing is queued ahead, since it could not be called back
                ahead = 1
    except BaseException:
        # What an interrupted dispatch had taken over is gone.
        arrays = (each for each in jax.tree.leaves((state, progress)) if isinstance(each, jax.Array))
        jax.block_until_ready([each for each in arrays if not each.is_deleted()])
        raise


def _stopped(model: Model, prepared: PreparedCall, state: DecodeState, read: Progress) -> DecodeState:
    """The state of a call that ends early. Beams get one more step, whose candidates all end at their length."""
    if read.text is not None:
        return state
    strategy: Any = prepared.call.strategy
    strategy = replace(strategy, max_length=MaxLength(np.int32(read.length + 1)))
    return advance(model, state, strategy, np.int32(1), prepared.collect)[0]


def collect(chunks: Chunks, look: Callable[[Progress], bool | None] = lambda progress: None) -> DecodeState:
    """The state that `drive` ends with, after `look` has seen every chunk; it may answer True to end it."""
    stop = None
    with contextlib.closing(chunks):
        while True:
            try:
                progress = chunks.send(stop)
            except StopIteration as ended:
                return ended.value
            stop = look(progress)
