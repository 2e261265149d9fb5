"""`jaxgen generate`: continues a text."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxgen.base import Model
from jaxgen.chat import check_template, render
from jaxgen.cli import compile_cache
from jaxgen.cli.devices import first_process_speaks, join_processes
from jaxgen.cli.options import decoding_arguments
from jaxgen.cli.terminal import Times, checked_text, counted, decode, open_assistant, open_model, say
from jaxgen.decoding.loop import compile_counts
from jaxgen.exchange import exchange
from jaxgen.generation.api import prepare_call
from jaxgen.generation.request import Request
from jaxgen.generation.text_stream import TextPieces

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedTokenizerBase

_NEW_TOKENS = 200


def run(arguments: argparse.Namespace) -> int:
    if not arguments.distributed:
        return _generate(arguments)
    join_processes()
    with first_process_speaks():
        return _generate(arguments)


def _generate(arguments: argparse.Namespace) -> int:
    text = _text(arguments)
    model, tokenizer = open_model(arguments)
    if arguments.distributed and model.mesh is not None:
        text = exchange(model.mesh, text)[0]  # mpirun has a standard input for the first process alone
    assistant, own = open_assistant(arguments, model, tokenizer)
    request = replace(_request(arguments, model, tokenizer, text), assistant_model=assistant, assistant_tokenizer=own)
    prepared = prepare_call(model, request)
    source = prepared.inputs.source
    streams = not arguments.json and prepared.mode.streams and prepared.mode.sequences_per_prompt == 1
    folder = compile_cache.current()
    unless = ", unless they are in the compile cache" if folder and any(folder.glob("*-cache")) else ""
    # With an encoder the text is its input, and what the decoder begins with is not shown.
    length, apart = prepared.prompt_length, arguments.chat or source is not None
    prompt_tokens = length if source is None else source.attention_mask.shape[1]
    say(f"a prompt of {counted(prompt_tokens, 'token')}; programs for this length are compiled first{unless}")
    pieces = TextPieces(tokenizer)
    if streams and not apart:  # the call's prompt: token healing may have changed the given one
        print(pieces.add(prepared.inputs.input_ids[0]), end="", flush=True)
    show = (lambda ids: print(pieces.add(ids), end="", flush=True)) if streams else None
    sequences, times = decode(prepared, show)
    texts = tokenizer.batch_decode(sequences[:, length if apart else 0 :], skip_special_tokens=True)
    if arguments.json:
        # Characters of the call's prompt: token healing may have changed the given one.
        prompt = "" if apart else tokenizer.decode(sequences[0, :length], skip_special_tokens=True)
        record = {
            "prompt": text,
            "texts": texts,
            "completions": [continued[len(prompt) :] for continued in texts],
            "prompt_tokens": prompt_tokens,
            "new_tokens": sequences.shape[1] - length,
            "first_token_seconds": round(times.first_token, 4),
            "compile_seconds": round(times.compiling, 4),
            "seconds": round(times.total, 4),
        }
        print(json.dumps(record, ensure_ascii=False))
    else:
        print(pieces.end() if streams else "\n\n".join(texts))
    _report(sequences.shape[1] - length, times)
    return 0


def _request(arguments: argparse.Namespace, model: Model, tokenizer: "PreTrainedTokenizerBase", text: str) -> Request:
    """The arguments of `generate`."""
    given = decoding_arguments(arguments)
    if model.is_encoder_decoder and arguments.chat:
        raise ValueError(
            "--chat is for a model that continues a conversation. This one has an encoder, which reads the text as it "
            "is. Leave out --chat."
        )
    # Models with an encoder are often made for texts of a certain length, such as summaries, which their settings say.
    if "max_length" not in given and not (model.is_encoder_decoder and model.generation_config.max_length):
        given = {"max_new_tokens": _longest(model), **given}
    negative = None
    if arguments.negative_prompt is not None:
        negative = tokenizer(arguments.negative_prompt, return_tensors="np")["input_ids"]
    if arguments.chat:
        check_template(tokenizer)
        prompt = np.array([render(tokenizer, [{"role": "user", "content": text}])])
    else:
        prompt = tokenizer(text, return_tensors="np")["input_ids"]
        if (
            tokenizer.chat_template
            and not model.is_encoder_decoder
            and not any(token in text for token in tokenizer.all_special_tokens)
        ):
            say(
                "the checkpoint has a chat template, and a chat model may end a plain text at once. Pass --chat to ask "
                "your text as a question, or use `jaxgen chat`"
            )
    return Request(
        inputs=prompt,
        key=given.pop("key", None),
        tokenizer=tokenizer,
        negative_prompt_ids=negative,
        keywords={**given, "return_dict_in_generate": False},
    )


def _longest(model: Model) -> int:
    """The number of new tokens if nobody says: fewer if the model has no positions for more."""
    return min(_NEW_TOKENS, model.max_position_embeddings) if model.has_position_table else _NEW_TOKENS


def _text(arguments: argparse.Namespace) -> str:
    """The prompt: TEXT, a file's content or standard input; with --chat, TEXT may be a question about the file."""
    if arguments.prompt is not None and arguments.file is not None:
        if not arguments.chat:
            raise ValueError(
                "TEXT and --file were both given. Give one of them, or add --chat to ask TEXT about the file."
            )
        return f"{checked_text(arguments.prompt, 'TEXT')}\n\n{_from_file(arguments)}"
    if arguments.prompt is not None:
        return checked_text(arguments.prompt, "TEXT")
    return _from_file(arguments)


def _from_file(arguments: argparse.Namespace) -> str:
    """The content of the file, or of standard input, which the first process reads for all."""
    if arguments.file not in (None, "-"):
        return checked_text(Path(arguments.file).read_text(encoding="utf-8", errors="surrogateescape"), arguments.file)
    if arguments.distributed and jax.process_index() > 0:
        return ""
    if sys.stdin is None or (arguments.file is None and sys.stdin.isatty()):
        raise ValueError("there is no text to continue. Give TEXT or --file FILE, or pipe a text in.")
    return checked_text(sys.stdin.read(), "standard input")


def _report(new_tokens: int, times: Times) -> None:
    programs, folder = sum(compile_counts().values()), compile_cache.current()
    drafts = f"{times.note}; " if times.note else ""
    where = f"compiled, kept in {folder}" if folder else "compiled"
    say(
        f"first token {times.first_token:.2f} s after loading; {counted(new_tokens, 'token')}, then {times.rate:,.0f} "
        f"tokens/s; {drafts}{counted(programs, 'program')} ready in {times.compiling:.2f} s "
        + (f"({times.kept} from the compile cache)" if times.kept else f"({where})")
    )
