"""The host front door: `generate` resolves, checks, pads to buckets, runs two compiled programs, trims.

JAX clamps and wraps where torch raises, so everything a program could get wrong is checked here, on the host, before
anything is compiled.
"""

import atexit
import contextlib
import copy
import itertools
import logging
import os
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import numpy as np

from jaxgen import lazy
from jaxgen.base import Model, no_mesh, row_shards
from jaxgen.buckets import bucket, row_bucket
from jaxgen.generation.call import Call
from jaxgen.generation.config import Resolved, resolve, warn_once
from jaxgen.generation.custom_generate import call_custom, call_repository, own_arguments
from jaxgen.generation.driver import UNWATCHED, WATCHED, collect, drive
from jaxgen.generation.host_callbacks import HostCriterion, HostFunctions, for_criterion
from jaxgen.generation.inputs import (
    Inputs,
    checked_inputs,
    checked_negatives,
    key_words,
    pad_token_id_or_default,
)
from jaxgen.generation.outputs import GenerateOutput, to_output
from jaxgen.generation.processor_list import (
    as_pytree,
    processor_list,
    takes_cur_len,
    warn_about_new_functions,
    warn_about_precedence,
)
from jaxgen.generation.prompts import padded_prompt, with_negative_prompts
from jaxgen.generation.strategies import Rules, strategy_for
from jaxgen.generation.streaming import NewTokens, to_streamer
from jaxgen.generation.token_healing import heal
from jaxgen.processors.stop_strings import StopStrings
from jaxgen.processors.stopping_criteria import CustomCriterion, EosToken, MaxLength

logger = logging.getLogger(__name__)


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
    **kwargs: Any,
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
    others = {name: value for name, value in kwargs.items() if name not in own}
    later = {"synced_gpus": synced_gpus, "assistant_model": assistant_model}
    custom = Custom(
        _listed("logits_processor", logits_processor),
        _listed("stopping_criteria", stopping_criteria),
        prefix_allowed_tokens_fn,
        negative_prompt_ids,
        negative_prompt_attention_mask,
        None if "key" in own else key,
        output_logprobs,
        streamer,
        tokenizer,
    )
    call = lower(model, inputs, generation_config, {**others, **later}, custom)
    if callable(custom_generate):
        _check_custom_generate(call, custom)
        with call.host.registered():
            return call_custom(custom_generate, model, call, own)
    with _undisturbed(), call.host.registered():
        if streamer is None:
            state = collect(drive(model, call, UNWATCHED))
        else:
            state = collect(drive(model, call, WATCHED), to_streamer(streamer, call))
            streamer.end()
        return to_output(call, state)


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
    others, custom = checked_for_stream(kwargs)
    return follow(model, lower(model, inputs, generation_config, others, custom))


def checked_for_stream(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], "Custom"]:
    """The keywords of `stream` in their two parts, if it can serve them."""
    others, custom = _split_customs(kwargs)
    if custom.streamer is not None or custom.output_logprobs:
        raise ValueError(
            "`stream` yields the tokens and nothing else: it takes no `streamer` and no `output_logprobs`. Use "
            "`generate` for these."
        )
    return others, custom


def follow(model: Model, call: Call) -> Generator[np.ndarray, None, None]:
    """The chunks of `stream`."""
    if call.config.return_dict_in_generate:
        raise ValueError(
            "`stream` yields tokens, but `return_dict_in_generate`=True asks for more. Pass False, or use `generate` "
            "with a `streamer`."
        )
    if call.config.num_beams > 1:
        raise ValueError(
            f"`stream` cannot follow `num_beams`={call.config.num_beams}: beams change their tokens until the end. Use "
            "`generate`, or one beam."
        )
    chunks = _chunks(model, call)
    _unread.add(chunks)
    return chunks


# A stream that is left unread ends while the modules that end it are still there.
_unread: weakref.WeakSet[Generator[np.ndarray, None, None]] = weakref.WeakSet()
atexit.register(lambda: [chunks.close() for chunks in list(_unread)])


def _chunks(model: Model, call: Call) -> Generator[np.ndarray, None, None]:
    new = NewTokens(call)
    with call.host.registered(), contextlib.closing(drive(model, call, WATCHED)) as chunks:
        while True:
            with _undisturbed():  # and only here, not in the code that reads the stream
                progress = next(chunks, None)
            if progress is None:
                return
            if (tokens := new(progress)).shape[1]:
                yield tokens


