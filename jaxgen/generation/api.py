"""The entry points on the host: `generate`, `stream` and `prepare`.

`build` prepares a call, `driver` runs it as two compiled programs, and `trimming` makes its outputs.
"""

import atexit
import contextlib
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Unpack

import jax
import numpy as np

from jaxgen.base import Call, Model, no_mesh
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.config.fields import GenerateKeywords
from jaxgen.generation.custom_generate import call_custom, call_repository, check_custom_generate, own_arguments
from jaxgen.generation.outputs import GenerateOutput
from jaxgen.generation.prompt.token_healing import healed_inputs
from jaxgen.generation.request import Request, listed
from jaxgen.generation.running.driver import UNWATCHED, WATCHED, collect
from jaxgen.generation.running.interrupts import interrupts
from jaxgen.generation.running.memory import check_memory
from jaxgen.generation.running.processes import processes_of
from jaxgen.generation.running.streaming import NewTokens, Streamer, to_streamer
from jaxgen.generation.running.together import prepare_together, run_call
from jaxgen.generation.trimming import to_output

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from jaxgen.lazy import GenerationConfig, PreTrainedTokenizerBase


def generate(
    model: Model,
    inputs: "ArrayLike | None" = None,
    generation_config: "GenerationConfig | None" = None,
    logits_processor: Iterable[Callable[..., object]] | None = None,
    stopping_criteria: Iterable[Callable[..., object]] | None = None,
    prefix_allowed_tokens_fn: "Callable[[int, np.ndarray], ArrayLike] | None" = None,
    synced_gpus: bool | None = None,
    assistant_model: object = None,
    streamer: Streamer | None = None,
    negative_prompt_ids: "ArrayLike | None" = None,
    negative_prompt_attention_mask: "ArrayLike | None" = None,
    custom_generate: str | Callable[..., Any] | None = None,
    *,
    key: "ArrayLike | None" = None,
    output_logprobs: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    assistant_tokenizer: "PreTrainedTokenizerBase | None" = None,
    **kwargs: Unpack[GenerateKeywords],
) -> np.ndarray | GenerateOutput:
    """Continues each prompt. Takes the arguments of transformers 5.24 `generate` and returns the same tokens.

    Decoding is greedy, or by sampling (`do_sample`), beam search (`num_beams`), diverse beam search
    (`num_beam_groups`) or contrastive search (`penalty_alpha`).

    Args:
        model: a model from `load` or `from_config`.
        inputs: token ids, integers [B, P], as an array of any library or nested lists; also as `input_ids=`. Without
            a prompt, each row starts from `bos_token_id`. The input of the encoder, if the model has one.
        generation_config: a `transformers.GenerationConfig`; fields that are None fall back to the model's.
        logits_processor: a list of callables. JAX functions of (input_ids [N, S], scores [N, V], cur_len []) are
            compiled into the decode; the first `cur_len` columns of their `input_ids` are valid. Processors of
            transformers and NumPy functions of (input_ids, scores) run on the host at every step, with a warning. As in
            transformers, they run after the built-in processors and before those of sampling.
        stopping_criteria: a list of such callables that return a bool per row.
        prefix_allowed_tokens_fn: (row, tokens [L]) -> the token ids that may follow; runs on the host.
        assistant_model: a smaller model that drafts tokens, which this model checks several at a time; or a `Drafter`.
            The tokens are the same as without it, greedy or sampled, and come sooner where drafts are accepted. Works
            with any batch. See `num_assistant_tokens`.
        negative_prompt_ids: integers [B, P'] to guide away from, with `guidance_scale`; the last token of each prompt
            by default.
        negative_prompt_attention_mask: [B, P'].
        synced_gpus: True or None. With a mesh over several processes, all of them call `generate`, each with the
            prompts of its own share of the axis "data", and end together; see the guide to many processes.
        streamer: an object with `put` and `end`, such as transformers' `TextStreamer`. `put` gets the prompts and then,
            at each step, the next token of each row, as NumPy arrays. Cannot be combined with beams.
        custom_generate: a function that chooses the tokens itself, and whose result is returned. It is called with
            (model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs); see the module
            `custom_generate`. Or a folder or repository with a `custom_generate/generate.py`, which needs
            `trust_remote_code=True`.
        key: for `do_sample`: an int, a `jax.random` key, or one of either per prompt; a random key by default. The same
            key gives the same tokens. A prompt with its own key samples the same tokens in any batch.
        tokenizer: the model's, for `stop_strings`, `token_healing` and an `assistant_tokenizer`.
        assistant_tokenizer: the tokenizer of an `assistant_model` with another vocabulary than the model's. The
            assistant then drafts only tokens that both vocabularies have.
        output_logprobs: with `return_dict_in_generate`, also return the log-probabilities of the chosen tokens:
            `logprobs` under the model alone, before temperature and all other rules, and `processed_logprobs` under the
            distribution that they were sampled from.
        **kwargs: `attention_mask` ([B, P], 1 for tokens and 0 for padding, inferred from `pad_token_id` if left out)
            and any field of GenerationConfig, which takes precedence over every config.

    Returns:
        int32 [B * num_return_sequences, L]: the prompt, then the new tokens. Rows that finish early are filled with
        `pad_token_id`; the longest row sets the length. With an encoder, the decoder's text alone, from its start token
        on. With `return_dict_in_generate`, a `GenerateDecoderOnlyOutput`, or with beams a
        `GenerateBeamDecoderOnlyOutput`; with an encoder, `GenerateEncoderDecoderOutput` or
        `GenerateBeamEncoderDecoderOutput`.

    Raises:
        ValueError: naming the argument, its value, its range and what to do, before anything is compiled.
    """
    given = dict(locals())  # first, while these are only the arguments
    if isinstance(custom_generate, str) and custom_generate not in _BUILT_IN:
        return call_repository(custom_generate, **given.pop("kwargs"), **given)
    custom_arguments = own_arguments(custom_generate, {**kwargs, "key": key, "tokenizer": tokenizer})
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
        key=None if "key" in custom_arguments else key,
        output_logprobs=output_logprobs,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        keywords={name: value for name, value in kwargs.items() if name not in custom_arguments},
    )
    with contextlib.ExitStack() as together:
        if processes_of(model) is not None:
            together.enter_context(interrupts.held_back())
        prepared = prepare_call(model, request)
        if callable(custom_generate):
            check_custom_generate(prepared, request)
            with prepared.host.registered():
                return call_custom(custom_generate, prepared.model, prepared, custom_arguments)
        with undisturbed(), prepared.host.registered():
            if streamer is None:
                state = collect(run_call(prepared, UNWATCHED))
            else:
                state = collect(run_call(prepared, WATCHED), to_streamer(streamer, prepared))
                streamer.end()
            return to_output(prepared, state)


