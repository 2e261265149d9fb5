"""Which configuration wins: from keyword arguments, configs and defaults to one frozen, complete value.

Resolution is transformers' own: its `GenerationConfig` merges, validates and warns, in the order of transformers 5.24
`GenerationMixin._prepare_generation_config`. What comes out is checked field by field, so that nothing jaxgen does not
do is accepted without a word.
"""

import copy
import difflib
import logging
import math
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen import lazy

logger = logging.getLogger(__name__)

# Every public field of GenerationConfig is in one of these groups; a test enumerates the installed class.
SUPPORTED = frozenset(
    "max_length max_new_tokens min_length min_new_tokens do_sample num_return_sequences temperature top_k top_p min_p "
    "top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids sequence_bias renormalize_logits forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "guidance_scale watermarking_config output_attentions output_hidden_states output_scores output_logits "
    "return_dict_in_generate pad_token_id bos_token_id eos_token_id num_beams early_stopping length_penalty "
    "num_beam_groups diversity_penalty penalty_alpha max_time stop_strings prefill_chunk_size token_healing".split()
)
# Refused by name unless they hold one of the values that switch them off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_mtp": (None, False),
    # The others of these are other names of "static".
    "cache_implementation": (None, "dynamic", "hybrid", "hybrid_chunked", "sliding_window", "static"),
    "is_assistant": (None, False),
    "assistant_early_exit": (None,),
    "prompt_lookup_num_tokens": (None,),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
}
_ASSISTANT = "acts in assisted decoding only, and transformers ignores it elsewhere too"
NO_EFFECT = {
    "compile_config": "is about torch.compile; every call of jaxgen is compiled",
    "disable_compile": "is about torch.compile; every call of jaxgen is compiled",
    "max_cache_len": "sizes a static cache; the cache always has room for the call",
    "cache_config": "is about quantised caches, which `cache_implementation` would have to ask for",
    "continuous_batching_config": "is about `generate_batch`, and transformers' `generate` ignores it too",
    "low_memory": "was about the memory of contrastive search in transformers 4, not about its tokens",
    "use_cache": "every decode uses a cache; False returns none, and attentions and hidden states of the whole text",
    "num_assistant_tokens": _ASSISTANT,
    "num_assistant_tokens_schedule": _ASSISTANT,
    "assistant_confidence_threshold": _ASSISTANT,
    "assistant_lookbehind": _ASSISTANT,
    "target_lookbehind": _ASSISTANT,
    "max_matching_ngram_size": _ASSISTANT,
    "assistant_ensemble_weight": _ASSISTANT,
    "speculation_type": _ASSISTANT,
    "decoder_start_token_id": "concerns encoder-decoder models only",
    "transformers_version": "is bookkeeping",
}


