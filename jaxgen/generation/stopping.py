"""When the texts of a call end: at a length, an eos id, a stop string, or by the caller's criteria."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxgen import lazy
from jaxgen.base import Model
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.processor_list import as_pytree, takes_cur_len, warn_about_precedence
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.running.host_callbacks import HostCriterion, HostFunctions, for_criterion
from jaxgen.generation.user_warnings import warn_once
from jaxgen.processors.stop_strings import StopStrings
from jaxgen.processors.stopping_criteria import CustomCriterion, EosToken, MaxLength

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stopping:
    """How the texts of a call end.

    Attributes:
        config: the call's configuration, without the fields that the caller's transformers criteria replace.
        max_length: `max_length` of the configuration, which some processors depend on.
        length: the length at which all texts end, from the configuration or a criterion.
        eos_token_id: the token ids that end a text.
        criteria: the caller's other criteria.
    """

    config: DecodeConfig
    max_length: int
    length: int
    eos_token_id: tuple[int, ...]
    criteria: list[Callable[..., object]]


def stopping(model: Model, criteria: Sequence[Callable[..., object]], config: DecodeConfig, inputs: Inputs) -> Stopping:
    """How texts end, by the configuration and the criteria. Warns about lengths and ids that do not fit the model.

    Raises:
        ValueError: if the prompt is already as long as `max_length`, or a length is out of range.
    """
    prompt_length = inputs.input_ids.shape[1]
    ids = "input_ids" if inputs.source is None else "decoder_input_ids"
    stop = _split(criteria, config, config.length_for(prompt_length, model.max_position_embeddings, ids))
    if stop.length >= 2**31:
        raise ValueError(
            f"The requested length is {stop.length} tokens; the limit is 2**31 - 1. Lower `max_new_tokens` or "
            "`max_length` (a tokenizer without a limit reports 10**30)."
        )
    # The model counts cached tokens and embeddings too, `length` only the tokens of the text.
    positions = inputs.attention_mask.shape[1]
    total = positions + stop.length - prompt_length
    if model.has_position_table:
        _check_positions(model, inputs, total)
    elif total > model.max_position_embeddings:
        logger.warning(
            "%d tokens are requested, and the model was trained for %d (`max_position_embeddings`): expect poor text "
            "beyond. %s to avoid it.",
            total,
            model.max_position_embeddings,
            "Lower `max_new_tokens`" if positions < model.max_position_embeddings else "Shorten the prompt",
        )
    if max(stop.eos_token_id, default=0) >= model.vocab_size:
        logger.warning(
            "`eos_token_id` holds %d, but ids of this model are 0 to %d: no text will end with it.",
            max(stop.eos_token_id),
            model.vocab_size - 1,
        )
    return stop


def _check_positions(model: Model, inputs: Inputs, total: int) -> None:
    """Raises ValueError for texts and sources that are longer than a table of positions.

    The last token of a text is never read, so it needs no position.
    """
    longest = model.max_position_embeddings
    source = 0 if inputs.source is None or inputs.source.encoded else inputs.source.attention_mask.shape[1]
    if source > longest:
        raise ValueError(
            f"`input_ids` has {source} columns, but the encoder has embeddings for {longest} positions "
            "(`max_position_embeddings`). Truncate the input: `tokenizer(texts, truncation=True)`."
        )
    if total - 1 > longest:
        raise ValueError(
            f"{total} tokens are requested, but the model has embeddings for {longest} positions "
            f"(`max_position_embeddings`). Lower `max_new_tokens` or `max_length` by {total - 1 - longest}."
        )


def _split(criteria: Sequence[Callable[..., object]], config: DecodeConfig, max_length: int) -> Stopping:
    """Splits off transformers criteria, which replace fields of the configuration. Several of one type all apply."""
    given: dict[str, list[Any]] = {
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
    # Of several lengths or times, the shortest applies; of eos ids, all apply.
    length, eos_token_id = max_length, config.eos_token_id
    if lengths := [each.max_length for each in given["MaxLengthCriteria"]]:
        for each in lengths:
            if not isinstance(each, int) or each < 1:
                raise ValueError(f"`stopping_criteria` holds a length of {each!r}, which must be a positive integer.")
        length = min(lengths)
    if eos_lists := [np.asarray(each.eos_token_id).reshape(-1).tolist() for each in given["EosTokenCriteria"]]:
        eos_token_id = tuple(dict.fromkeys(itertools.chain(*eos_lists)))
    if times := [each.max_time for each in given["MaxTimeCriteria"]]:
        config = replace(config, max_time=min(times))
    if given["StopStringCriteria"]:  # these run on the host themselves
        config = replace(config, stop_strings=())
    replacing = [*given["MaxLengthCriteria"], *given["EosTokenCriteria"], *given["MaxTimeCriteria"]]
    remaining = [each for each in criteria if not any(each is other for other in replacing)]
    return Stopping(config, max_length, length, eos_token_id, remaining)


def stopping_criteria(
    model: Model, stop: Stopping, tokenizer: Any, host: HostFunctions, rows: int
) -> tuple[EosToken, MaxLength, tuple[Callable[..., jax.Array], ...]]:
    """The criteria of a strategy: the two that every strategy has, and the others.

    Args:
        model: the call's model.
        stop: how texts end.
        tokenizer: the model's, for stop strings.
        host: takes the functions that run on the host.
        rows: number of rows that a criterion sees.
    """
    strings = _stop_strings(stop.config.stop_strings, tokenizer, model.vocab_size)
    criteria = (*strings, *(_criterion(each, host, rows) for each in stop.criteria))
    return EosToken.build(stop.eos_token_id, model.vocab_size), MaxLength(stop.length), criteria


def _stop_strings(strings: tuple[str, ...], tokenizer: Any, vocab_size: int) -> tuple[StopStrings, ...]:
    if not strings:
        return ()
    if tokenizer is None:
        raise ValueError(
            "There are one or more stop strings, either in the arguments to `generate` or in the model's generation "
            f"config ({[*strings]}), but we could not locate a tokenizer. When generating with stop "
            "strings, you must pass the model's tokenizer to the `tokenizer` argument of `generate`."
        )
    return (StopStrings.build(strings, tokenizer, vocab_size),)


def _criterion(criterion: Callable[..., Any], host: HostFunctions, rows: int) -> Callable[..., jax.Array]:
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
