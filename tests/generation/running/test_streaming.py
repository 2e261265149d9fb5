"""Decodes in chunks: what a watcher sees is what a plain call returns, and whatever ends one early ends it well."""

import asyncio
import itertools
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from prepared import prepared
from random_calls import PROCESSORS, WARPERS, call, some

import jaxgen
from jaxgen.base import Prefill
from jaxgen.decoding.loop import Progress
from jaxgen.generation.running import driver

COMBINATIONS, CALLS_EACH = 4, 15


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.ended = 0

    def put(self, value: np.ndarray) -> None:
        assert not self.ended
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


# ---- What is seen ----


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", range(COMBINATIONS))
def test_streamed_tokens_are_those_of_the_plain_call_from_the_same_programs(seed: int, model: Any) -> None:
    rng = np.random.default_rng(seed)
    sampling = {"do_sample": True, "num_return_sequences": 1 + seed % 3, "key": seed} if seed % 2 else {}
    names = [*some(rng, PROCESSORS, 0, 2), *(some(rng, WARPERS, 1, 2) if sampling else [])]
    for number in range(CALLS_EACH):
        ids, kwargs = call(rng, names)
        plain = jaxgen.generate(model, ids, **kwargs, **sampling)
        before = jaxgen.compile_counts()
        seen = Recorder()
        streamed = jaxgen.generate(model, ids, streamer=seen, **kwargs, **sampling)
        prompts, *columns = seen.values
        np.testing.assert_array_equal(streamed, plain)
        np.testing.assert_array_equal(prompts, np.repeat(ids, sampling.get("num_return_sequences", 1), axis=0))
        np.testing.assert_array_equal(np.stack(columns, axis=1), plain[:, ids.shape[1] :])
        assert seen.ended == 1
        chunks = [*jaxgen.stream(model, ids, **kwargs, **sampling)]
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), plain[:, ids.shape[1] :])
        assert chunks[0].shape[1] == 1
        if number:
            assert jaxgen.compile_counts() == before


def test_contrastive_search_can_be_watched_too(model: Any) -> None:
    arguments = {"penalty_alpha": 0.6, "top_k": 3, "max_new_tokens": 9, "eos_token_id": None}
    plain = jaxgen.generate(model, [[5, 6, 7]], **arguments)
    chunks = [*jaxgen.stream(model, [[5, 6, 7]], **arguments)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), plain[:, 3:])


def test_transformers_streamers_print_and_iterate(bundled: Any, tokenizer: Any, capsys: Any) -> None:
    from transformers import TextIteratorStreamer, TextStreamer

    prompt = tokenizer("Once upon a time", return_tensors="np")
    text = tokenizer.decode(jaxgen.generate(bundled, **prompt, max_new_tokens=40)[0], skip_special_tokens=True)
    jaxgen.generate(bundled, **prompt, max_new_tokens=40, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(
        target=jaxgen.generate, args=(bundled,), kwargs={**prompt, "max_new_tokens": 40, "streamer": streamer}
    )
    thread.start()
    assert text.endswith("".join(streamer)) and thread.join() is None


def test_transformers_asynchronous_streamer_iterates(bundled: Any, tokenizer: Any) -> None:
    from transformers import AsyncTextIteratorStreamer

    prompt = tokenizer("Once upon a time", return_tensors="np")

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_special_tokens=True)
        work = asyncio.to_thread(jaxgen.generate, bundled, **prompt, max_new_tokens=20, streamer=streamer)
        task = asyncio.create_task(work)
        text = "".join([piece async for piece in streamer])
        await task
        return text

    expected = jaxgen.generate(bundled, **prompt, max_new_tokens=20)[0]
    assert asyncio.run(read()) == tokenizer.decode(expected, skip_special_tokens=True)


def test_chunks_grow_from_one_token_to_what_a_tenth_of_a_second_takes() -> None:
    steps, seen = 1, []
    for _ in range(7):
        steps = driver.WATCHED.next(steps, 0.001, float("inf"))
        seen.append(steps)
    assert seen == [2, 4, 8, 16, 16, 16, 16]
    assert driver.WATCHED.next(16, 0.02, float("inf")) == 5
    assert driver.WATCHED.next(16, 0.02, 0.05) == 2
    assert driver.WATCHED.next(16, 3.0, float("inf")) == 1


def test_a_call_that_nobody_watches_is_one_chunk_if_it_is_short(model: Any, monkeypatch: Any) -> None:
    chunks = []
    monkeypatch.setattr(driver, "advance", lambda *args, real=driver.advance: chunks.append(1) or real(*args))
    jaxgen.generate(model, [[5, 6]], max_new_tokens=100, eos_token_id=None)
    assert len(chunks) == 1