def prepare(model: Model, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Call:
    """The checks and the resolution of `generate` without the run: for `decode` inside your own `jit`.

    `decode(model, call.prompt, call.strategy, call.slots)` is then the pure function of the call. Replace what should
    differ from run to run, such as `dataclasses.replace(call.strategy, key=key)`; the shapes stay.

    Args:
        model: as in `generate`.
        inputs: as in `generate`.
        generation_config: as in `generate`.
        **kwargs: as in `generate`, but for what runs on the host.

    Returns:
        The `Call`: of its fields, `prompt`, `strategy` and `slots` are for `decode`.

    Raises:
        ValueError: as `generate`, and for what runs on the host.
    """
    others, custom = _split_customs(kwargs)
    call = lower(model, inputs, generation_config, others, custom)
    if custom.streamer is not None or call.config.max_time is not None:
        raise ValueError("`decode` is a pure function: it has no streamer and no clock. Leave out `max_time`.")
    if call.host:
        raise ValueError(
            "`decode` is a pure function, but a processor or criterion of this call runs on the host. Write it as a "
            "JAX function of (input_ids, scores, cur_len)."
        )
    if call.collect:
        raise ValueError(f"`decode` does not collect {[*call.collect]}. Use `generate`, or the model itself.")
    return call


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without what callers have set JAX to for their own code: a mesh, and a guard against transfers.

    A call takes NumPy arrays and returns them, so nobody who makes one is surprised by a transfer.
    """
    with no_mesh(), jax.transfer_guard("allow"):
        yield


@dataclass(frozen=True)
class Custom:
    """The arguments of `generate` that are no fields of a GenerationConfig, as they were passed."""

    logits_processor: list[Any] = field(default_factory=list)
    stopping_criteria: list[Any] = field(default_factory=list)
    prefix_allowed_tokens_fn: Any = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    key: Any = None
    output_logprobs: bool = False
    streamer: Any = None
    tokenizer: Any = None


def _split_customs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Custom]:
    """The keywords that may be fields of a GenerationConfig or inputs of a model, and the others."""
    names = {field.name for field in fields(Custom)}
    given = {name: value for name, value in kwargs.items() if name in names}
    for name in ("logits_processor", "stopping_criteria"):
        given[name] = _listed(name, given.get(name))
    return {name: value for name, value in kwargs.items() if name not in names}, Custom(**given)


def lower(
    model: Model,
    inputs: Any,
    generation_config: Any,
    kwargs: dict[str, Any],
    custom: Custom | None = None,
    reserve: int = 0,
) -> Call:
    """From the arguments of `generate` to the arguments of `prefill` and `advance`; every check is in here.

    For `reserve` see `padded_prompt`; it is for one row and one beam.
    """
    with _undisturbed():
        call = lower_for_any_device(model, inputs, generation_config, kwargs, custom, reserve)
    _check_memory(model, call)
    return call


def lower_for_any_device(
    model: Model,
    inputs: Any,
    generation_config: Any,
    kwargs: dict[str, Any],
    custom: Custom | None = None,
    reserve: int = 0,
) -> Call:
    """As `lower`, whatever the memory here: for programs that run elsewhere."""
    custom = custom or Custom()
    kwargs = _with_one_cache(kwargs)
    for name in _NOT_YET & kwargs.keys():
        if kwargs[name] is not None and kwargs[name] is not False:
            raise ValueError(f"`{name}` is not supported. Leave it out.")
    # Permission for code of others concerns `custom_generate` alone.
    supported = {name: value for name, value in kwargs.items() if name not in {*_NOT_YET, "trust_remote_code"}}
    config, model_inputs = resolve(model.generation_config, generation_config, supported)
    if custom.streamer is not None:
        _check_streamer(custom.streamer, config)
    if custom.output_logprobs and not config.return_dict_in_generate:
        raise ValueError("`output_logprobs`=True has nowhere to put them. Pass `return_dict_in_generate=True` too.")
    read = checked_inputs(model, inputs, model_inputs, config)
    if config.merged.token_healing:
        read = _healed(model, read, custom)
    config = _fitted(config, read, model_inputs)
    rows, columns = read.input_ids.shape
    max_length = config.length_for(columns, model.max_position_embeddings)
    config, eos_token_id, stop_length, criteria = _split_criteria(custom.stopping_criteria, config, max_length)
    if stop_length >= 2**31:
        raise ValueError(
            f"{stop_length} columns are asked for, but their number must be below 2**31. Lower `max_new_tokens` or "
            "`max_length` (a tokenizer without a limit reports 10**30)."
        )
    whole = read.attention_mask.shape[1] + stop_length - columns
    if whole > model.max_position_embeddings:
        logger.warning(
            "%d tokens are asked for, and the model was made for %d (`max_position_embeddings`): expect poor text "
            "beyond. %s to avoid it.",
            whole,
            model.max_position_embeddings,
            "Lower `max_new_tokens`"
            if read.attention_mask.shape[1] < model.max_position_embeddings
            else "Shorten the prompt",
        )
    if max(eos_token_id, default=0) >= model.vocab_size:
        logger.warning(
            "`eos_token_id` holds %d, but ids of this model are 0 to %d: no text will end with it.",
            max(eos_token_id),
            model.vocab_size - 1,
        )
    guidance_scale, customs = _guidance(config, custom)
    chunk, new_tokens = config.prefill_chunk_size, max(stop_length - columns, 1)
    if guidance_scale is None:
        prompt, seen = padded_prompt(model, read, chunk, reserve, new_tokens)
    else:
        _need_plain(read, chunk, "`guidance_scale`", "which reads negative prompts beside the others")
        negative = custom.negative_prompt_ids, custom.negative_prompt_attention_mask
        prompt = with_negative_prompts(model, read, *checked_negatives(model, read, *negative), guidance_scale)
        seen = np.arange(prompt.cache_slots - columns, prompt.cache_slots)
    warn_about_new_functions("logits_processor", custom.logits_processor)
    warn_about_new_functions("stopping_criteria", custom.stopping_criteria)
    host = HostFunctions()
    beams, groups = config.num_beams, config.num_beam_groups
    host_rows = rows * (config.num_return_sequences if beams == 1 else beams)
    rules = Rules(
        eos=EosToken.build(eos_token_id, model.vocab_size),
        max_length=MaxLength(stop_length),
        processors=processor_list(
            config,
            columns,
            max_length,
            model.vocab_size,
            customs,
            custom.prefix_allowed_tokens_fn,
            host,
            host_rows // groups,
        ),
        stopping_criteria=(
            *_stop_strings(config, custom.tokenizer, model.vocab_size),
            # Beams are finished, or not, while they are candidates.
            *(
                _criterion(each, host, host_rows * (config.candidates_per_beam if beams > 1 and groups == 1 else 1))
                for each in criteria
            ),
        ),
    )
    collect = tuple(name for name in ("attentions", "hidden_states") if name in config.outputs)
    strategy = strategy_for(
        config,
        rules,
        key_words(custom.key, config, row_bucket(row_shards(model.mesh), rows), rows),
        pad_token_id_or_default(config),
        # Without an eos, rows that a criterion finishes go on until all are, as in transformers.
        bool(eos_token_id) or not rules.stopping_criteria,
        max_length,
        model.vocab_size,
        _recorded(config, custom, collect),
    )
    prompt_bucket = prompt.input_ids.shape[1]
    # With beams every further column costs a slot for each of them.
    slots = bucket(prompt_bucket + new_tokens) if beams == 1 else prompt_bucket + bucket(new_tokens)
    passes, reserved = strategy.forward_passes(new_tokens), prompt.cache_slots if reserve else 0
    return Call(prompt, strategy, slots, collect, passes, rows, columns, seen, read.fresh, read, config, host, reserved)


def _with_one_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords with the cache under its newer name, and the warnings of transformers 5.24 `deprecate_kwarg`."""
    others = dict(kwargs)
    if "past_key_values" not in others:
        return others
    old = others.pop("past_key_values")
    message = None
    if "cache" in others:
        message = (
            "Both `past_key_values` and `cache` are set for `generate`. Using "
            f"`cache={others['cache']}` and ignoring deprecated `past_key_values={old}`."
        )
    elif lazy.cache_name() == "cache":
        message = (
            "`past_key_values` is deprecated and will be removed in version 6.0.0 for `generate`. Use `cache` instead."
        )
    if message is not None:
        warnings.warn(message, FutureWarning, stacklevel=5)
    return {"cache": old, **others}


def _recorded(config: Resolved, custom: Custom, collect: tuple[str, ...]) -> tuple[str, ...]:
    """What the strategy records of every step: the outputs asked for, and what it takes to sort the internals."""
    outputs = tuple(name for name in ("scores", "logits") if name in config.outputs)
    if custom.output_logprobs:
        if config.num_beams > 1 or config.penalty_alpha:
            raise ValueError(
                "`output_logprobs` is for greedy decoding and sampling. Pass `output_scores=True`, and the outputs to "
                "`compute_transition_scores`."
            )
        return (*outputs, "logprobs")
    if config.penalty_alpha and collect:
        return (*outputs, "chosen")
    sorted_by_beam = "attentions" in collect or (collect and not config.use_cache)
    return (*outputs, "parents") if sorted_by_beam and config.num_beams > 1 else outputs


def _fitted(config: Resolved, read: Inputs, model_inputs: Mapping[str, Any]) -> Resolved:
    """The configuration of a prompt that is not all text, with the lengths and rules that transformers 5.24 leaves it.

    Raises:
        ValueError: if the two do not go together.
    """
    if read.past is not None and config.merged.cache_implementation is not None:
        raise ValueError(
            "Passing both `cache_implementation` (used to initialize certain caches) and "
            f"`{lazy.cache_name()}` (a Cache object) is unsupported. Please use only one of the two."
        )
    if not config.use_cache and config.prefill_chunk_size is not None:
        raise ValueError("Cannot use prefill chunking without a cache. Leave out `use_cache` or `prefill_chunk_size`.")
    if not config.use_cache and model_inputs.get("position_ids") is not None:
        steps = np.diff(read.position_ids, axis=1)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if read.attention_mask.all() and (steps != 1).any():
            raise ValueError(
                "`position_ids` that do not go up by one are packed texts to transformers if `use_cache` is False. "
                "Leave out `use_cache`, or pass one text per row."
            )
    if config.penalty_alpha:
        _need_plain(read, config.prefill_chunk_size, "`penalty_alpha`", "which compares the hidden states of the text")
    if not config.use_cache and {"attentions", "hidden_states"} & {*config.outputs}:
        for name, given in (("cache", read.past is not None), ("penalty_alpha", config.penalty_alpha)):
            if given:
                raise ValueError(
                    "`use_cache`=False asks for the attentions and hidden states of the whole text at every step, "
                    f"which does not go with `{name}`. Leave `use_cache` out: each column's are returned once."
                )
    if read.embeddings is None:
        return config
    needs_text = "Passing `{}` requires some form of `input_ids` to be passed to `generate`, ignoring the argument."
    new_only = (
        "Passing `{}` with `inputs_embeds` and without `input_ids` to `generate` will apply {} only to newly generated "
        "tokens, not to the prompt."
    )
    cautions = [
        ("encoder_repetition_penalty", 1.0, needs_text, ""),
        ("encoder_no_repeat_ngram_size", 0, needs_text, ""),
    ]
    if not read.input_ids.size:
        cautions += [
            ("repetition_penalty", 1.0, new_only, "the penalty"),
            ("no_repeat_ngram_size", 0, new_only, "n-gram constraints"),
        ]
    for name, off, message, what in cautions:
        if getattr(config.merged, name) not in (None, off):
            warnings.warn(message.format(name, what), UserWarning, stacklevel=5)
    merged = copy.copy(config.merged)
    merged.encoder_repetition_penalty = merged.encoder_no_repeat_ngram_size = None
    columns = read.embeddings.shape[1] + (0 if read.past is None else read.past.get_seq_length())
    config = replace(config, merged=merged, use_cache=True)
    if read.input_ids.shape[1] == columns:
        return config
    max_length = None if config.max_length is None else config.max_length - columns
    return replace(config, max_length=max_length, min_length=max(config.min_length - columns, 0))


def _need_plain(read: Inputs, chunk: int | None, name: str, why: str) -> None:
    kinds = {"cache": read.past, "inputs_embeds": read.embeddings, "position_ids": read.position_ids}
    for other, value in {**kinds, "prefill_chunk_size": chunk}.items():
        if value is not None:
            raise ValueError(f"`{other}` does not go with {name}, {why}. Leave out one of them.")


def _healed(model: Model, read: Inputs, custom: Custom) -> Inputs:
    """The prompt with its last tokens chosen anew; see `token_healing`."""
    if custom.tokenizer is None:
        raise ValueError(
            " When generating with token healing, you must pass the model's tokenizer to the `tokenizer` argument of "
            "`generate`."
        )
    if not callable(custom.tokenizer):
        raise ValueError(f"`tokenizer`={custom.tokenizer!r} is none. Pass the model's.")
    if not read.plain:
        raise ValueError(
            "`token_healing` changes the prompt, which then does not go with `cache`, `inputs_embeds` or "
            "`position_ids`. Leave out one of them."
        )

    # Drawn if the checkpoint's own settings say so, as in transformers.
    words, rows = None, len(read.input_ids)
    if custom.key is not None and model.generation_config.do_sample:
        words = key_words(custom.key, resolve(model.generation_config, None, {})[0], rows, rows)

    def one_token(prompt: np.ndarray, bias: Any, row: int) -> Any:
        key = words if words is None or words.ndim == 1 else words[row]
        return generate(model, prompt, generation_config=bias, key=key)

    input_ids = heal(read.input_ids, custom.tokenizer, one_token)
    if input_ids.shape == read.input_ids.shape:
        return replace(read, input_ids=input_ids)
    if not read.attention_mask.all():
        raise ValueError(
            f"`token_healing` made prompts of {input_ids.shape[1]} columns, for which the `attention_mask` of "
            f"{read.attention_mask.shape[1]} does not hold. Heal one prompt at a time."
        )
    mask = np.ones(input_ids.shape, bool)
    return replace(read, input_ids=input_ids, text_mask=mask, attention_mask=mask, fresh=input_ids.shape[1])


def _check_custom_generate(call: Call, custom: Custom) -> None:
    """Refuses what only the loops of jaxgen could do."""
    unheeded = {
        "streamer": custom.streamer is not None,
        "output_logprobs": custom.output_logprobs,
        "max_time": call.config.max_time is not None,
        "guidance_scale": call.config.merged.guidance_scale not in (None, 1),
    }
    for name, given in unheeded.items():
        if given:
            raise ValueError(
                f"`{name}` does not go with `custom_generate`, whose function chooses the tokens by itself. Leave it "
                "out, or do it in your function."
            )


def _check_streamer(streamer: Any, config: Resolved) -> None:
    if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
        raise ValueError(
            f"`streamer`={streamer!r} must have the methods `put` and `end`, as transformers' streamers do."
        )
    if config.num_beams > 1:
        raise ValueError("`streamer` cannot be used with beam search (yet!). Make sure that `num_beams` is set to 1.")


def _listed(name: str, given: Any) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, Iterable):
        raise ValueError(f"`{name}`={given!r} must be a list of callables. Wrap a single one in a list.")
    return list(given)


