"""`jaxgen generate`: continues a text."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxgen import lazy
from jaxgen.commands import compile_cache
from jaxgen.commands.options import decoding_arguments
from jaxgen.commands.terminal import Times, decode, open_model, say
from jaxgen.decoding import compile_counts
from jaxgen.generation import Custom, lower

_NEW_TOKENS = 200


def run(arguments: argparse.Namespace) -> int:
    text = _text(arguments)
    model, tokenizer = open_model(arguments)
    given = decoding_arguments(arguments)
    if "max_length" not in given:
        given = {"max_new_tokens": _NEW_TOKENS, **given}
    negative = None
    if arguments.negative_prompt is not None:
        negative = tokenizer(arguments.negative_prompt, return_tensors="np")["input_ids"]
    custom = Custom(key=given.pop("key", None), tokenizer=tokenizer, negative_prompt_ids=negative)
    prompt = tokenizer(text, return_tensors="np")["input_ids"]
    call = lower(model, prompt, None, {**given, "return_dict_in_generate": False}, custom)
    streams = not arguments.json and call.config.num_beams == 1 and call.config.num_return_sequences == 1
    say(f"{call.columns} tokens read, at most {call.slots} in all; the first use of such lengths compiles")
    streamer = lazy.transformers().TextStreamer(tokenizer, skip_special_tokens=True) if streams else None
    sequences, times = decode(model, call, streamer)
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    if arguments.json:
        print(json.dumps(_record(text, texts, tokenizer, prompt, sequences, times), ensure_ascii=False))
    elif not streams:
        print("\n\n".join(texts))
    _report(sequences.shape[1] - call.columns, times)
    return 0


def _text(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None and arguments.file is not None:
        raise ValueError("TEXT and --file were both given. Give one of them.")
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.file not in (None, "-"):
        return Path(arguments.file).read_text(encoding="utf-8")
    if arguments.file is None and sys.stdin.isatty():
        raise ValueError("there is no text to continue. Give TEXT, --file FILE, or a pipe.")
    return sys.stdin.read()


def _record(text: str, texts: list[str], tokenizer: Any, prompt: Any, sequences: Any, times: Times) -> dict[str, Any]:
    read = len(tokenizer.decode(prompt[0], skip_special_tokens=True))
    return {
        "prompt": text,
        "completions": [each[read:] for each in texts],
        "prompt_tokens": prompt.shape[1],
        "new_tokens": sequences.shape[1] - prompt.shape[1],
        "first_token_seconds": round(times.first_token, 4),
        "compile_seconds": round(times.compiling, 4),
        "seconds": round(times.total, 4),
    }


def _report(new_tokens: int, times: Times) -> None:
    rate = new_tokens / max(times.total - times.compiling, 1e-9)
    built, folder = sum(compile_counts().values()), compile_cache.current()
    where = f", kept in {folder}" if folder else ""
    say(
        f"first token after {times.first_token:.2f} s; {new_tokens} tokens, {rate:,.0f} tokens/s without compiling; "
        f"{built} programs ready in {times.compiling:.2f} s"
        + (f" ({times.kept} kept from before)" if times.kept else f" (compiled{where})")
    )