def test_a_call_in_chunks_is_the_call_in_one(model: Any, monkeypatch: Any) -> None:
    ways = [{"eos_token_id": None}, {"eos_token_id": 20, "num_beams": 3}]
    whole = [jaxgen.generate(model, [[5, 6]], max_new_tokens=40, **way) for way in ways]
    chunks = []
    monkeypatch.setattr(driver, "advance", lambda *args, real=driver.advance: chunks.append(1) or real(*args))
    monkeypatch.setattr(driver.ChunkSchedule, "first", lambda self, weights: 3)
    monkeypatch.setattr(driver.ChunkSchedule, "next", lambda self, *_: 3)
    for way, expected in zip(ways, whole, strict=True):
        chunks.clear()
        np.testing.assert_array_equal(jaxgen.generate(model, [[5, 6]], max_new_tokens=40, **way), expected)
        assert len(chunks) > 3


WAYS: list[Any] = [
    {},
    {"penalty_alpha": 0.5, "top_k": 3},
    pytest.param({"do_sample": True, "num_return_sequences": 2, "key": 1}, marks=pytest.mark.sweep),
    {"guidance_scale": 1.5, "num_beams": 2},
    pytest.param({"num_beams": 3}, marks=pytest.mark.sweep),
    pytest.param({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, marks=pytest.mark.sweep),
    {"prefill_chunk_size": 4, "output_hidden_states": True, "return_dict_in_generate": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_cache_that_grows_while_the_text_does_gives_the_same_tokens(
    way: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = [[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]], [[1] * 5, [0, 0, 1, 1, 1]]
    arguments = {"attention_mask": mask, "max_new_tokens": 110, "eos_token_id": None, **way}
    whole = jaxgen.generate(model, ids, **arguments)
    monkeypatch.setattr(driver, "_FEWEST_SLOTS", 1)
    before = jaxgen.compile_counts()["grow"]
    stopped = jaxgen.generate(model, ids, **arguments, max_time=0.0)
    assert jaxgen.compile_counts()["grow"] == before
    grown = jaxgen.generate(model, ids, **arguments)
    assert jaxgen.compile_counts()["grow"] > before
    if "return_dict_in_generate" in way:
        for states, expected in zip(grown.hidden_states, whole.hidden_states, strict=True):
            np.testing.assert_allclose(states[-1], expected[-1], atol=1e-4)
        whole, grown, stopped = whole.sequences, grown.sequences, stopped.sequences
    np.testing.assert_array_equal(grown, whole)
    assert stopped.shape[1] < grown.shape[1]


def test_a_cache_doubles_up_to_2048_slots_and_then_grows_by_less(model: Any) -> None:
    call = prepared(model, [[5, 6]], max_new_tokens=10_000, eos_token_id=None)
    sizes = [*driver.cache_sizes(call, weights=0)]
    assert [size.slots for size in sizes] == [256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288]
    # Each is full but for one column, those of the prompt's bucket included.
    assert [size.steps_until_full for size in sizes[:-1]] == [size.slots - 17 for size in sizes[:-1]]
    assert sizes[-1].steps_until_full == call.forward_passes


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1024, 3072]), (2, [512, 1024, 3072]), (64, [256, 512, 1024, 3072])])
def test_slots_that_are_little_beside_the_weights_are_reserved_at_once(rows: int, sizes: list[int], model: Any) -> None:
    """The last size is up to half as large again as the one that it saves."""
    call = prepared(model, [[5, 6]] * rows, max_new_tokens=3000, eos_token_id=None)
    weights = 64 * 700 * model.cache_bytes_per_token  # a 64th of them, as 700 slots of one row are
    assert [size.slots for size in driver.cache_sizes(call, weights)] == sizes


def test_a_cache_whose_attentions_are_asked_for_has_all_its_slots_from_the_start(model: Any) -> None:
    flags = {"output_attentions": True, "return_dict_in_generate": True}
    call = prepared(model, [[5, 6]], max_new_tokens=3000, eos_token_id=None, **flags)
    assert [size.slots for size in driver.cache_sizes(call, weights=0)] == [3072]