@dataclass(frozen=True)
class Resolved:
    """The configuration of one call, complete but for the prompt.

    Attributes:
        max_length: columns of the output, prompt included; None if nobody set it.
        max_new_tokens: wins over `max_length`; None if nobody set it.
        min_new_tokens: wins over `min_length`; None if nobody set it.
        eos_token_id: in the caller's order, empty for none.
        pad_token_id: None if nobody set it, which transformers' warnings tell from the default (the first eos).
        early_stopping: True, False or "never".
        penalty_alpha: 0 unless contrastive search is asked for.
        max_time: seconds; None for no limit.
        outputs: of "scores", "logits", "attentions", "hidden_states", what to return of every step.
        merged: the merged GenerationConfig, for the fields that only `processor_list` reads.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    do_sample: bool
    num_return_sequences: int
    num_beams: int
    early_stopping: bool | str
    length_penalty: float
    num_beam_groups: int
    diversity_penalty: float
    penalty_alpha: float
    max_time: float | None
    stop_strings: tuple[str, ...]
    use_cache: bool
    prefill_chunk_size: int | None
    return_dict_in_generate: bool
    outputs: tuple[str, ...]
    merged: Any

    @property
    def candidates_per_beam(self) -> int:
        """Enough for every beam to go on though the likeliest tokens end it; sampling leaves as many tokens."""
        return max(2, 1 + len(self.eos_token_id))

    def length_for(self, prompt_length: int, max_position_embeddings: int) -> int:
        """The `max_length` of a prompt: 20 new tokens unless the caller or the checkpoint says otherwise.

        Raises:
            ValueError: if the prompt leaves no room for a token.
        """
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        max_length = self.max_length
        if max_length is None:
            max_length = min(prompt_length + _DEFAULT_NEW_TOKENS, max_position_embeddings)
            warnings.warn(
                f"Using the model-agnostic default `max_length` (={max_length}) to control the generation length. We "
                "recommend setting `max_new_tokens` to control the maximum length of the generation.",
                UserWarning,
                stacklevel=5,  # length_for, lower_for_any_device, lower, generate, the caller
            )
        if prompt_length >= max_length:
            raise ValueError(
                f"Input length of input_ids is {prompt_length}, but `max_length` is set to {max_length}. This can lead "
                "to unexpected behavior. You should consider increasing `max_length` or, better yet, setting "
                "`max_new_tokens`."
            )
        return max_length

    def min_length_for(self, prompt_length: int, max_length: int) -> int:
        """The `min_length` of a prompt, with transformers' warnings if `max_length` comes first."""
        min_length = self.min_length
        suffix = (
            " Generation will stop at the defined maximum length. You should decrease the minimum length and/or "
            "increase the maximum length."
        )
        if self.min_new_tokens is not None:
            min_length = prompt_length + self.min_new_tokens
        if min_length > max_length:
            warnings.warn(
                f"Unfeasible length constraints: `min_length` ({min_length}) is larger than the maximum possible "
                f"length ({max_length}).{suffix}",
                UserWarning,
                stacklevel=7,
            )
        return min_length


_DEFAULT_NEW_TOKENS = 20


