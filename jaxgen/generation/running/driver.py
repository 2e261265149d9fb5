"""The driver of every call: dispatches the programs in chunks of steps, which can be streamed and stopped.

While the device runs a chunk, the host has queued the next one and reads the progress of the previous one, so that the
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
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxgen.base import MORE_COLUMNS, Strategy
from jaxgen.buckets import bucket
from jaxgen.decoding.loop import DecodeState, Progress, advance, drop_programs_if_many, grow, prefill, squeeze
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.prompt.checks import refuse_tracer
from jaxgen.generation.running.compile_clock import compile_seconds
from jaxgen.processors.stopping_criteria import MaxLength

# Bytes per second, for a guess at the length of the first chunk of an unwatched call: a tenth of the bandwidth at which
# weights are read, since rows and cache take time too.
_BANDWIDTH, _BANDWIDTH_ELSEWHERE = {"cpu": 2e9, "gpu": 3e11}, 1e11


@dataclass(frozen=True)
class ChunkSchedule:
    """The length of chunks.

    Attributes:
        seconds: target time of a chunk. An interrupt or `max_time` takes effect at the next chunk.
        max_steps: maximum number of steps of a chunk.
        watched: whether chunks are streamed, with the first token as soon as possible.
    """

    seconds: float
    max_steps: int
    watched: bool

    def first(self, weights: int) -> int:
        """Number of steps of the first chunk, from the size of the weights in bytes."""
        bandwidth = _BANDWIDTH.get(jax.default_backend(), _BANDWIDTH_ELSEWHERE)
        return max(1, int(self.seconds * bandwidth / max(weights, 1)))

    def next(self, steps: int, seconds_per_step: float, seconds_left: float) -> int:
        """Number of steps of the next chunk: at most twice the last, and no more than the time left allows."""
        fitting = int(min(self.seconds, seconds_left) / max(seconds_per_step, 1e-6))
        return max(1, min(fitting, 2 * steps, self.max_steps))


WATCHED = ChunkSchedule(seconds=0.1, max_steps=16, watched=True)
UNWATCHED = ChunkSchedule(seconds=0.25, max_steps=2**20, watched=False)

# A smaller cache would not save enough time to pay for compiling its program.
_FEWEST_SLOTS = 256

# From here on, decode steps are so slow compared to a compile that sizes are closer to each other.
_LONG = 2048


@dataclass(frozen=True)
class CacheSize:
    """A size of the cache, and the number of steps that it is large enough for.

    Attributes:
        slots: per row.
        steps_until_full: decode steps until this size is full, keeping one step in reserve for an early stop.
    """

    slots: int
    steps_until_full: int


def cache_sizes(prepared: PreparedCall, weights: int) -> Generator[CacheSize]:
    """The sizes that the cache of a call grows through: powers of two up to 2048 slots, buckets beyond.

    Every step reads the whole cache, so a size is at most 2x the slots in use, and beyond 2048 at most 1.5x. Two
    exceptions: the first size has all the slots that take few bytes compared to the weights, and the last size may be
    1.5x as large as needed if that saves one more size. Each size costs a compile, which only pays off with a long
    text: 3072 slots instead of 4096 save 6 ms per step for a thousand steps (135M on a CPU, batch 1). A model whose
    attention reads the slots in use only has all its slots from the start.
    """
    model, strategy, prompt_slots = prepared.model, prepared.call.strategy, prepared.call.prompt_slots
    max_size = prepared.cache_slots
    max_passes = prepared.forward_passes
    if strategy.columns > 1:  # a ragged cache reports itself when it is full
        size = max(prepared.reserved, strategy.cache_slots(prompt_slots, 2), _FEWEST_SLOTS)
        while True:
            size = bucket(size) if size > _LONG else 1 << (size - 1).bit_length()
            yield CacheSize(size, max_passes)
            size += 1
    if prepared.reserved:  # doubles when full, so that a conversation has few sizes
        size, used = prepared.reserved, int(prepared.token_slots[-1]) + 1
        while size <= used + prepared.forward_passes:
            yield CacheSize(size, size - used - 1)
            size *= 2
        yield CacheSize(size, max_passes)
        return
    if (block := model.slots_per_block) is not None:
        yield CacheSize(max_size + -max_size % block, max_passes)
        return
    enough = min(max_size, strategy.cache_slots(prompt_slots, max_passes + 1))
    rows = prepared.call.model_rows * strategy.copies
    negligible = weights // 64 // (rows * prepared.cache_bytes_per_token)
    passes, never_grows = 0, "attentions" in prepared.intermediates  # their buffers are as wide as the cache
    while True:
        needed = max(strategy.cache_slots(prompt_slots, passes + 2), negligible, _FEWEST_SLOTS)
        size = bucket(needed) if needed > _LONG else 1 << (needed - 1).bit_length()
        last = never_grows or (size <= _LONG and max_size <= size * 3 // 2)
        size = max_size if last else min(size, max_size)
        if enough <= size:
            yield CacheSize(size, max_passes)
            return
        # The maximum number of decode steps whose new tokens fit, with one more in reserve.
        passes = bisect.bisect(range(max_passes), size, key=lambda new: strategy.cache_slots(prompt_slots, new + 1)) - 1
        yield CacheSize(size, passes)


Chunks = Generator[Progress, bool | None, DecodeState]


class Run:
    """A call while it runs: the state, and the chunks dispatched so far.

    Attributes:
        state: after the chunks dispatched so far.
        progress: after the prefill.
        compiling: seconds spent on compiling so far.
    """

    def __init__(self, prepared: PreparedCall):
        drop_programs_if_many()
        model, strategy = prepared.model, prepared.call.strategy
        self._prepared = prepared
        self.weights = sum(each.nbytes for each in jax.tree.leaves(model))
        self._sizes = cache_sizes(prepared, self.weights)
        self._size, self._done = next(self._sizes), 0
        # Without a count of steps, the state tells when the decode ends: steps with a full cache do nothing.
        self._passes = prepared.forward_passes if strategy.columns == 1 else math.inf
        self.compiling = 0.0
        with self._compiling():
            self.state, self.progress = prefill(model, prepared.call, prepared.intermediates, self._size.slots)
        refuse_tracer(self.progress.length)  # JAX's own error would be about the compiler options of `advance`
        self._latest = self.progress

    @property
    def over(self) -> bool:
        """Whether the last step has been dispatched."""
        return self._done >= self._passes

    def advance(self, steps: int) -> tuple[int, Progress]:
        """Dispatches the next chunk, of at most `steps` steps. Returns the number of its steps, and its progress."""
        counted = self._passes < math.inf
        with self._compiling():
            if counted and self._done == self._size.steps_until_full:
                self._size = next(self._sizes)
                self.state = replace(self.state, cache=grow(self.state.cache, self._size.slots))
            chunk = min(steps, self._size.steps_until_full - self._done) if counted else steps
            self._advance(self._prepared.call.strategy, chunk)
        self._done += chunk
        return chunk, self._latest

    def make_room(self) -> None:
        """Squeezes the holes out of ragged caches that are full, and grows them if less than an eighth is free."""
        strategy = self._prepared.call.strategy
        caches: list[Any] = [self.state.cache, *strategy.caches(self.state.inner)]
        with self._compiling():
            if len(self.state.cache.valid) > 1:  # a single row has no holes
                caches = [squeeze(cache) for cache in caches]
            if any(int(cache.length) + strategy.columns + MORE_COLUMNS > cache.slots * 7 // 8 for cache in caches):
                more = next(self._sizes).slots - self.state.cache.slots
                caches = [grow(cache, cache.slots + more) for cache in caches]
            cache, *others = caches
            inner = strategy.with_caches(self.state.inner, tuple(others))
            self.state = replace(self.state, cache=cache, inner=inner)

    def stopped(self, read: Progress) -> DecodeState:
        """The state if the call ends here. Beams take one more step, where a lower `max_length` finishes all."""
        if read.text is None:
            strategy: Any = self._prepared.call.strategy
            self._advance(replace(strategy, max_length=MaxLength(np.int32(read.length + 1))), 1)
        return self.state

    def wait(self) -> None:
        """Waits until the device is idle."""
        # Arrays that were donated to an interrupted dispatch are deleted.
        arrays = (each for each in jax.tree.leaves((self.state, self._latest)) if isinstance(each, jax.Array))
        jax.block_until_ready([each for each in arrays if not each.is_deleted()])

    def _advance(self, strategy: Strategy, steps: int) -> None:
        prepared = self._prepared
        self.state, self._latest = advance(
            prepared.model, self.state, strategy, np.int32(steps), prepared.intermediates
        )

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        before = compile_seconds()  # of this thread: each chunk of a stream can be read by another one
        yield
        self.compiling += compile_seconds() - before


def drive(prepared: PreparedCall, schedule: ChunkSchedule) -> Chunks:
    """Runs a call, yields the progress of its chunks as host arrays, and returns the state at the end.

    Sending True stops the call. Its state may then be one chunk ahead of the progress, since that chunk was already
    queued. After an interrupt, or an error in the reader, the device is idle.
    """
    max_time = math.inf if prepared.config.max_time is None else prepared.config.max_time
    waits = schedule.watched or max_time < math.inf
    started = time.monotonic()
    run = Run(prepared)
    try:
        unread = deque([(1, run.progress)])
        steps = 1 if waits else schedule.first(run.weights)
        ahead = 0 if waits else 1  # 0: the first token is shown before the second program compiles
        before = 0.0
        while True:
            while not run.over and len(unread) <= ahead:
                unread.append(run.advance(steps))
            if not unread or not (waits or not run.over):
                return run.state
            chunk, progress = unread.popleft()
            read = jax.device_get(progress)
            if (yield read):
                return run.stopped(read)
            now = time.monotonic() - started - run.compiling
            if not read.unfinished:
                return run.state
            if read.full:  # the chunks that are queued did nothing
                run.make_room()
            if now > max_time and read.length > prepared.prompt_length:  # at least one token, however short the limit
                return run.stopped(read)
            steps = schedule.next(steps, (now - before) / chunk, max_time - now)
            before = now
            if max_time == math.inf:  # with a limit nothing is queued ahead, since it could not be cancelled
                ahead = 1
    except BaseException:
        run.wait()
        raise


def collect(chunks: Chunks, look: Callable[[Progress], bool | None] = lambda progress: None) -> DecodeState:
    """Runs `drive` to its end and returns the state. `look` gets the progress of every chunk; True stops the call."""
    stop = None
    with contextlib.closing(chunks):
        while True:
            try:
                progress = chunks.send(stop)
            except StopIteration as ended:
                return ended.value
            try:
                stop = look(progress)
            except BaseException as error:
                chunks.throw(error)  # to other processes of the call, it says why the call ends