@pytest.mark.parametrize("way", [{}, {"num_beams": 4}, {"penalty_alpha": 0.5, "top_k": 4}], ids=str)
@pytest.mark.parametrize("columns", [16, 1040, 2064, 5000])
def test_a_cache_of_any_size_grows_until_the_call_is_done(way: dict[str, Any], columns: int, model: Any) -> None:
    for new_tokens in [1, 2, 250, 513, 764, 768, 769, 1009, 2100, 3000, 5000]:
        call = prepared(model, [[5, 6]], max_new_tokens=new_tokens, eos_token_id=None, **way)
        # As after a kept cache, which leaves the prompt's own columns few.
        read = np.zeros((1, columns))
        after = replace(call, call=replace(call.call, prefill=Prefill(read, read, read)))
        sizes = [*itertools.islice(driver.cache_sizes(after, weights=0), 30)]
        slots, passes = zip(*((size.slots, size.steps_until_full) for size in sizes), strict=True)
        assert [*slots] == sorted(set(slots))
        assert [*passes] == sorted(set(passes))
        assert passes[-1] == call.forward_passes
        for size in sizes:
            assert call.call.strategy.cache_slots(columns, size.steps_until_full + 1) <= size.slots


# ---- What ends it ----


@pytest.mark.parametrize(
    "more", [{}, {"do_sample": True}, {"num_beams": 3}, {"penalty_alpha": 0.5, "top_k": 3}], ids=str
)
def test_no_time_means_one_token_as_in_transformers(more: Any, model: Any) -> None:
    arguments = {"max_new_tokens": 30, "eos_token_id": None, **more}
    out = jaxgen.generate(model, [[5, 6]], max_time=0.0, **arguments)
    assert out.shape[1] == (4 if "num_beams" in more else 3)  # beams end at the step after the first


