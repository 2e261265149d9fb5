"""The logits processors of a call, in the order of transformers.

Same as transformers 5.24 `GenerationMixin._get_logits_processor`: the processor of each field, the values that are
refused, and the place of the caller's processors.
"""

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgen import lazy
from jaxgen.base import LogitsProcessor
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.config.validators import is_float, is_integer
from jaxgen.generation.modes import Mode
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.running.host_callbacks import (
    HostFunction,
    HostFunctions,
    HostProcessor,
    for_prefix,
    for_processor,
)
from jaxgen.generation.user_warnings import warn_once
from jaxgen.processors import logits_process
from jaxgen.processors.logits_process import token_mask
from jaxgen.processors.watermarking import GreenlistWatermark, SynthIDWatermark

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from jaxgen.lazy import GenerationConfig


def processor_list(
    mode: Mode,
    inputs: Inputs,
    max_length: int,
    vocab_size: int,
    customs: Sequence[Callable[..., object]],
    prefix_allowed_tokens_fn: "Callable[[int, np.ndarray], ArrayLike] | None",
    host: HostFunctions,
) -> tuple[LogitsProcessor, ...]:
    """The processors of one call, except guidance, which is part of prefill and of the decode loop.

    Args:
        mode: the call's mode, which holds the configuration.
        inputs: the prompts.
        max_length: maximum length in tokens, prompt included.
        vocab_size: V.
        customs: the caller's processors, of any kind that `custom_processor` takes.
        prefix_allowed_tokens_fn: as in transformers.
        host: collects the functions that run on the host.

    Raises:
        ValueError: naming the field, its value and the range.
    """
    prompts, prompt_length = inputs.input_ids.shape
    config, rows = mode.config, prompts * mode.rows_per_processor
    fields = config.merged
    eos = token_mask(config.eos_token_id, vocab_size)
    rows_of_table = {
        "SequenceBiasLogitsProcessor": _sequence_bias(fields, vocab_size),
        "EncoderRepetitionPenaltyLogitsProcessor": _penalty(
            fields, "encoder_repetition_penalty", logits_process.EncoderRepetitionPenalty
        ),
        "RepetitionPenaltyLogitsProcessor": _penalty(fields, "repetition_penalty", logits_process.RepetitionPenalty),
        "NoRepeatNGramLogitsProcessor": _ngram(fields, "no_repeat_ngram_size", logits_process.NoRepeatNGram),
        "EncoderNoRepeatNGramLogitsProcessor": _ngram(
            fields, "encoder_no_repeat_ngram_size", logits_process.EncoderNoRepeatNGram
        ),
        "NoBadWordsLogitsProcessor": _bad_words(fields, config.eos_token_id, vocab_size),
        **_min_lengths(config, eos, prompt_length, max_length),
        "PrefixConstrainedLogitsProcessor": prefix_allowed_tokens_fn
        and _on_host(
            for_prefix(prefix_allowed_tokens_fn, mode.rows_per_processor),
            "prefix_allowed_tokens_fn",
            host,
            rows,
        ),
        "ForcedBOSTokenLogitsProcessor": _forced(fields, "forced_bos_token_id", 1, vocab_size),
        "ForcedEOSTokenLogitsProcessor": _forced(fields, "forced_eos_token_id", max_length - 1, vocab_size),
        "InfNanRemoveLogitsProcessor": logits_process.InfNanRemove() if fields.remove_invalid_values else None,
        "ExponentialDecayLengthPenalty": _exponential_decay(fields, config.eos_token_id, eos, prompt_length),
        **_suppressed(fields, prompt_length, vocab_size),
    }
    processors = _merge(rows_of_table, customs, host, rows)
    if config.do_sample:
        processors += _warpers(fields, vocab_size, mode.min_tokens_to_keep)
    if fields.watermarking_config is not None:
        processors.append(_watermark(fields.watermarking_config, vocab_size))
    if fields.renormalize_logits:
        processors.append(logits_process.LogitNormalization())
    return tuple(processors)


def custom_processor(custom: Callable[..., object], host: HostFunctions, rows: int) -> LogitsProcessor:
    """A LogitsProcessor for a caller's processor: JAX functions are compiled, others run on the host."""
    if isinstance(custom, LogitsProcessor):
        return custom
    if takes_cur_len("logits_processor", custom):
        return logits_process.Custom(as_pytree(custom), type(custom))
    return _on_host(for_processor(custom), "logits_processor", host, rows)