def prepare_call(model: Model, request: Request) -> PreparedCall:
    """The call of a request, with `token_healing` applied and the available memory checked.

    If other processes hold a part of the model, all of them must prepare a call.
    """
    if (processes := processes_of(model)) is None:
        return _prepare_alone(model, request)
    with undisturbed():
        return prepare_together(processes, model, request, _prepare_alone)


def _prepare_alone(model: Model, request: Request) -> PreparedCall:
    """The call of this process."""

    def one_token(prompt: np.ndarray, generation_config: "GenerationConfig", key: np.ndarray | None) -> np.ndarray:
        return generate(model, prompt, generation_config=generation_config, key=key)  # pyright: ignore[reportReturnType]

    with undisturbed():
        mode, inputs = read_request(model, request)
        if mode.config.merged.token_healing:
            inputs = healed_inputs(model, inputs, request, one_token)
        prepared = build_call(model, request, mode, inputs)
    check_memory(prepared)
    return prepared


# Modes of jaxgen that transformers 5 moved to the Hub. Their generation fields choose them, as in transformers 4.
_BUILT_IN = ("transformers-community/contrastive-search", "transformers-community/group-beam-search")


def stream(
    model: Model,
    inputs: "ArrayLike | None" = None,
    generation_config: "GenerationConfig | None" = None,
    **kwargs: object,
) -> Iterator[np.ndarray]:
    """The new tokens as they come: `for chunk in stream(model, **prompts)`.

    Args:
        model: as in `generate`.
        inputs: as in `generate`.
        generation_config: as in `generate`.
        **kwargs: as in `generate`, except beams and outputs other than tokens.

    Yields:
        int32 [B * num_return_sequences, tokens]: the next tokens of each row; one token in the first chunk. All chunks
        together are the new tokens that `generate` returns.

    Raises:
        ValueError: as `generate`, when `stream` is called and not at the first chunk.
    """
    return follow(prepare_stream(model, Request.of(inputs, generation_config, kwargs)))