def _split_criteria(
    criteria: list[Any], config: Resolved, max_length: int
) -> tuple[Resolved, tuple[int, ...], int, list[Any]]:
    """What transformers' own criteria replace: of the configuration, the ids and the length; and the other criteria.

    Several of one type all act, as in transformers.
    """
    given = {
        name: [each for each in criteria if type(each) is lazy.torch_class(name)]
        for name in ("MaxLengthCriteria", "EosTokenCriteria", "MaxTimeCriteria", "StopStringCriteria")
    }
    built_in = {
        "MaxLengthCriteria": True,
        "EosTokenCriteria": bool(config.eos_token_id),
        "MaxTimeCriteria": config.max_time is not None,
        "StopStringCriteria": bool(config.stop_strings),
    }
    for name, customs in given.items():
        if customs and built_in[name]:
            warn_about_precedence("stopping criteria", customs[0])
    eos_token_id = config.eos_token_id
    if lengths := [each.max_length for each in given["MaxLengthCriteria"]]:
        for length in lengths:
            _check_length("stopping_criteria", length)
        max_length = min(lengths)
    if ends := [np.asarray(each.eos_token_id).reshape(-1).tolist() for each in given["EosTokenCriteria"]]:
        eos_token_id = tuple(dict.fromkeys(itertools.chain(*ends)))
    if times := [each.max_time for each in given["MaxTimeCriteria"]]:
        config = replace(config, max_time=min(times))
    if given["StopStringCriteria"]:
        config = replace(config, stop_strings=())
    settled = [*given["MaxLengthCriteria"], *given["EosTokenCriteria"], *given["MaxTimeCriteria"]]
    return config, eos_token_id, max_length, [each for each in criteria if not any(each is own for own in settled)]


