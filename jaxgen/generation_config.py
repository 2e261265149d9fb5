"""Which configuration wins: from keyword arguments, configs and defaults to one frozen, complete value.

Resolution is transformers' own: its `GenerationConfig` merges, validates and warns, in the order of transformers 5.23
`GenerationMixin._prepare_generation_config`. What comes out is checked field by field, so that nothing jaxgen does not
do is accepted without a word.
"""

import copy
import difflib
import logging
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgen import lazy

logger = logging.getLogger(__name__)

# Fields that change what a greedy decode returns. Each may only hold a value that switches it off.
_NOT_YET = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "max_time": (None,),
    "stop_strings": (None,),
    "use_mtp": (None, False),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic", "static"),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "renormalize_logits": (None, False),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "remove_invalid_values": (None, False),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "token_healing": (None, False),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "is_assistant": (None, False),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "prompt_lookup_num_tokens": (None,),
    "speculation_type": (None,),
    "low_memory": (None, False),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "diversity_penalty": (None, 0.0),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prefill_chunk_size": (None,),
    "max_cache_len": (None,),
    "cache_config": (None,),
    "continuous_batching_config": (None,),
}
# Fields that act in other modes only (sampling, beams, assisted decoding, encoder-decoder models); transformers
# ignores them in greedy decoding too, and warns where a caller sets them.
_OTHER_MODES = frozenset(
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff early_stopping length_penalty "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind "
    "target_lookbehind max_matching_ngram_size decoder_start_token_id".split()
)
# Fields about torch.compile, which has no counterpart here: every call is compiled.
_NO_EFFECT_IN_JAX = frozenset({"compile_config", "disable_compile"})
_SUPPORTED = frozenset(
    "max_length max_new_tokens bos_token_id eos_token_id pad_token_id return_dict_in_generate".split()
)
_BOOKKEEPING = frozenset({"transformers_version"})


@dataclass(frozen=True)
class Resolved:
    """The configuration of one call, complete but for the prompt.

    Attributes:
        max_length: columns of the output, prompt included; None if nobody set it.
        max_new_tokens: wins over `max_length`; None if nobody set it.
        eos_token_id: in the caller's order, empty for none.
        pad_token_id: None if nobody set it, which transformers' warnings tell from the default (the first eos).
    """

    max_length: int | None
    max_new_tokens: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    return_dict_in_generate: bool

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
                stacklevel=4,  # length_for, lower, generate, the caller
            )
        if prompt_length >= max_length:
            raise ValueError(
                f"Input length of input_ids is {prompt_length}, but `max_length` is set to {max_length}. This can lead "
                "to unexpected behavior. You should consider increasing `max_length` or, better yet, setting "
                "`max_new_tokens`."
            )
        return max_length


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
        ValueError: transformers' own errors, or naming a field that greedy decoding in jaxgen does not support.
    """
    config_class = lazy.transformers().GenerationConfig
    if generation_config is not None and not isinstance(generation_config, config_class):
        raise ValueError(
            f"`generation_config` must be a transformers.GenerationConfig, but is {type(generation_config).__name__}. "
            "Build one, or pass its fields as keyword arguments."
        )
    levels = (kwargs.get("max_length"), getattr(generation_config, "max_length", None), model_config.max_length)
    has_default_max_length = all(level is None for level in levels)
    merged = copy.deepcopy(generation_config) or config_class()
    merged.update(**model_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    merged.update(**merged._get_default_generation_params(), defaults_only=True)
    fields = set(vars(merged))
    others = merged.update(**kwargs)
    if generation_config is not None and (given := sorted(set(kwargs) - set(others))):
        _warn_once(
            f"Passing `generation_config` together with generation-related arguments=({given}) is deprecated and will "
            "be removed in future versions. Please pass either a `generation_config` object OR all generation "
            "parameters explicitly, but not both."
        )
    _refuse_unsupported(merged)
    _refuse_unknown(others, fields)
    return _freeze(merged, has_default_max_length), others


def _refuse_unsupported(merged: Any) -> None:
    for name, value in vars(merged).items():
        if name.startswith("_") or name in _SUPPORTED | _OTHER_MODES | _NO_EFFECT_IN_JAX | _BOOKKEEPING:
            continue
        if name not in _NOT_YET:
            raise ValueError(f"`{name}`={value!r} is not a generation field that jaxgen knows. Remove it.")
        if not any(value is off or (value == off and type(value) is not bool) for off in _NOT_YET[name]):
            off = _NOT_YET[name][-1]
            raise ValueError(f"`{name}`={value!r} is not supported yet. Pass `{name}={off!r}`.")


def _refuse_unknown(others: Mapping[str, Any], fields: set[str]) -> None:
    unknown = [name for name, value in others.items() if value is not None and name not in MODEL_INPUTS]
    if not unknown:
        return
    close = {name: difflib.get_close_matches(name, fields | MODEL_INPUTS, n=1, cutoff=0.8) for name in unknown}
    hints = "".join(f" Did you mean `{match[0]}` instead of `{name}`?" for name, match in close.items() if match)
    raise ValueError(
        f"The following `model_kwargs` are not used by the model: {unknown} (note: typos in the generate arguments "
        f"will also show up in this list){hints}"
    )


MODEL_INPUTS = frozenset({"input_ids", "attention_mask"})


def _freeze(merged: Any, has_default_max_length: bool) -> Resolved:
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
        bos_token_id=bos[0] if bos else None,
        eos_token_id=eos,
        pad_token_id=pad[0] if pad else None,
        return_dict_in_generate=merged.return_dict_in_generate is True,
    )


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """An id, several of them, an array of either, or None, as a tuple."""
    if value is None:
        return ()
    listed = value.tolist() if hasattr(value, "tolist") else value
    try:
        ids = tuple(operator.index(token) for token in ([listed] if isinstance(listed, int) else listed))
    except TypeError as error:
        raise ValueError(f"`{name}`={value!r} must be a token id or a list of them: integers.") from error
    if name != "eos_token_id" and (len(ids) != 1 or not -(2**31) <= ids[0] < 2**31):
        raise ValueError(f"`{name}`={value!r} must be one token id, of 32 bits.")
    return ids


def _integer(name: str, value: Any) -> int | None:
    """An integer of any library, or None."""
    try:
        return None if value is None else operator.index(value)
    except TypeError as error:
        raise ValueError(f"`{name}`={value!r} must be an integer.") from error


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
