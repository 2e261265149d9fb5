"""Limits of time leave out compiling, and nothing but compiling."""

import threading
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.generation.running import driver
from jaxgen.generation.running.compile_clock import compile_seconds


def test_only_a_call_that_compiles_takes_compile_time() -> None:
    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    before = compile_seconds()
    double(jnp.ones(3))
    compiled = compile_seconds()
    assert compiled > before
    double(jnp.ones(3))
    assert compile_seconds() == compiled


def test_a_thread_does_not_count_what_another_one_compiles() -> None:
    before = compile_seconds()
    thread = threading.Thread(target=lambda: jax.jit(lambda x: 3 * x)(np.ones(5)))
    thread.start()
    thread.join()
    assert compile_seconds() == before


class BlockingDevice:
    """A clock, and an `advance` that comes back when its steps are over, as on a GPU, of which each takes a while."""

    def __init__(self, seconds_per_step: float):
        self.now, self.chunks = 0.0, []
        self._seconds, self._advance = seconds_per_step, driver.advance

    def monotonic(self) -> float:
        return self.now

    def advance(self, model: Any, state: Any, strategy: Any, steps: Any, *rest: Any) -> Any:
        self.chunks.append(int(steps))
        self.now += int(steps) * self._seconds
        return self._advance(model, state, strategy, steps, *rest)


@pytest.fixture
def device(monkeypatch: Any) -> BlockingDevice:
    device = BlockingDevice(0.033)
    monkeypatch.setattr(driver, "advance", device.advance)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=device.monotonic))
    return device


def test_a_dispatch_that_blocks_until_its_steps_are_over_takes_of_the_time(model: Any, device: BlockingDevice) -> None:
    arguments = {"max_new_tokens": 900, "eos_token_id": None}
    jaxgen.generate(model, [[5, 6]], max_time=1.0, **arguments)  # compiles
    device.now = 0.0
    out = jaxgen.generate(model, [[5, 6]], max_time=1.0, **arguments)
    assert 1.0 < device.now < 1.5
    assert out.shape[1] == 2 + 1 + round(device.now / 0.033)


def test_chunks_stay_short_where_dispatches_block(model: Any, device: BlockingDevice) -> None:
    """Or Ctrl-C and a stream would wait for them."""
    for _ in jaxgen.stream(model, [[5, 6]], max_new_tokens=100, eos_token_id=None):
        pass
    assert sum(device.chunks) == 99
    assert max(device.chunks) * 0.033 <= 0.25