def _stop_strings(config: Resolved, tokenizer: Any, vocab_size: int) -> tuple[StopStrings, ...]:
    if not config.stop_strings:
        return ()
    if tokenizer is None:
        raise ValueError(
            "There are one or more stop strings, either in the arguments to `generate` or in the model's generation "
            f"config ({[*config.stop_strings]}), but we could not locate a tokenizer. When generating with stop "
            "strings, you must pass the model's tokenizer to the `tokenizer` argument of `generate`."
        )
    return (StopStrings.build(config.stop_strings, tokenizer, vocab_size),)


def _check_length(name: str, length: Any) -> None:
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"`{name}` holds a length of {length!r}, which must be a positive integer.")


def _criterion(criterion: Any, host: HostFunctions, rows: int) -> Any:
    if isinstance(criterion, (EosToken, MaxLength)):
        return criterion
    if takes_cur_len("stopping_criteria", criterion):
        return CustomCriterion(as_pytree(criterion), type(criterion))
    number = host.add(for_criterion(criterion), "stopping_criteria")
    warn_once(
        "`stopping_criteria` runs as Python on the host: every step waits for it. A JAX function of (input_ids, "
        "scores, cur_len) is compiled into the decode instead."
    )
    return HostCriterion(number, rows)


def _guidance(config: Resolved, custom: Custom) -> tuple[Any, list[Any]]:
    """The scale, unless off or replaced by a custom processor of its type, and the custom processors in their order."""
    scale, customs = config.merged.guidance_scale, custom.logits_processor
    replacing = lazy.torch_class("UnbatchedClassifierFreeGuidanceLogitsProcessor")
    if scale is None or scale == 1 or any(type(each) is replacing for each in customs):
        if custom.negative_prompt_ids is not None:
            logger.warning("`negative_prompt_ids` has no effect without `guidance_scale`. Pass one other than 1.")
        first = [each for each in customs if type(each) is replacing]
        return None, [*first, *(each for each in customs if type(each) is not replacing)]
    if not isinstance(scale, (int, float, np.number)) or isinstance(scale, bool):
        raise ValueError(f"`guidance_scale`={scale!r} must be a number, above 1 to follow the prompt more closely.")
    return scale, customs


