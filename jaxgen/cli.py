"""The command `jaxgen`."""

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen import lazy
from jaxgen.base import Model
from jaxgen.checkpoint import BUNDLED_MODEL, load
from jaxgen.decoding import advance, compile_counts, finalize, prefill
from jaxgen.generation import lower
from jaxgen.version import __version__


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["convert"]:
        # The converter imports the package, never the reverse: its command is looked up by name.
        return importlib.import_module("jaxgen.convert.__main__").main(arguments[1:], prog="jaxgen convert")
    return _run(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxgen", description="Hugging Face generate() for JAX.")
    parser.add_argument("--version", action="version", version=f"jaxgen {__version__}, jax {jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="continue a text", description="Continues a text greedily.")
    generate.add_argument("prompt", metavar="TEXT", help="the text to continue")
    generate.add_argument(
        "--model", metavar="FOLDER", help="a Hugging Face or converted folder; bundled model if left out"
    )
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most so many (default: 200)")
    generate.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    commands.add_parser("convert", help="convert a Hugging Face folder to jaxgen's own format", add_help=False)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.model or BUNDLED_MODEL)
    if arguments.model is None:
        _say(f"no --model given: using the small story model that comes with jaxgen ({folder})")
    try:
        model = load(folder, arguments.dtype)
        if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
            raise ValueError(
                f"{folder} has neither tokenizer.json nor tokenizer.model. Copy the tokenizer's files there."
            )
        tokenizer = lazy.transformers().AutoTokenizer.from_pretrained(folder)
        print(_continue(model, tokenizer, arguments.prompt, arguments.max_new_tokens))
    except (ValueError, OSError) as error:
        _say(str(error))
        return 1
    return 0


def _continue(model: Model, tokenizer: Any, text: str, max_new_tokens: int) -> str:
    """The text and its continuation; says on stderr how long what took."""
    encoded = tokenizer(text, return_tensors="np")
    fields = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": False}
    call = lower(model, None, None, {**encoded, **fields})
    _say("compiling for this prompt length on first use")
    compiling = _CompileClock()
    start = time.perf_counter()
    state, _ = jax.block_until_ready(prefill(model, call.prompt, call.strategy, call.slots))
    first = time.perf_counter() - start
    state, _ = advance(model, state, call.strategy, np.int32(call.slots))
    sequences = np.asarray(call.wrap(finalize(call.strategy, state), state))
    total = time.perf_counter() - start
    new_tokens = sequences.shape[1] - encoded["input_ids"].shape[1]
    _say(
        f"first token after {first:.2f} s; {new_tokens} tokens, {new_tokens / (total - compiling.seconds):,.0f} "
        f"tokens/s without compiling; compiled {sum(compile_counts().values())} programs in {compiling.seconds:.2f} s"
    )
    return tokenizer.decode(sequences[0], skip_special_tokens=True)


class _CompileClock:
    """Adds up the seconds JAX spends on tracing, lowering and compiling from now on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


def _say(message: str) -> None:
    print(f"jaxgen: {message}", file=sys.stderr)