def takes_cur_len(argument: str, function: object) -> bool:
    """Whether a caller's function is a JAX function of (input_ids, scores, cur_len); one for the host lacks `cur_len`.

    Raises:
        ValueError: if it is not a callable of two or three required arguments.
    """
    if not callable(function):
        raise ValueError(f"`{argument}` holds {function!r}, which is not callable. Pass a list of functions.")
    # Classes of transformers take (input_ids, scores, **kwargs).
    if isinstance(function, (lazy.torch_class("LogitsProcessor"), lazy.torch_class("StoppingCriteria"))):
        return False
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [each for each in parameters if each.default is each.empty and each.kind in positional]
    if len(required) not in (2, 3):
        raise ValueError(
            f"`{argument}` holds {function!r} of {len(required)} required arguments. A JAX function takes (input_ids, "
            "scores, cur_len), a NumPy or torch one (input_ids, scores)."
        )
    return len(required) == 3


def as_pytree(function: Callable[..., object]) -> Any:
    """The function itself if it is a pytree, whose numbers are traced. Otherwise a constant of the program."""
    return jax.tree_util.Partial(function) if jax.tree_util.all_leaves([function]) else function


# For the code of functions that are constants of programs, the hashes of the functions in the previous call.
_constants: weakref.WeakKeyDictionary[object, frozenset[int]] = weakref.WeakKeyDictionary()


def warn_about_new_functions(argument: str, functions: Sequence[Callable[..., object]]) -> None:
    """Warns once if a JAX function is another object than in the previous call, because each new one compiles again."""
    constants = [each for each in functions if jax.tree_util.all_leaves([each]) and takes_cur_len(argument, each)]
    calls: dict[object, set[int]] = {}
    for function in constants:
        calls.setdefault(_code(function), set()).add(hash(function))
    for code, hashes in calls.items():
        if hashes - _constants.get(code, frozenset(hashes)):
            name = getattr(code, "co_qualname", getattr(code, "__qualname__", code))
            warn_once(
                f"`{argument}` holds `{name}`, which is another object than in the previous call. Each new one "
                "compiles the call again, and its programs stay in memory. Make it once, and pass numbers that change "
                "as `jax.tree_util.Partial(function, number)`."
            )
        _constants[code] = frozenset(hashes)