# Arguments of transformers' `generate` that are yet to come; their neutral values are accepted.
_NOT_YET = frozenset("synced_gpus assistant_model custom_generate assistant_tokenizer".split())


def _check_memory(model: Model, call: Call) -> None:
    """Refuses what no allocator could give, before anything is compiled for it."""
    prompt_rows, columns = call.prompt.input_ids.shape
    rows, steps = prompt_rows * call.strategy.copies, call.slots - columns
    columns, cache_slots = call.prompt.cache_slots, call.cache_slots
    needed = {"the cache": rows * cache_slots * model.cache_bytes_per_token}
    scored = rows * call.config.num_beams
    for name in call.config.outputs:
        if name in call.collect:
            of_prompt = prompt_rows * model.internals_bytes(name, columns, columns)
            of_step = rows * model.internals_bytes(name, call.strategy.branches, cache_slots)
            needed[f"`output_{name}`"] = of_prompt + steps * of_step
            if not call.config.use_cache:
                width = call.columns + steps
                texts = steps if call.config.num_beams > 1 else 1  # beams change their past, other rows share theirs
                needed[f"`output_{name}`"] += scored * texts * model.internals_bytes(name, width, width)
        else:
            needed[f"`output_{name}`"] = 4 * scored * steps * model.vocab_size
    available = memory_bytes() * (1 if model.mesh is None else model.mesh.size)
    place = "the device has" if model.mesh is None else "the devices have"
    if sum(needed.values()) > available:
        parts = ", ".join(f"{size / 1e9:,.1f} GB for {name}" for name, size in needed.items())
        raise ValueError(
            f"{scored} rows of {call.slots} tokens need {parts}, but {place} {available / 1e9:,.1f} GB. Lower "
            "`max_new_tokens`, the prompt length or the batch"
            + (", or ask for fewer outputs." if len(needed) > 1 else ".")
        )


def memory_bytes() -> int:
    """What a device has here; a CPU has the machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