class Clock:
    """Stands in for the clock: compiling takes a minute, a step a hundredth of a second, and nothing else any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.compiled, self.length = 0.0, 0.0, 2
        monkeypatch.setattr(driver, "compile_seconds", lambda: self.compiled)
        monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: self.now))
        for name in ("prefill", "advance", "grow"):
            monkeypatch.setattr(driver, name, partial(self.dispatch, getattr(driver, name)))
        monkeypatch.setattr(jax, "device_get", partial(self.read, jax.device_get))

    def dispatch(self, program: Any, *arguments: Any) -> Any:
        before = jaxgen.compile_counts()
        result = program(*arguments)
        took = 60 * (jaxgen.compile_counts() != before)
        self.now, self.compiled = self.now + took, self.compiled + took
        return result

    def read(self, device_get: Any, value: Any) -> Any:
        got = device_get(value)
        if isinstance(got, Progress):
            self.now += 0.01 * (int(got.length) - self.length)
            self.length = int(got.length)
        return got


def test_a_limit_of_time_is_kept_to_a_chunk_and_compiling_takes_none_of_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jaxgen.compile_counts()
    clock = Clock(monkeypatch)
    arguments = {"max_new_tokens": 150, "eos_token_id": None, "top_k": 3}
    out = jaxgen.generate(model, [[5, 6]] * 5, max_time=0.4, **arguments)
    assert jaxgen.compile_counts() != before and clock.now >= 60
    assert 2 + 40 <= out.shape[1] <= 2 + 40 + 2  # the last chunks are of what is left


@pytest.mark.parametrize("enough", [1000, float("inf")])
def test_enough_time_changes_nothing(enough: float, model: Any) -> None:
    plain = jaxgen.generate(model, [[5, 6]], max_new_tokens=20, eos_token_id=None)
    limited = jaxgen.generate(model, [[5, 6]], max_new_tokens=20, eos_token_id=None, max_time=enough)
    np.testing.assert_array_equal(limited, plain)


@pytest.mark.oracle
def test_transformers_own_criterion_of_time_takes_the_place_of_max_time(model: Any) -> None:
    from transformers import MaxTimeCriteria

    arguments = {"max_new_tokens": 7, "eos_token_id": None}
    for limit, criterion, columns in ((0.0, 1000.0, 9), (1000.0, 0.0, 3)):
        criteria = [MaxTimeCriteria(criterion)]
        out = jaxgen.generate(model, [[5, 6]], max_time=limit, stopping_criteria=criteria, **arguments)
        assert out.shape[1] == columns


def test_an_error_in_a_streamer_is_raised_as_it_was_and_the_next_call_is_right(model: Any) -> None:
    class Fails(Recorder):
        def put(self, value: np.ndarray) -> None:
            super().put(value)
            if len(self.values) == 5:
                raise KeyError("of my own")

    arguments = {"max_new_tokens": 12, "eos_token_id": None}
    expected = jaxgen.generate(model, [[5, 6]], **arguments)
    failing = Fails()
    with pytest.raises(KeyError, match="of my own"):
        jaxgen.generate(model, [[5, 6]], streamer=failing, **arguments)
    assert not failing.ended
    np.testing.assert_array_equal(jaxgen.generate(model, [[5, 6]], **arguments), expected)


def test_a_reader_who_leaves_early_leaves_nothing_behind(model: Any) -> None:
    for chunk in jaxgen.stream(model, [[5, 6]], max_new_tokens=100, eos_token_id=None):
        assert chunk.shape == (1, 1)
        break
    live = len(jax.live_arrays())
    for _ in range(3):
        next(jaxgen.stream(model, [[5, 6]], max_new_tokens=100, eos_token_id=None))  # pyright: ignore
    assert len(jax.live_arrays()) <= live


class Interrupt:
    """Presses Ctrl-C from another thread after some chunks, a moment later, and counts those that still follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.late, self.moment = 2**30, 0, 0.0  # not armed yet
        self.pressed, self.hand = threading.Event(), threading.Thread()
        monkeypatch.setattr(driver, "advance", partial(self.dispatch, driver.advance))

    def arm(self, chunks: int, moment: float) -> None:
        self.pressed.clear()
        self.left, self.late, self.moment = chunks, 0, moment

    def dispatch(self, advance: Any, *arguments: Any) -> Any:
        self.late += self.pressed.is_set()
        self.left -= 1
        if self.left == 0:
            self.hand = threading.Timer(self.moment, self.press)
            self.hand.start()
        if self.left == -50:
            self.pressed.wait()  # however late the other thread is
        return advance(*arguments)

    def press(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        self.pressed.set()


@pytest.fixture
def default_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupts")
@pytest.mark.parametrize("presses", [24, pytest.param(50, marks=pytest.mark.sweep)])
def test_interrupts_come_back_within_a_chunk_and_leave_the_next_call_right(
    presses: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"max_new_tokens": 600, "eos_token_id": None}
    prompt = [[5, 6], [7, 8]]
    expected = jaxgen.generate(model, prompt, **arguments)
    monkeypatch.setattr(driver.ChunkSchedule, "first", lambda self, weights: 3)
    monkeypatch.setattr(driver.ChunkSchedule, "next", lambda self, *_: 3)
    interrupt, rng = Interrupt(monkeypatch), random.Random(0)
    np.testing.assert_array_equal(jaxgen.generate(model, prompt, **arguments), expected)
    live = len(jax.live_arrays())
    for number in range(presses):
        interrupt.arm(rng.randrange(1, 100), rng.uniform(0, 0.01))
        with pytest.raises(KeyboardInterrupt):
            if number % 2:
                jaxgen.generate(model, prompt, **arguments)
            else:
                for _ in jaxgen.stream(model, prompt, **arguments):
                    pass
        interrupt.hand.join()
        assert interrupt.late <= 1
    np.testing.assert_array_equal(jaxgen.generate(model, prompt, **arguments), expected)
    assert len(jax.live_arrays()) <= live


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"streamer": object()}, "must have the methods `put` and `end`"),
        ({"streamer": Recorder(), "num_beams": 2}, "`streamer` cannot be used with beam search"),
        ({"streamer": Recorder(), "num_beams": 2, "do_sample": True}, "`streamer` cannot be used with beam search"),
        ({"max_time": "long"}, "`max_time`='long' must be a finite number"),
    ],
    ids=["no streamer", "beams", "sampled beams", "no number"],
)
def test_is_refused_before_anything_is_compiled(arguments: Any, message: str, model: Any) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, [[5, 6]], max_new_tokens=3, **arguments)
    assert jaxgen.compile_counts() == before


def test_stream_refuses_at_the_call_what_it_cannot_yield(model: Any) -> None:
    from transformers import GenerationConfig

    with pytest.raises(ValueError, match="`stream` cannot follow `num_beams`=2"):
        jaxgen.stream(model, [[5, 6]], max_new_tokens=3, num_beams=2)
    for arguments in (
        {"return_dict_in_generate": True, "max_new_tokens": 3},
        {"generation_config": GenerationConfig(return_dict_in_generate=True, max_new_tokens=3)},
    ):
        with pytest.raises(ValueError, match="`return_dict_in_generate`=True asks for more"):
            jaxgen.stream(model, [[5, 6]], **arguments)
    for arguments in ({"streamer": Recorder()}, {"output_logprobs": True}):
        with pytest.raises(ValueError, match="`stream` yields tokens only"):
            jaxgen.stream(model, [[5, 6]], **arguments)
    with pytest.raises(ValueError, match="without a streamer or a clock"):
        jaxgen.prepare(model, [[5, 6]], max_new_tokens=3, max_time=1.0)