def _code(function: Callable[..., object]) -> object:
    """The code of a function, or its class. It is the same for all functions that one line of code creates."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    return getattr(function, "__code__", type(function))


def _on_host(function: HostFunction, argument: str, host: HostFunctions, rows: int) -> HostProcessor:
    number = host.add(function, argument)
    warn_once(
        f"`{argument}` runs as Python on the host: every step waits for it and copies the scores there and back. A "
        "JAX function of (input_ids, scores, cur_len) is compiled into the decode instead."
    )
    return HostProcessor(number, rows)


def warn_about_precedence(kind: str, custom: object) -> None:
    """The warning of transformers 5.24 `_merge_criteria_processor_list`."""
    warn_once(
        f"A custom {kind} of type {type(custom)} has been passed to `.generate()`, but it was also created in "
        f"`.generate()`, given its parameterization. The custom {type(custom)} will take precedence. Please check the "
        f"docstring of {type(custom)} to see related `.generate()` flags."
    )


def _merge(
    table: dict[str, LogitsProcessor | None], customs: Sequence[Callable[..., object]], host: HostFunctions, rows: int
) -> list[LogitsProcessor]:
    """The built-in processors, with custom ones of the same type in their place, then the other custom ones."""
    # The keys are classes of transformers: a custom processor of such a class takes the place of the built-in one.
    by_class = {lazy.torch_class(name): name for name in table}
    # Reversed, so that the first custom processor of a type wins. Others of that type run after the built-in
    # processors.
    replaced = {by_class[type(custom)]: custom for custom in reversed(customs) if type(custom) in by_class}
    merged: list[LogitsProcessor] = []
    used: list[Callable[..., object]] = []
    for name, built_in in table.items():
        if built_in is not None and name in replaced:
            custom = replaced[name]
            warn_about_precedence("logits processor", custom)
            used.append(custom)
            merged.append(custom_processor(custom, host, rows))
        elif built_in is not None:
            merged.append(built_in)
    for custom in customs:
        if not any(custom is each for each in used):
            used.append(custom)
            merged.append(custom_processor(custom, host, rows))
    return merged


def _penalty(
    fields: "GenerationConfig", name: str, processor: Callable[[float | np.floating], LogitsProcessor]
) -> LogitsProcessor | None:
    penalty = getattr(fields, name)
    if penalty is None or penalty == 1.0:
        return None
    if not is_float(penalty) or not penalty > 0:
        raise ValueError(f"`{name}` has to be a strictly positive float, but is {penalty!r}.")
    return processor(penalty)


def _number(fields: "GenerationConfig", name: str) -> float | None:
    value = getattr(fields, name)
    if value is None:
        return None
    if not (is_float(value) or is_integer(value)) or math.isnan(value):
        raise ValueError(f"`{name}` has to be a number, but is {value!r}.")
    return float(value)


def _ngram(
    fields: "GenerationConfig", name: str, processor: Callable[[int], LogitsProcessor]
) -> LogitsProcessor | None:
    size = getattr(fields, name)
    if size is None or (_number(fields, name) or 0) <= 0:
        return None
    if not is_integer(size):
        raise ValueError(f"`{name}` has to be a strictly positive integer, but is {size!r}.")
    return processor(int(size))


def _sequence_bias(fields: "GenerationConfig", vocab_size: int) -> LogitsProcessor | None:
    given = fields.sequence_bias
    if given is None:
        return None
    advice = "Pass {(token, ...): float} or [[[token, ...], float], ...]."
    if not isinstance(given, (dict, list)) or not given:
        raise ValueError(f"`sequence_bias` has to be a non-empty dictionary or list, but is {given!r}. {advice}")
    # Lists are the form of JSON, whose keys cannot be tuples.
    pairs = list(given.items()) if isinstance(given, dict) else given
    for pair in pairs:
        key_type = tuple if isinstance(given, dict) else list
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], key_type) and pair[0]):
            raise ValueError(f"`sequence_bias` holds {pair!r}, which is not a sequence of ids with its bias. {advice}")
        if not isinstance(pair[1], float):
            raise ValueError(f"`sequence_bias` has the bias {pair[1]!r} for {pair[0]}, but it must be a float.")
    biases = {tuple(sequence): bias for sequence, bias in pairs}
    _check_ids("sequence_bias", biases, vocab_size)
    return logits_process.SequenceBias.build(biases, vocab_size)


def _bad_words(fields: "GenerationConfig", eos_token_id: Sequence[int], vocab_size: int) -> LogitsProcessor | None:
    given = fields.bad_words_ids
    if given is None:
        return None
    if not isinstance(given, list) or not given or not all(isinstance(word, list) for word in given):
        raise ValueError(f"`bad_words_ids` has to be a non-empty list of lists of ids, but is {given!r}.")
    # As in transformers, an eos id by itself cannot be a bad word.
    words = [tuple(word) for word in given if word and tuple(word) not in {(token,) for token in eos_token_id}]
    _check_ids("bad_words_ids", words, vocab_size)
    return logits_process.SequenceBias.build(dict.fromkeys(words, -math.inf), vocab_size)


def _check_ids(name: str, sequences: Iterable[Iterable[object]], vocab_size: int) -> None:
    for token in (token for sequence in sequences for token in sequence):
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(f"`{name}` holds {token!r}, but ids of this model are 0 to {vocab_size - 1}.")


def _min_lengths(
    config: DecodeConfig, eos: np.ndarray, prompt_length: int, max_length: int
) -> dict[str, LogitsProcessor | None]:
    """`min_new_tokens` makes both, as in transformers, so that a custom processor of either class replaces one."""
    # Beyond 31 bits every length is too long, so a larger minimum has the same effect.
    min_length = config.min_length_for(prompt_length, max_length)
    min_new_tokens = config.min_new_tokens or 0
    if not config.eos_token_id:
        min_length = min_new_tokens = 0
    return {
        "MinLengthLogitsProcessor": logits_process.MinLength(min(min_length, 2**31 - 1), eos)
        if min_length > 0
        else None,
        "MinNewTokensLengthLogitsProcessor": logits_process.MinLength(
            min(prompt_length + min_new_tokens, 2**31 - 1), eos
        )
        if min_new_tokens > 0
        else None,
    }


def _forced(fields: "GenerationConfig", name: str, length: int, vocab_size: int) -> LogitsProcessor | None:
    # bos is forced at length 1: in transformers the first token only starts a decoder.
    token_ids = _ids(name, getattr(fields, name))
    if token_ids is None:
        return None
    if not token_ids:
        raise ValueError(f"`{name}`={getattr(fields, name)!r} is empty. Leave it out to force no token.")
    _check_ids(name, [token_ids], vocab_size)
    return logits_process.ForceTokensAt(length, token_mask(token_ids, vocab_size))


def _ids(name: str, value: "ArrayLike | None") -> list[int] | None:
    if value is None:
        return None
    ids = np.asarray(value).reshape(-1)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`{name}`={value!r} must be a token id or a list of them: integers.")
    return ids.tolist()


def _suppressed(fields: "GenerationConfig", prompt_length: int, vocab_size: int) -> dict[str, LogitsProcessor | None]:
    always, at_begin = (_ids(name, getattr(fields, name)) for name in ("suppress_tokens", "begin_suppress_tokens"))
    # After a forced first token, the second token is the first that can be suppressed.
    begin = prompt_length + (prompt_length == 1 and fields.forced_bos_token_id is not None)
    return {
        "SuppressTokensLogitsProcessor": None
        if always is None
        else logits_process.SuppressTokens(token_mask(always, vocab_size)),
        "SuppressTokensAtBeginLogitsProcessor": None
        if at_begin is None
        else logits_process.SuppressTokensAtBegin(begin, token_mask(at_begin, vocab_size)),
    }


def _exponential_decay(
    fields: "GenerationConfig", eos_token_id: Sequence[int], eos: np.ndarray, prompt_length: int
) -> LogitsProcessor | None:
    given = fields.exponential_decay_length_penalty
    if given is None:
        return None
    valid = isinstance(given, (tuple, list)) and len(given) == 2 and is_integer(given[0])
    if not valid or not (is_float(given[1]) or is_integer(given[1])):
        raise ValueError(
            f"`exponential_decay_length_penalty` must be (start, factor), an integer and a number, but is {given!r}."
        )
    if not eos_token_id or min(eos_token_id) < 0:
        raise ValueError(
            f"`exponential_decay_length_penalty` raises the score of `eos_token_id`, but that is {[*eos_token_id]}. "
            "Set it to the ids that end a sequence."
        )
    start, factor = int(given[0]), float(given[1])
    return logits_process.ExponentialDecayLengthPenalty(prompt_length + start, factor, eos)


def _warpers(fields: "GenerationConfig", vocab_size: int, min_tokens_to_keep: int) -> list[LogitsProcessor]:
    """The sampling warpers. Temperature, top_k and top_p are always included, so that new values compile nothing."""
    keep = min_tokens_to_keep
    temperature = 1.0 if fields.temperature is None else fields.temperature
    if temperature != 1.0 and (not is_float(temperature) or not temperature > 0):
        hint = " If you're looking for greedy decoding strategies, set `do_sample=False`." if temperature == 0 else ""
        raise ValueError(
            f"`temperature` (={temperature!r}) has to be a strictly positive float, otherwise your next token scores "
            f"will be invalid.{hint}"
        )
    top_k = fields.top_k or vocab_size  # 0 and None keep all tokens
    if not is_integer(top_k) or top_k < 0:
        raise ValueError(f"`top_k` has to be a strictly positive integer, or 0 to switch it off, but is {top_k!r}.")
    top_p = 1.0 if (given := _number(fields, "top_p")) is None else given
    if not top_p >= 0:
        raise ValueError(f"`top_p` has to be a float from 0 to 1, but is {top_p}.")
    chain: list[LogitsProcessor] = [logits_process.Temperature(temperature)]
    if (top_h := _number(fields, "top_h")) is not None:
        if not 0 < top_h <= 1:
            raise ValueError(f"`top_h` must be in the range (0, 1], but is {top_h}.")
        chain.append(logits_process.TopH(top_h))
    chain.append(logits_process.TopK(min(max(top_k, keep), vocab_size)))
    chain.append(logits_process.TopP(min(top_p, 1.0), keep))
    if (min_p := _number(fields, "min_p")) is not None:
        if not 0 <= min_p <= 1:
            raise ValueError(f"`min_p` has to be a float in the [0, 1] interval, but is {min_p}.")
        chain.append(logits_process.MinP(min_p, keep))
    if (typical_p := _number(fields, "typical_p")) is not None and typical_p < 1:
        if not typical_p > 0:
            raise ValueError(f"`typical_p` has to be a float > 0 and < 1, but is {typical_p}.")
        chain.append(logits_process.Typical(typical_p, keep))
    # Outside of (0, 1), transformers leaves out these two without an error.
    if (epsilon := _number(fields, "epsilon_cutoff")) is not None and 0 < epsilon < 1:
        chain.append(logits_process.Epsilon(epsilon, keep))
    if (eta := _number(fields, "eta_cutoff")) is not None and 0 < eta < 1:
        chain.append(logits_process.Eta(eta, keep))
    return chain


def _watermark(config: object, vocab_size: int) -> LogitsProcessor:
    synth_id = isinstance(config, lazy.generation_configs().SynthIDTextWatermarkingConfig)
    return (SynthIDWatermark if synth_id else GreenlistWatermark).from_config(config, vocab_size)
