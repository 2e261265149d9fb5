"""Turns the arguments of `generate` into a call that is ready to run.

JAX clamps and wraps indices where torch raises, so every value is checked here, on the host, before anything is
compiled.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxgen import lazy
from jaxgen.base import Call, Model, Prefill, Prompt, Source, Strategy, row_shards
from jaxgen.buckets import row_bucket
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.config.fields import INPUTS
from jaxgen.generation.config.resolve import resolve
from jaxgen.generation.modes import Mode, mode_for
from jaxgen.generation.modes.base import Parts
from jaxgen.generation.processor_list import processor_list, warn_about_new_functions
from jaxgen.generation.prompt.inputs import Inputs, checked_inputs, checked_negatives, key_data
from jaxgen.generation.prompt.prompts import guided_prompt, padded_prompt
from jaxgen.generation.prompt.source import checked_encoder_decoder_inputs
from jaxgen.generation.request import Request
from jaxgen.generation.running.host_callbacks import HostFunctions
from jaxgen.generation.stopping import Stopping, stopping, stopping_criteria
from jaxgen.generation.user_warnings import warn_caller

logger = logging.getLogger(__name__)


def read_request(model: Model, request: Request) -> tuple[Mode, Inputs]:
    """The decoding mode, with the configuration of the call, and the checked prompt.

    Raises:
        ValueError: naming the argument, its value, its range and what to do.
    """
    config, model_inputs = resolve(model.generation_config, request.generation_config, _supported(request))
    mode = mode_for(config, request.assistant_model)
    if request.streamer is not None:
        _check_streamer(request.streamer)
        mode.check_streamer()
    if request.output_logprobs and not config.return_dict_in_generate:
        raise ValueError(
            "`output_logprobs`=True needs an output to return them in. Pass `return_dict_in_generate=True` too."
        )
    _refuse_inputs_of_other_models(model, model_inputs)
    if not model.is_encoder_decoder:
        return mode, checked_inputs(model, request.inputs, model_inputs, config)
    mode.check_encoder_decoder()
    _refuse_with_encoder(config)
    return mode, checked_encoder_decoder_inputs(model, request.inputs, model_inputs, config)


def _refuse_inputs_of_other_models(model: Model, model_inputs: Mapping[str, object]) -> None:
    """The error of transformers for an input that models with an encoder have, or models without."""
    others = {name for name, (_, field) in INPUTS.items() if field.group == "encoder-decoder models"}
    if model.is_encoder_decoder:
        others = {"position_ids", "logits_to_keep"}
    if unused := [name for name, value in model_inputs.items() if name in others and value is not None]:
        kind = "with an encoder" if model.is_encoder_decoder else "without an encoder"
        raise ValueError(
            f"The following `model_kwargs` are not used by the model: {unused}. They are not for models {kind}. Leave "
            "them out."
        )


def _refuse_with_encoder(config: DecodeConfig) -> None:
    """Raises a ValueError for a field that does not go with an encoder."""
    if config.cache_backend is not None:
        raise ValueError(
            "`cache_implementation`='quantized' does not go with an encoder-decoder model, as in transformers. Leave "
            "it out."
        )
    if config.merged.guidance_scale not in (None, 1):
        raise ValueError(
            f"`guidance_scale`={config.merged.guidance_scale!r} does not go with an encoder-decoder model, as in "
            "transformers. Leave it out."
        )
    if config.merged.token_healing:
        raise ValueError(
            "`token_healing` is about the end of a prompt, which an encoder-decoder model does not continue. Leave it "
            "out."
        )


def build_call(model: Model, request: Request, mode: Mode, inputs: Inputs) -> PreparedCall:
    """Builds the call of a request that `read_request` has checked.

    Memory is not checked, so that `plan` can ask about other machines.

    Raises:
        ValueError: naming the argument, its value, its range and what to do.
    """
    stop = stopping(model, request.stopping_criteria, _fitted(mode.config, inputs), inputs)
    mode = replace(mode, config=stop.config)
    mode.check_inputs(inputs)
    guidance_scale, logits_processor = _guidance(mode.config, request)
    new_tokens = max(stop.length - inputs.input_ids.shape[1], 1)
    prompt, prefill, token_slots = _prompt(model, request, mode.config, inputs, guidance_scale, new_tokens)
    host = HostFunctions()
    strategy = _strategy(model, request, mode, inputs, stop, logits_processor, host)
    prompt, source = _source(prompt, prefill, mode.config, inputs)
    slots = mode.text_slots(prompt.input_ids.shape[1], new_tokens)
    backend = mode.config.cache_backend if inputs.past is None else None
    call = Call(prompt, strategy, slots, prefill, source, backend)
    return PreparedCall(
        model=model,
        call=call,
        inputs=inputs,
        config=mode.config,
        mode=mode,
        host=host,
        token_slots=token_slots,
        forward_passes=strategy.forward_passes(new_tokens),
        reserved=call.prompt_slots if request.reserve else 0,
    )


def _supported(request: Request) -> dict[str, object]:
    """The keywords that are generation fields and inputs of the model."""
    if request.synced_gpus not in (None, True, False):
        raise ValueError(
            f"`synced_gpus`={request.synced_gpus!r} must be True or None: the processes of a call always stay together."
        )
    keywords = _with_one_cache(request.keywords)
    # `generate` handles `custom_generate` before it gets here; `stream` and `prepare` do not support it.
    if keywords.get("custom_generate") is not None:
        raise ValueError("`custom_generate` is not supported. Leave it out.")
    # `trust_remote_code` only matters to `custom_generate`.
    return {name: value for name, value in keywords.items() if name not in ("custom_generate", "trust_remote_code")}


def _with_one_cache(kwargs: Mapping[str, object]) -> dict[str, object]:
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
        warn_caller(message, FutureWarning)
    return {"cache": old, **others}


def _check_streamer(streamer: object) -> None:
    if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
        raise ValueError(
            f"`streamer`={streamer!r} must have the methods `put` and `end`, as transformers' streamers do."
        )


def _fitted(config: DecodeConfig, inputs: Inputs) -> DecodeConfig:
    """The configuration adapted to the prompt, as in transformers 5.24: with embeddings, lengths and some rules differ.

    Raises:
        ValueError: if prompt and configuration conflict.
    """
    if inputs.past is not None and config.merged.cache_implementation is not None:
        raise ValueError(
            "Passing both `cache_implementation` (used to initialize certain caches) and "
            f"`{lazy.cache_name()}` (a Cache object) is unsupported. Please use only one of the two."
        )
    if not config.use_cache and config.prefill_chunk_size is not None:
        raise ValueError("Cannot use prefill chunking without a cache. Leave out `use_cache` or `prefill_chunk_size`.")
    if config.cache_backend is not None and config.prefill_chunk_size is not None:
        raise ValueError(
            f"`prefill_chunk_size`={config.prefill_chunk_size} cannot be combined with a quantised cache, whose first "
            "pass reads the whole prompt. Leave out one of them."
        )
    if config.cache_backend == "fp8" and config.merged.guidance_scale not in (None, 1):
        raise ValueError(
            f"`guidance_scale`={config.merged.guidance_scale} cannot be combined with a cache in fp8, because "
            "transformers does not quantise the cache of the negative prompt. Use the backend 'int8'."
        )
    if not config.use_cache and inputs.position_ids is not None:
        steps = np.diff(inputs.position_ids, axis=1)
        if inputs.attention_mask.all() and (steps != 1).any():
            raise ValueError(
                "with `use_cache`=False, transformers treats `position_ids` that do not increase by one as several "
                "texts packed into a row, which jaxgen does not support. Leave out `use_cache`, or pass one text per "
                "row."
            )
    if not config.use_cache and config.intermediates and inputs.past is not None:
        raise ValueError(
            "`use_cache`=False asks for the attentions and hidden states of the whole text at every step, which cannot "
            "be combined with `cache`. Leave `use_cache` out to get those of each token once."
        )
    no_text = inputs.embeddings is not None or (inputs.source is not None and inputs.source.input_ids is None)
    if not no_text:
        return config
    needs_text = "Passing `{}` requires some form of `input_ids` to be passed to `generate`, ignoring the argument."
    new_only = (
        "Passing `{}` with `inputs_embeds` and without `input_ids` to `generate` will apply {} only to newly generated "
        "tokens, not to the prompt."
    )
    # The value that switches each rule off, and the warning of transformers if it is on.
    cautions = [
        ("encoder_repetition_penalty", 1.0, needs_text, ""),
        ("encoder_no_repeat_ngram_size", 0, needs_text, ""),
    ]
    if inputs.embeddings is not None and not inputs.input_ids.size:
        cautions += [
            ("repetition_penalty", 1.0, new_only, "the penalty"),
            ("no_repeat_ngram_size", 0, new_only, "n-gram constraints"),
        ]
    for name, off, message, what in cautions:
        if getattr(config.merged, name) not in (None, off):
            warn_caller(message.format(name, what))
    # These two read the prompt's tokens, which embeddings do not have.
    merged = copy.copy(config.merged)
    merged.encoder_repetition_penalty = merged.encoder_no_repeat_ngram_size = None
    if inputs.embeddings is None:
        return replace(config, merged=merged)
    # With embeddings and without ids, `input_ids` starts empty, and lengths count from there.
    columns = inputs.embeddings.shape[1] + (0 if inputs.past is None else inputs.past.get_seq_length())
    config = replace(config, merged=merged, use_cache=True)
    if inputs.input_ids.shape[1] == columns:
        return config
    max_length = None if config.max_length is None else config.max_length - columns
    return replace(config, max_length=max_length, min_length=max(config.min_length - columns, 0))


def _guidance(config: DecodeConfig, request: Request) -> tuple[float | None, list[Callable[..., object]]]:
    """The guidance scale and the custom processors. The scale is None if it is 1 or a custom processor replaces it."""
    scale, customs = config.merged.guidance_scale, request.logits_processor
    replacing = lazy.torch_class("UnbatchedClassifierFreeGuidanceLogitsProcessor")
    if scale is None or scale == 1 or any(type(each) is replacing for each in customs):
        if request.negative_prompt_ids is not None:
            logger.warning("`negative_prompt_ids` has no effect without `guidance_scale`. Pass one other than 1.")
        # In transformers guidance comes before all other processors, and so does its replacement.
        first = [each for each in customs if type(each) is replacing]
        return None, [*first, *(each for each in customs if type(each) is not replacing)]
    if not isinstance(scale, (int, float, np.number)) or isinstance(scale, bool):
        raise ValueError(f"`guidance_scale`={scale!r} must be a number, above 1 to follow the prompt more closely.")
    return float(scale), customs


def _prompt(
    model: Model, request: Request, config: DecodeConfig, inputs: Inputs, guidance_scale: float | None, new_tokens: int
) -> tuple[Prompt, Prefill | None, np.ndarray]:
    """The padded prompt, its `Prefill`, and its cache slots; see `padded_prompt` and `guided_prompt`."""
    if guidance_scale is None:
        return padded_prompt(model, inputs, config.prefill_chunk_size, request.reserve, new_tokens)
    inputs.check_plain("`guidance_scale`", "which reads negative prompts in the same batch", config.prefill_chunk_size)
    negatives = checked_negatives(model, inputs, request.negative_prompt_ids, request.negative_prompt_attention_mask)
    return guided_prompt(model, inputs, *negatives, guidance_scale)


def _source(
    prompt: Prompt, prefill: Prefill | None, config: DecodeConfig, inputs: Inputs
) -> tuple[Prompt, Source | None]:
    """The prompt with the tokens of the source, and the source if the encoder has to read it."""
    if inputs.source is None:
        return prompt, None
    source, ids = inputs.source.padded(len(prompt.input_ids))
    encoder_input_ids: Any = ids
    # A continued cache has what the decoder needs, but not the arrays of the encoder.
    known = prefill is not None and prefill.past is not None and not config.intermediates
    return replace(prompt, encoder_input_ids=encoder_input_ids), None if known else source


def _strategy(
    model: Model,
    request: Request,
    mode: Mode,
    inputs: Inputs,
    stop: Stopping,
    logits_processor: list[Callable[..., object]],
    host: HostFunctions,
) -> Strategy:
    """The strategy of the mode, with processors, criteria and key. Functions for the host are added to `host`."""
    if request.assistant_tokenizer is not None and request.assistant_model is None:
        logger.warning("`assistant_tokenizer` has no effect without `assistant_model`. Pass both.")
    warn_about_new_functions("logits_processor", request.logits_processor)
    warn_about_new_functions("stopping_criteria", request.stopping_criteria)
    prompts = len(inputs.input_ids)
    processors = processor_list(
        mode, inputs, stop.max_length, model.vocab_size, logits_processor, request.prefix_allowed_tokens_fn, host
    )
    rows = prompts * mode.rows_per_criterion
    key = request.entropy if request.key is None and mode.config.do_sample else request.key
    eos, max_length, criteria = stopping_criteria(model, stop, request.tokenizer, host, rows)
    return mode.build(
        Parts(
            eos=eos,
            max_length=max_length,
            processors=processors,
            stopping_criteria=criteria,
            longest=stop.max_length,
            key=key_data(key, mode.config, row_bucket(row_shards(model.mesh), prompts), prompts),
            vocab_size=model.vocab_size,
            recorded=mode.recorded(mode.config.intermediates, request.output_logprobs),
            model=model,
            request=request,
            inputs=inputs,
            has_eos=bool(stop.eos_token_id),
        )
    )
