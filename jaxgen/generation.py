"""The host front door: `generate` resolves, checks, pads to buckets, runs two compiled programs, trims.

JAX clamps and wraps where torch raises, so everything a program could get wrong is checked here, on the host, before
anything is compiled.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxgen.base import Model, Prompt
from jaxgen.decoding import advance, finalize, prefill
from jaxgen.generation_config import Resolved, resolve
from jaxgen.sampling import Greedy
from jaxgen.stopping_criteria import EosToken, MaxLength

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateDecoderOnlyOutput:
    """What `generate(..., return_dict_in_generate=True)` returns; fields by attribute, key or place.

    Attributes:
        sequences: int32 [B, length]. The prompt and the new tokens.
    """

    sequences: np.ndarray

    def __getitem__(self, name: str | int) -> Any:
        return list(vars(self).values())[name] if isinstance(name, int) else vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def keys(self) -> list[str]:
        return list(vars(self))


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
    **kwargs: Any,
) -> np.ndarray | GenerateDecoderOnlyOutput:
    """Continues each prompt greedily; the arguments, and the tokens, of transformers 5.23 `generate`.

    Args:
        model: a model from `load` or `from_config`.
        inputs: integers [B, P]: an array of any library or nested lists. Also as `input_ids=`. Without any, each row
            starts from `bos_token_id`.
        generation_config: a `transformers.GenerationConfig`; its None fields fall back to the model's.
        **kwargs: `attention_mask` ([B, P], 1 on tokens and 0 on padding, inferred from `pad_token_id` if left out) and
            any field of GenerationConfig, which wins over every config.

    Returns:
        int32 [B, length]: the prompt, then the new tokens; rows that finish early are filled with `pad_token_id`, and
        the width ends with the last token any row needed. With `return_dict_in_generate`, the same as `.sequences`.

    Raises:
        ValueError: naming the argument, its value, the range and the next step; before anything is compiled.
    """
    _refuse_arguments(
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        synced_gpus=synced_gpus,
        assistant_model=assistant_model,
        streamer=streamer,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        custom_generate=custom_generate,
    )
    call = lower(model, inputs, generation_config, kwargs)
    state = prefill(model, call.prompt, call.strategy, call.slots)
    state = advance(model, state, call.strategy, _leaf(call.slots, np.int32))
    sequences = call.trim(finalize(call.strategy, state))
    return GenerateDecoderOnlyOutput(sequences) if call.return_dict else sequences


@dataclass(frozen=True)
class Call:
    """A checked call, ready to run: what the two programs take, and what the host needs to trim their output.

    Attributes:
        slots: S, the bucket of the cache and of the token buffer.
    """

    prompt: Prompt
    strategy: Greedy
    slots: int
    rows: int
    return_dict: bool

    def trim(self, outputs: Mapping[str, jax.Array]) -> np.ndarray:
        """int32 [B, length], waiting for the device."""
        _refuse_tracer(outputs["length"])
        # `device_get` can be interrupted while the device works, `np.asarray` cannot.
        fetched = jax.device_get(dict(outputs))
        if fetched["invalid"].any():
            logger.warning(
                "The scores of rows %s held NaN: their tokens mean nothing. Check the weights, or load as float32.",
                np.flatnonzero(fetched["invalid"]).tolist(),
            )
        return fetched["sequences"][: self.rows, : fetched["length"]].copy()  # writable, and without its bucket


def lower(model: Model, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> Call:
    """From the arguments of `generate` to the arguments of `prefill` and `advance`; every check is in here."""
    _refuse_arguments(**{name: kwargs[name] for name in _LATER_INPUTS & kwargs.keys()})
    config, model_inputs = resolve(model.generation_config, generation_config, kwargs)
    input_ids, given_mask = _inputs(model, inputs, model_inputs, config)
    _warn_about_padding(input_ids, given_mask, config)
    attention_mask = _infer_attention_mask(input_ids, config) if given_mask is None else given_mask
    rows, columns = input_ids.shape
    max_length = config.length_for(columns, model.max_position_embeddings)
    if max_length > model.max_position_embeddings:
        logger.warning(
            "%d tokens are asked for, and the model was made for %d (`max_position_embeddings`): expect poor text "
            "beyond. Lower `max_new_tokens` to avoid it.",
            max_length,
            model.max_position_embeddings,
        )
    if max(config.eos_token_id, default=0) >= model.vocab_size:
        logger.warning(
            "`eos_token_id` holds %d, but ids of this model are 0 to %d: no text will end with it.",
            max(config.eos_token_id),
            model.vocab_size - 1,
        )
    eos = [token for token in config.eos_token_id if 0 <= token < model.vocab_size]
    prompt = _pad_to_buckets(input_ids, attention_mask)
    padded_rows, padded_columns = prompt.input_ids.shape
    slots = bucket(padded_columns + max_length - columns)
    _check_memory(model, padded_rows, slots)
    return Call(prompt, _strategy(eos, _pad_token_id(config), max_length), slots, rows, config.return_dict_in_generate)


def bucket(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`: at most half as much again."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


# Inputs of transformers' `generate` that are yet to come.
_LATER_INPUTS = frozenset(
    {"position_ids", "past_key_values", "inputs_embeds", "tokenizer", "assistant_tokenizer", "trust_remote_code"}
)
_MIN_PROMPT_BUCKET = 16  # one program serves every short prompt; 16 columns cost hardly more than one
_MIN_EOS_BUCKET = 8


def _refuse_arguments(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"`{name}` is not supported yet. Leave it out.")


def _inputs(
    model: Model, inputs: Any, model_inputs: dict[str, Any], config: Resolved
) -> tuple[np.ndarray, np.ndarray | None]:
    """The checked prompt, int32 [B, P], and the attention mask the caller gave, bool [B, P]."""
    if inputs is not None and model_inputs.get("input_ids") is not None:
        raise ValueError("`inputs` and `input_ids` were both passed, and they mean the same. Pass one of them.")
    given = model_inputs.get("input_ids") if inputs is None else inputs
    mask = model_inputs.get("attention_mask")
    if given is None:
        if config.bos_token_id is None:
            raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
        given = np.full((1 if mask is None else len(mask), 1), config.bos_token_id)
    input_ids = _array("input_ids", given)
    if not np.issubdtype(input_ids.dtype, np.integer):
        raise ValueError(
            f"`input_ids` has dtype {input_ids.dtype}, but token ids are integers. Tokenise the text first."
        )
    if input_ids.size == 0:
        raise ValueError(f"`input_ids` has shape {input_ids.shape}, but every prompt needs at least one token.")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.vocab_size:
        raise ValueError(
            f"`input_ids` holds {low if low < 0 else high}, but ids of this model are 0 to {model.vocab_size - 1}. "
            "Check that tokenizer and model belong together."
        )
    return input_ids.astype(np.int32), None if mask is None else _mask(mask, input_ids)


def _mask(given: Any, input_ids: np.ndarray) -> np.ndarray:
    if np.ndim(given) > 2:
        raise ValueError(f"`attention_mask` passed to `generate` must be 2D, but has {np.ndim(given)} dimensions.")
    mask = _array("attention_mask", given)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {mask.shape}, but `input_ids` has {input_ids.shape}. They must be equal."
        )
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"`attention_mask` holds {mask[~np.isin(mask, (0, 1))][0]}, but may hold 0 and 1 only.")
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        logger.warning("`attention_mask` masks all of row %d: its continuation will mean nothing.", row)
    return mask.astype(bool)


def _array(name: str, given: Any) -> np.ndarray:
    _refuse_tracer(given)
    if isinstance(given, Mapping):
        raise ValueError(f"`{name}` is a mapping of {list(given)}. Pass its parts: generate(model, **inputs).")
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ValueError(f"`{name}` is no rectangular array ({error}). Pad the rows to one length.") from error
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` has shape {array.shape}, but must be [prompts, tokens]. Wrap a single prompt in a list."
        )
    return array


def _refuse_tracer(value: Any) -> None:
    if isinstance(value, Tracer):
        raise ValueError("`generate` runs on the host, not inside jit, vmap or grad. Use `jaxgen.decode` there.")


def _warn_about_padding(input_ids: np.ndarray, mask: np.ndarray | None, config: Resolved) -> None:
    """The warnings of transformers 5.23 `_prepare_special_tokens` and `generate`, which concern batches only."""
    eos, pad = config.eos_token_id, config.pad_token_id
    if len(input_ids) == 1 or (pad is None and not eos):
        return
    if mask is None and pad is None:
        logger.warning(
            "The attention mask and the pad token id were not set, with a batched input. As a consequence, you may "
            "observe unexpected behavior. Please pass your input's `attention_mask` to obtain reliable results."
        )
    if mask is None and (pad is None or pad in eos):
        logger.warning(
            "The attention mask is not set with a batched input, and cannot be inferred from input because pad token "
            "is same as eos token. As a consequence, you may observe unexpected behavior. Please pass your input's "
            "`attention_mask` to obtain reliable results."
        )
    last = input_ids[:, -1] == _pad_token_id(config) if mask is None else ~mask[:, -1]
    if last.any():
        logger.warning(
            "A decoder-only architecture is being used, but right-padding was detected! For correct generation "
            "results, please set `padding_side='left'` when initializing the tokenizer."
        )


def _infer_attention_mask(input_ids: np.ndarray, config: Resolved) -> np.ndarray:
    """Without a mask, pad ids are padding, unless padding and the end of a text are the same id."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_id:
        return np.ones(input_ids.shape, bool)
    return input_ids != config.pad_token_id