def resolve(
    model_config: Any, generation_config: Any | None, kwargs: Mapping[str, Any]
) -> tuple[Resolved, dict[str, Any]]:
    """Merges the levels of configuration: keywords, then the call's config, then the model's, then the defaults.

    An explicit None among the keywords switches a field off; a None in a config leaves it to the next level.

    Args:
        model_config: the model's `transformers.GenerationConfig`.
        generation_config: the call's, if any.
        kwargs: the call's keywords.

    Returns:
        The value, and the keywords that are no generation fields.

    Raises:
        ValueError: transformers' own errors, or naming a field that jaxgen does not support.
    """
    config_class = lazy.transformers().GenerationConfig
    if generation_config is not None and not isinstance(generation_config, config_class):
        raise ValueError(
            f"`generation_config` must be a transformers.GenerationConfig, but is {type(generation_config).__name__}. "
            "Build one, or pass its fields as keyword arguments."
        )
    levels = (kwargs.get("max_length"), getattr(generation_config, "max_length", None), model_config.max_length)
    has_default_max_length = all(level is None for level in levels)
    min_levels = (kwargs.get("min_length"), getattr(generation_config, "min_length", None), model_config.min_length)
    if isinstance(watermark := kwargs.get("watermarking_config"), dict):
        try:
            watermark = lazy.generation_configs().WatermarkingConfig.from_dict(watermark)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`watermarking_config`={watermark!r} makes no WatermarkingConfig: {error}.") from error
        kwargs = {**kwargs, "watermarking_config": watermark}
    merged = copy.deepcopy(generation_config) or config_class()
    merged.update(**model_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    merged.update(**merged._get_default_generation_params(), defaults_only=True)
    fields = set(vars(merged))
    # transformers' check does not know that contrastive search reads `top_k`.
    unchecked = {"top_k"} & set(kwargs) if kwargs.get("penalty_alpha", merged.penalty_alpha) else set()
    checked = {name: value for name, value in kwargs.items() if name not in unchecked}
    try:
        others = merged.update(**checked)
    except (TypeError, AttributeError) as error:  # transformers compares before it asks what it is given
        given = {name: value for name, value in checked.items() if name in fields}
        wrong = {name: value for name, value in given.items() if not _has_a_type(config_class, name, value)} or given
        shown = ", ".join(f"`{name}`={value!r}" for name, value in wrong.items())
        raise ValueError(f"{shown} has the wrong type: {error}.") from error
    for name in unchecked:
        setattr(merged, name, kwargs[name])
    if generation_config is not None and (given := sorted(set(kwargs) - set(others))):
        warn_once(
            f"Passing `generation_config` together with generation-related arguments=({given}) is deprecated and will "
            "be removed in future versions. Please pass either a `generation_config` object OR all generation "
            "parameters explicitly, but not both."
        )
    given_here = {
        *kwargs,
        *(name for name, value in vars(generation_config or config_class()).items() if value is not None),
    }
    _leave_out_what_is_not_heeded(merged, given_here)
    _refuse_unsupported(merged)
    _refuse_unknown(others, fields)
    resolved = _freeze(merged, has_default_max_length)
    if resolved.min_new_tokens is not None and any(level is not None for level in min_levels):
        logger.warning(
            "Both `min_new_tokens` (=%s) and `min_length`(=%s) seem to have been set. `min_new_tokens` will take "
            "precedence. Please refer to the documentation for more information. "
            "(https://huggingface.co/docs/transformers/main/en/main_classes/text_generation)",
            resolved.min_new_tokens,
            resolved.min_length,
        )
    return resolved, others


def _has_a_type(config_class: Any, name: str, value: Any) -> bool:
    """Whether transformers can look at the value of a field, if only to refuse it."""
    try:
        config_class().update(**{name: value})
    except (TypeError, AttributeError):
        return False
    except ValueError:
        pass
    return True


def _leave_out_what_is_not_heeded(merged: Any, given_here: set[str]) -> None:
    """Switches off fields of the model's own config that transformers 5.23 does not heed beside the others."""
    beams, groups = merged.num_beams or 1, merged.num_beam_groups or 1
    groups = groups if beams != 1 else 1
    contrastive = bool(merged.penalty_alpha) and merged.do_sample is not True and beams == 1
    contrastive = contrastive and (_integer("top_k", merged.top_k) or 0) > 1
    for name, neutral, heeded in (
        ("num_beam_groups", 1, groups != 1),
        ("diversity_penalty", 0.0, groups != 1),
        ("penalty_alpha", None, contrastive),
        ("cache_implementation", None, merged.cache_implementation != "paged"),
    ):
        value = getattr(merged, name)
        if name in given_here or heeded or value in (None, neutral):
            continue
        setattr(merged, name, neutral)
        if value:
            warn_once(
                f"The model's generation config has `{name}`={value!r}, which changes nothing beside the other fields "
                "of this call, as in transformers."
            )


def _refuse_unsupported(merged: Any) -> None:
    """Refuses fields that jaxgen lacks; names that are no fields are read by nobody, and said once."""
    unread = [name for name, value in vars(merged).items() if not _is_known(name) and value is not None]
    if unread:
        warn_once(
            f"The generation config has {unread}, which are no fields of transformers' GenerationConfig. Neither "
            "transformers nor jaxgen reads them."
        )
    for name, value in vars(merged).items():
        if name not in REFUSED:
            continue
        if not any(value is off or (value == off and type(value) is not bool) for off in REFUSED[name]):
            raise ValueError(f"`{name}`={value!r} is not supported. Pass `{name}={REFUSED[name][-1]!r}`.")


def _is_known(name: str) -> bool:
    return name.startswith("_") or name in SUPPORTED or name in NO_EFFECT or name in REFUSED


def _refuse_unknown(others: Mapping[str, Any], fields: set[str]) -> None:
    unknown = [name for name, value in others.items() if value is not None and name not in MODEL_INPUTS]
    if not unknown:
        return
    if renamed := [name for name in unknown if name in _NAMES_OF_KEY]:
        raise ValueError(
            f"`{renamed[0]}` is not an argument of `generate`. Pass `key=`, an int or a `jax.random` key: the same key "
            "gives the same samples."
        )
    close = {name: difflib.get_close_matches(name, fields | MODEL_INPUTS, n=1, cutoff=0.8) for name in unknown}
    hints = "".join(f" Did you mean `{match[0]}` instead of `{name}`?" for name, match in close.items() if match)
    raise ValueError(
        f"The following `model_kwargs` are not used by the model: {unknown} (note: typos in the generate arguments "
        f"will also show up in this list){hints}"
    )


_NAMES_OF_KEY = frozenset("prng_key rng rng_key rngs seed generator random_state".split())
MODEL_INPUTS = frozenset(
    "input_ids attention_mask position_ids cache past_key_values inputs_embeds logits_to_keep".split()
)


_FLAGS = (
    "do_sample use_cache return_dict_in_generate output_scores output_logits output_attentions output_hidden_states "
    "renormalize_logits remove_invalid_values token_healing".split()
)


def _freeze(merged: Any, has_default_max_length: bool) -> Resolved:
    for name in (*_FLAGS, "early_stopping"):
        if type(getattr(merged, name)) is int and not getattr(merged, name):  # 0, as in some files
            setattr(merged, name, False)
    for name in _FLAGS:
        if not isinstance(getattr(merged, name), (bool, np.bool_, type(None))):
            raise ValueError(f"`{name}`={getattr(merged, name)!r} must be True or False.")
    if not isinstance(merged.early_stopping, (bool, np.bool_, type(None))) and merged.early_stopping != "never":
        raise ValueError(f"`early_stopping` must be a boolean or 'never', but is {merged.early_stopping!r}.")
    max_new_tokens = _integer("max_new_tokens", merged.max_new_tokens)
    max_length = _integer("max_length", merged.max_length)
    if max_new_tokens is not None and not has_default_max_length and max_length is not None:
        logger.warning(
            "Both `max_new_tokens` (=%s) and `max_length`(=%s) seem to have been set. `max_new_tokens` will take "
            "precedence. Please refer to the documentation for more information. "
            "(https://huggingface.co/docs/transformers/main/en/main_classes/text_generation)",
            max_new_tokens,
            max_length,
        )
    outputs = ("scores", "logits", "attentions", "hidden_states")
    outputs = tuple(name for name in outputs if merged.return_dict_in_generate and getattr(merged, f"output_{name}"))
    use_cache = merged.use_cache is None or bool(merged.use_cache)
    eos = _token_ids("eos_token_id", merged.eos_token_id)
    pad = _token_ids("pad_token_id", merged.pad_token_id)
    bos = _token_ids("bos_token_id", merged.bos_token_id)
    if any(token < 0 for token in eos):
        logger.warning(
            "`eos_token_id` should consist of positive integers, but is %s. Your generation will not stop until the "
            "maximum length is reached. Depending on other flags, it may even crash.",
            list(eos),
        )
    return Resolved(
        max_length=None if has_default_max_length else max_length,
        max_new_tokens=max_new_tokens,
        min_length=_integer("min_length", merged.min_length) or 0,
        min_new_tokens=_integer("min_new_tokens", merged.min_new_tokens),
        bos_token_id=bos[0] if bos else None,
        eos_token_id=eos,
        pad_token_id=pad[0] if pad else None,
        do_sample=bool(merged.do_sample),
        num_return_sequences=_count("num_return_sequences", merged.num_return_sequences),
        num_beams=_count("num_beams", merged.num_beams),
        early_stopping="never" if merged.early_stopping == "never" else bool(merged.early_stopping),
        length_penalty=_number("length_penalty", merged.length_penalty, 1.0),
        num_beam_groups=_beam_groups(merged),
        diversity_penalty=_number("diversity_penalty", merged.diversity_penalty, 0.0),
        penalty_alpha=_penalty_alpha(merged),
        max_time=None if merged.max_time in (None, math.inf) else _number("max_time", merged.max_time, 0.0),
        stop_strings=_stop_strings(merged.stop_strings),
        use_cache=use_cache,
        prefill_chunk_size=_chunk_size(merged.prefill_chunk_size),
        return_dict_in_generate=bool(merged.return_dict_in_generate),
        outputs=outputs,
        merged=merged,
    )


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """An id, several of them, an array of either, or None, as a tuple."""
    if value is None:
        return ()
    listed = value.tolist() if hasattr(value, "tolist") else value
    listed = [listed] if isinstance(listed, int) else listed
    try:
        if any(isinstance(token, bool) for token in listed):
            raise TypeError("True and False are not token ids")
        ids = tuple(operator.index(token) for token in listed)
    except TypeError as error:
        raise ValueError(f"`{name}`={value!r} must be a token id or a list of them: integers.") from error
    if name != "eos_token_id" and (len(ids) != 1 or not -(2**31) <= ids[0] < 2**31):
        raise ValueError(f"`{name}`={value!r} must be one token id, of 32 bits.")
    return ids


def _count(name: str, value: Any) -> int:
    count = _integer(name, value)
    if count is None:
        return 1
    if count < 1:
        raise ValueError(f"`{name}`={count} must be at least 1.")
    return count


def _chunk_size(value: Any) -> int | None:
    size = _integer("prefill_chunk_size", value)
    if size is not None and size < 1:
        raise ValueError(f"`prefill_chunk_size`={size} must be at least 1 column.")
    return size


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}`={value!r} must be a finite number.")
    return float(value)


_LONGEST_STOP_STRING = 1000  # every token of the last so many is looked at, at every step


def _stop_strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(each, str) and each for each in strings):
        raise ValueError(f"`stop_strings`={value!r} must be a string or a list of strings, none of them empty.")
    if max(map(len, strings), default=0) > _LONGEST_STOP_STRING:
        raise ValueError(f"`stop_strings` holds one of over {_LONGEST_STOP_STRING} characters. Pass a part of it.")
    return tuple(strings)


def _beam_groups(merged: Any) -> int:
    """`num_beam_groups`, checked as in transformers 4.41, which had diverse beam search."""
    groups, beams = _count("num_beam_groups", merged.num_beam_groups), _count("num_beams", merged.num_beams)
    penalty = _number("diversity_penalty", merged.diversity_penalty, 0.0)
    if groups == 1:
        if penalty:
            raise ValueError(f"`diversity_penalty`={penalty} acts between groups of beams. Pass `num_beam_groups` too.")
        return 1
    if beams % groups:
        raise ValueError(
            f"`num_beams`={beams} must be a multiple of `num_beam_groups`={groups}: groups are of one size."
        )
    if not penalty > 0:
        raise ValueError(
            f"`diversity_penalty`={penalty} must be above 0, or all {groups} groups of beams are the same."
        )
    if merged.do_sample:
        raise ValueError("`do_sample`=True does not go with `num_beam_groups`: diverse beam search draws nothing.")
    return groups


def _penalty_alpha(merged: Any) -> float:
    alpha = _number("penalty_alpha", merged.penalty_alpha, 0.0)
    if not 0 <= alpha <= 1:
        raise ValueError(f"`penalty_alpha`={alpha} must be from 0 to 1.")
    if not alpha:
        return 0.0
    if merged.do_sample or _count("num_beams", merged.num_beams) > 1:
        raise ValueError(
            f"`penalty_alpha`={alpha} asks for contrastive search, which neither draws nor has beams. Leave out "
            "`do_sample` and `num_beams`, or `penalty_alpha`."
        )
    if (top_k := _integer("top_k", merged.top_k)) is None or top_k < 2:
        raise ValueError(
            f"`penalty_alpha`={alpha} chooses among the `top_k` likeliest tokens, but `top_k`={top_k}. Pass at least 2."
        )
    return alpha


def _integer(name: str, value: Any) -> int | None:
    """An integer of any library, or None."""
    try:
        if isinstance(value, bool):
            raise TypeError("True and False are not counts")
        return None if value is None else operator.index(value)
    except TypeError as error:
        raise ValueError(f"`{name}`={value!r} must be an integer.") from error


_warned: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
