"""The host front door: `generate`, `stream` and `prepare`.

A call is prepared (`build`), run as two compiled programs (`driver`), and its outputs are trimmed (`trimming`).
"""

import atexit
import contextlib
import weakref
from collections.abc import Generator, Iterator
from typing import Any, Unpack

import jax
import numpy as np

from jaxgen.base import Call, Model, no_mesh
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.custom_generate import call_custom, call_repository, check_custom_generate, own_arguments
from jaxgen.generation.driver import UNWATCHED, WATCHED, collect, drive
from jaxgen.generation.fields import GenerateKeywords
from jaxgen.generation.memory import check_memory
from jaxgen.generation.outputs import GenerateOutput
from jaxgen.generation.request import Request, listed
from jaxgen.generation.streaming import NewTokens, to_streamer
from jaxgen.generation.token_healing import healed_inputs
from jaxgen.generation.trimming import to_output


def generate(
    model: Model,
    inputs: Any = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    synced_gpus: bool | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    custom_generate: Any = None,
    *,
    key: Any = None,
    output_logprobs: bool = False,
    tokenizer: Any = None,
    **kwargs: Unpack[GenerateKeywords],
) -> np.ndarray | GenerateOutput:
    """Continues each prompt: the arguments, and the tokens, of transformers 5.24 `generate`.

    Greedily, by sampling (`do_sample`), with beams (`num_beams`), with beams that differ (`num_beam_groups`) or by
    contrastive search (`penalty_alpha`).

    Args:
        model: a model from `load` or `from_config`.
        inputs: integers [B, P]: an array of any library or nested lists. Also as `input_ids=`. Without any, each row
            starts from `bos_token_id`.
        generation_config: a `transformers.GenerationConfig`; its None fields fall back to the model's.
        logits_processor: a list of callables. JAX functions of (input_ids [N, S], scores [N, V], cur_len []), of whose
            `input_ids` the first `cur_len` columns are valid, are compiled into the decode. Transformers' own
            processors, and NumPy functions of (input_ids, scores), run on the host at every step, with a warning. They
            act where transformers has them act: after the built-in processors, before those of sampling.
        stopping_criteria: a list of callables like these, that return a bool per row.
        prefix_allowed_tokens_fn: (row, tokens [L]) -> the ids that may follow; runs on the host.
        negative_prompt_ids: integers [B, P'] to guide away from, with `guidance_scale`; the last token of each prompt
            by default.
        negative_prompt_attention_mask: [B, P'].
        streamer: anything with `put` and `end`, such as transformers' `TextStreamer`: gets the prompts, then a column
            of tokens at a time, as NumPy arrays, then the end. Not with beams.
        custom_generate: a function that chooses the tokens itself and whose result is returned, called with (model,
            input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs), see `custom_generate`;
            or a folder or repository with a `custom_generate/generate.py`, which takes `trust_remote_code=True`.
        key: for `do_sample`: an int, a `jax.random` key, or one of either per prompt. The same key, the same tokens;
            fresh entropy by default. A prompt with its own key draws the same tokens in whatever batch.
        tokenizer: the model's, for `stop_strings`.
        output_logprobs: with `return_dict_in_generate`, also return the chosen tokens' log-probabilities: `logprobs`
            by the model alone, before temperature and every other rule, and `processed_logprobs` by the distribution
            that they were drawn from.
        **kwargs: `attention_mask` ([B, P], 1 on tokens and 0 on padding, inferred from `pad_token_id` if left out) and
            any field of GenerationConfig, which wins over every config.

    Returns:
        int32 [B * num_return_sequences, length]: the prompt, then the new tokens; rows that finish early are filled
        with `pad_token_id`, and the width ends with the last token any row needed. With `return_dict_in_generate`, a
        `GenerateDecoderOnlyOutput`, or with beams a `GenerateBeamDecoderOnlyOutput`.

    Raises:
        ValueError: naming the argument, its value, the range and the next step; before anything is compiled.
    """
    given = dict(locals())
    if isinstance(custom_generate, str) and custom_generate not in _BUILT_IN:
        return call_repository(custom_generate, **given.pop("kwargs"), **given)
    own = own_arguments(custom_generate, {**kwargs, "key": key, "tokenizer": tokenizer})
    request = Request(
        inputs=inputs,
        generation_config=generation_config,
        logits_processor=listed("logits_processor", logits_processor),
        stopping_criteria=listed("stopping_criteria", stopping_criteria),
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        synced_gpus=synced_gpus,
        assistant_model=assistant_model,
        streamer=streamer,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        key=None if "key" in own else key,
        output_logprobs=output_logprobs,
        tokenizer=tokenizer,
        keywords={name: value for name, value in kwargs.items() if name not in own},
    )
    prepared = prepare_call(model, request)
    if callable(custom_generate):
        check_custom_generate(prepared, request)
        with prepared.host.registered():
            return call_custom(custom_generate, model, prepared, own)
    with undisturbed(), prepared.host.registered():
        if streamer is None:
            state = collect(drive(model, prepared, UNWATCHED))
        else:
            state = collect(drive(model, prepared, WATCHED), to_streamer(streamer, prepared))
            streamer.end()
        return to_output(prepared, state)