def _pad_token_id(config: Resolved) -> int:
    """`pad_token_id`, the first eos by default; without either, no row finishes early and none is padded."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_id[0] if config.eos_token_id else 0


def _pad_to_buckets(input_ids: np.ndarray, attention_mask: np.ndarray) -> Prompt:
    """The prompt in the upper right corner of its bucket: masked columns before it, finished rows below it."""
    rows, columns = input_ids.shape
    width = ((0, bucket(rows) - rows), (bucket(max(columns, _MIN_PROMPT_BUCKET)) - columns, 0))
    return Prompt(
        input_ids=_leaf(np.pad(input_ids, width), np.int32),
        attention_mask=_leaf(np.pad(attention_mask, width), np.bool_),
        length=_leaf(columns, np.int32),
        rows=_leaf(rows, np.int32),
    )


def _strategy(eos: list[int], pad_token_id: int, max_length: int) -> Greedy:
    places = bucket(max(_MIN_EOS_BUCKET, len(eos)))
    return Greedy(
        eos=EosToken(_leaf([*eos, *[-1] * (places - len(eos))], np.int32)),
        max_length=MaxLength(_leaf(max_length, np.int32)),
        pad_token_id=_leaf(pad_token_id, np.int32),
    )


def _leaf(value: Any, dtype: Any) -> Any:
    """A NumPy leaf of a traced pytree: the dispatch moves it to the device, where `jnp` would take one of its own."""
    return np.asarray(value, dtype)


def _check_memory(model: Model, rows: int, slots: int) -> None:
    """Refuses a cache that no allocator could give, before anything is compiled for it."""
    needed = rows * slots * model.cache_bytes_per_token
    available = _memory_bytes()
    if needed > available:
        raise ValueError(
            f"{rows} rows of {slots} tokens need a cache of {needed / 1e9:,.1f} GB, but the device has "
            f"{available / 1e9:,.1f} GB. Lower `max_new_tokens`, the prompt length or the batch."
        )


def _memory_bytes() -> int:
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
