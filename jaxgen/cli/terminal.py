"""Functions of the commands that decode: they open a model with its tokenizer, and time a decode."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgen.base import Model
from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.hub import local_path
from jaxgen.checkpoint.load import BUNDLED_MODEL, QUANTIZATIONS, load, quantised_model
from jaxgen.checkpoint.tokenizer import load_tokenizer
from jaxgen.cli import compile_cache
from jaxgen.cli.devices import check_devices, mesh_of
from jaxgen.cli.note import waiting
from jaxgen.decoding.loop import Progress
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.modes.assisted import differ_by_padding
from jaxgen.generation.running.driver import WATCHED, collect
from jaxgen.generation.running.streaming import NewTokens
from jaxgen.generation.running.together import run_call
from jaxgen.generation.trimming import to_output

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedTokenizerBase


def say(message: str) -> None:
    """Prints a message of jaxgen's own to standard error: standard output holds only the text."""
    print(f"jaxgen: {message}", file=sys.stderr, flush=True)


def byte_count(size: float) -> str:
    """Bytes in a unit that people read, such as "2.6 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def counted(number: int, thing: str) -> str:
    """A number and a noun, such as "1 token" or "2 tokens"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def open_model(arguments: argparse.Namespace) -> tuple[Model, "PreTrainedTokenizerBase"]:
    """The model and its tokenizer, with compiled programs kept where the arguments say."""
    compile_cache.enable(arguments.compile_cache)
    check_devices()
    mesh = mesh_of(arguments)
    folder = local_path(BUNDLED_MODEL if arguments.model is None else arguments.model, arguments.revision)
    if arguments.model is None:
        say(f"no --model given: using the small story model that comes with jaxgen ({folder})")
    elif folder != Path(arguments.model):
        say(f"{arguments.model} at commit {folder.name}")
    with waiting("loading the model ..."):
        model = load(folder, arguments.dtype, mesh, quantize=arguments.quantize, follow_links=arguments.follow_links)
        return model, open_tokenizer(folder)


def open_assistant(
    arguments: argparse.Namespace, model: Any, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Model | None, "PreTrainedTokenizerBase | None"]:
    """The assistant that the arguments ask for, another model or the model itself in int8 or int4.

    Its tokenizer is None if it is that of the model.
    """
    if arguments.assistant is None:
        return None, None
    with waiting("loading the assistant ..."):
        if (kind := arguments.assistant) in QUANTIZATIONS:
            if arguments.quantize is not None:
                raise ValueError(
                    f"--assistant {kind} is for a model that is not quantised itself. Leave out --quantize "
                    f"{arguments.quantize}, or --assistant."
                )
            return quantised_model(model, kind), None
        folder = local_path(arguments.assistant, None)
        assistant = load(folder, arguments.dtype, model.mesh, follow_links=arguments.follow_links)
    padded = differ_by_padding((model.vocab_size, assistant.vocab_size))
    try:
        own = load_tokenizer(folder)
    except CheckpointError as error:
        if not padded:
            raise
        say(f"the assistant is taken to have the tokenizer of the model: {error}")
        return assistant, None
    return assistant, None if padded and _nearly_equal(tokenizer, own) else own


def _nearly_equal(first: "PreTrainedTokenizerBase", second: "PreTrainedTokenizerBase") -> bool:
    """Whether two tokenizers have the same ids for the same tokens, up to a few that were added to one of them."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    return len(ours.items() & theirs.items()) >= 0.99 * max(len(ours), len(theirs))


def open_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or a GGUF file, without its warning about long texts, since `generate` has its own."""
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def checked_text(text: str, where: str) -> str:
    """Returns the text if it is UTF-8: other bytes come from a terminal or pipe as lone surrogates.

    Raises:
        ValueError: if it is not, naming the first such byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise ValueError(f"{where} is not UTF-8 (byte {byte:#x}). Convert it first.") from error
    return text


@dataclass
class Times:
    """How long a decode took, in seconds.

    Attributes:
        first_token: time from the start to the first token.
        total: time from the start to the end.
        compiling: the part of `total` that JAX spent tracing and compiling.
        kept: number of programs that came from the compile cache.
        shown: length of the shown text in tokens, prompt included.
        rate: tokens per second after the first ones, without the time for compiling.
        note: the decoding mode's remark about the call; see `Mode.note`.
        on_compile: called when a program of the decode is about to be compiled.
    """

    first_token: float = 0.0
    total: float = 0.0
    compiling: float = 0.0
    kept: int = 0
    shown: int = 0
    rate: float = 0.0
    note: str = ""
    on_compile: Callable[[], None] = field(default=lambda: None, repr=False)


def decode(
    prepared: PreparedCall,
    show: Callable[[np.ndarray], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_compile: Callable[[], None] = lambda: None,
) -> tuple[Any, Times]:
    """Runs a call to its end.

    Args:
        prepared: the call.
        show: gets the new token ids of the first row, int [tokens], as they come.
        stop: called after each chunk; True ends the call.
        on_compile: see `Times`.

    Returns:
        The value of `to_output`, and the times.
    """
    times, start = Times(on_compile=on_compile), time.perf_counter()
    new = NewTokens(prepared)
    first = 0, 0.0  # length of the text and `times.compiling` when the first tokens came

    def look(progress: Progress) -> bool:
        nonlocal first
        if not times.first_token:
            times.first_token = time.perf_counter() - start
            first = int(progress.length), times.compiling
        times.shown = int(progress.length)
        if show is not None:
            show(new(progress)[0])
        return stop()

    _running.append(times)
    try:
        state = collect(run_call(prepared, WATCHED), look)
        output = to_output(prepared, state)
        times.note = prepared.mode.note(state.inner)
    finally:
        _running.remove(times)
    times.total = time.perf_counter() - start
    # Tokens and seconds after the first chunk, without the compiling in between.
    length, compiling = first
    times.rate = (times.shown - length) / max(times.total - times.first_token - (times.compiling - compiling), 1e-9)
    return output, times


# JAX's listeners hear the whole process, so they add to the times of all running decodes.
_running: list[Times] = []


def _add_duration(event: str, duration_secs: float, **_: object) -> None:
    if event.startswith("/jax/core/compile/"):
        for times in _running:
            times.compiling += duration_secs


def _add_event(event: str, **_: object) -> None:
    for times in _running:
        if event == "/jax/compilation_cache/cache_hits":
            times.kept += 1
        elif event == "/jaxgen/compile":
            times.on_compile()


jax.monitoring.register_event_duration_secs_listener(_add_duration)
jax.monitoring.register_event_listener(_add_event)