def prepare_stream(model: Model, request: Request) -> PreparedCall:
    """The call of a request for `stream`. Raises ValueError if later steps may change its tokens."""
    if request.streamer is not None or request.output_logprobs:
        raise ValueError(
            "`stream` yields tokens only: it does not take `streamer` or `output_logprobs`. Use `generate` for these."
        )
    prepared = prepare_call(model, request)
    if prepared.config.return_dict_in_generate:
        raise ValueError(
            "`stream` yields tokens, but `return_dict_in_generate`=True asks for more. Pass False, or use `generate` "
            "with a `streamer`."
        )
    prepared.mode.check_stream()
    return prepared


def follow(prepared: PreparedCall) -> Generator[np.ndarray, None, None]:
    """The chunks of `stream`."""
    chunks = _chunks(prepared)
    if prepared.processes is not None:
        # A stream that has begun is closed when nobody holds it any more, and then other processes do not wait for it.
        chunks = _begun(next(chunks, None), chunks)
    _unread.add(chunks)
    return chunks


def _begun(first: np.ndarray | None, chunks: Generator[np.ndarray, None, None]) -> Generator[np.ndarray, None, None]:
    if first is not None:
        yield first
        yield from chunks


# Unread streams are closed at exit, while the modules that closing needs still exist.
_unread: weakref.WeakSet[Generator[np.ndarray, None, None]] = weakref.WeakSet()
atexit.register(lambda: [chunks.close() for chunks in list(_unread)])


def _chunks(prepared: PreparedCall) -> Generator[np.ndarray, None, None]:
    new = NewTokens(prepared)
    with prepared.host.registered(), contextlib.closing(run_call(prepared, WATCHED)) as chunks:
        while True:
            with undisturbed():  # not around `yield`: the reader of the stream keeps its own settings
                progress = next(chunks, None)
            if progress is None:
                return
            if (tokens := new(progress)).shape[1]:
                yield tokens


def prepare(
    model: Model,
    inputs: "ArrayLike | None" = None,
    generation_config: "GenerationConfig | None" = None,
    **kwargs: object,
) -> Call:
    """Checks and prepares a call of `generate` without running it, for `decode` inside your own `jit`.

    `decode(model, call)` is a pure function, and the call is a pytree. Replace values that differ from run to run, for
    example `dataclasses.replace(call, strategy=dataclasses.replace(call.strategy, key=key))`; shapes stay as they are.

    With a mesh over several processes, all of them pass the whole batch, as in any `jit` of JAX.

    Args:
        model: as in `generate`.
        inputs: as in `generate`.
        generation_config: as in `generate`.
        **kwargs: as in `generate`, except arguments that run on the host.

    Raises:
        ValueError: as `generate`, and for arguments that run on the host.
    """
    request = Request.of(inputs, generation_config, kwargs)
    prepared = _prepare_alone(model, request)
    if request.streamer is not None or prepared.config.max_time is not None:
        raise ValueError(
            "`decode` is a pure function without a streamer or a clock. Leave out `streamer` and `max_time`."
        )
    if prepared.host:
        raise ValueError(
            "`decode` is a pure function, but a processor or criterion of this call runs on the host. Write it as a "
            "JAX function of (input_ids, scores, cur_len)."
        )
    if prepared.intermediates:
        raise ValueError(f"`decode` does not return {[*prepared.intermediates]}. Use `generate`, or the model itself.")
    return prepared.call


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Suspends the mesh and the transfer guard that the caller has set in JAX.

    A call takes and returns NumPy arrays, so its transfers are expected.
    """
    with no_mesh(), jax.transfer_guard("allow"):
        yield