def prepare_call(model: Model, request: Request) -> PreparedCall:
    """The call of a request, its prompt healed first if it asks for that, and checked against the memory here."""

    def one_token(prompt: np.ndarray, generation_config: Any, key: Any) -> np.ndarray:
        return generate(model, prompt, generation_config=generation_config, key=key)  # pyright: ignore[reportReturnType]

    with undisturbed():
        mode, inputs = read_request(model, request)
        if mode.config.merged.token_healing:
            inputs = healed_inputs(model, inputs, request, one_token)
        prepared = build_call(model, request, mode, inputs)
    check_memory(model, prepared)
    return prepared


# What transformers 5 keeps in repositories of its own, and jaxgen has: their fields of the configuration choose them.
_BUILT_IN = ("transformers-community/contrastive-search", "transformers-community/group-beam-search")


def stream(model: Model, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Iterator[np.ndarray]:
    """The new tokens as they come: `for chunk in stream(model, **prompts)`.

    Args:
        model: as in `generate`.
        inputs: as in `generate`.
        generation_config: as in `generate`.
        **kwargs: as in `generate`, but for what it returns besides tokens, and beams.

    Yields:
        int32 [B * num_return_sequences, T]: the next columns, the first one by itself. Side by side, they are what
        `generate` returns after the prompts.

    Raises:
        ValueError: as `generate`, at the call and not at the first chunk.
    """
    return follow(model, prepare_stream(model, Request.of(inputs, generation_config, kwargs)))


def prepare_stream(model: Model, request: Request) -> PreparedCall:
    """The call of a request, if its tokens can be shown as they come."""
    if request.streamer is not None or request.output_logprobs:
        raise ValueError(
            "`stream` yields the tokens and nothing else: it takes no `streamer` and no `output_logprobs`. Use "
            "`generate` for these."
        )
    prepared = prepare_call(model, request)
    if prepared.config.return_dict_in_generate:
        raise ValueError(
            "`stream` yields tokens, but `return_dict_in_generate`=True asks for more. Pass False, or use `generate` "
            "with a `streamer`."
        )
    prepared.mode.check_stream()
    return prepared


def follow(model: Model, prepared: PreparedCall) -> Generator[np.ndarray, None, None]:
    """The chunks of `stream`."""
    chunks = _chunks(model, prepared)
    _unread.add(chunks)
    return chunks


# A stream that is left unread ends while the modules that end it are still there.
_unread: weakref.WeakSet[Generator[np.ndarray, None, None]] = weakref.WeakSet()
atexit.register(lambda: [chunks.close() for chunks in list(_unread)])


def _chunks(model: Model, prepared: PreparedCall) -> Generator[np.ndarray, None, None]:
    new = NewTokens(prepared)
    with prepared.host.registered(), contextlib.closing(drive(model, prepared, WATCHED)) as chunks:
        while True:
            with undisturbed():  # and only here, not in the code that reads the stream
                progress = next(chunks, None)
            if progress is None:
                return
            if (tokens := new(progress)).shape[1]:
                yield tokens


def prepare(model: Model, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Call:
    """The checks and the resolution of `generate` without the run: for `decode` inside your own `jit`.

    `decode(model, call)` is then the pure function of the call, which is a pytree. Replace what should differ from run
    to run, such as `dataclasses.replace(call, strategy=dataclasses.replace(call.strategy, key=key))`; the shapes stay.

    Args:
        model: as in `generate`.
        inputs: as in `generate`.
        generation_config: as in `generate`.
        **kwargs: as in `generate`, but for what runs on the host.

    Raises:
        ValueError: as `generate`, and for what runs on the host.
    """
    request = Request.of(inputs, generation_config, kwargs)
    prepared = prepare_call(model, request)
    if request.streamer is not None or prepared.config.max_time is not None:
        raise ValueError("`decode` is a pure function: it has no streamer and no clock. Leave out `max_time`.")
    if prepared.host:
        raise ValueError(
            "`decode` is a pure function, but a processor or criterion of this call runs on the host. Write it as a "
            "JAX function of (input_ids, scores, cur_len)."
        )
    if prepared.collect:
        raise ValueError(f"`decode` does not collect {[*prepared.collect]}. Use `generate`, or the model itself.")
    return prepared.call


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without what callers have set JAX to for their own code: a mesh, and a guard against transfers.

    A call takes NumPy arrays and returns them, so nobody who makes one is surprised by a transfer.
    """
    with no_mesh(), jax.transfer_guard("allow"):
        yield
