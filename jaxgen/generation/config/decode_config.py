"""The configuration of one call: checked fields with one type each, independent of the prompt."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.generation.config.fields import FLAGS
from jaxgen.generation.config.validators import integer, number, positive, token_id, token_ids
from jaxgen.generation.user_warnings import warn_caller
from jaxgen.quantized_array import BACKENDS

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class DecodeConfig:
    """The parts of a call's configuration that do not depend on the prompt.

    Attributes:
        max_length: maximum length in tokens, prompt included; None if not set.
        max_new_tokens: takes precedence over `max_length`; None if not set.
        min_new_tokens: takes precedence over `min_length`; None if not set.
        eos_token_id: token ids in the caller's order; empty if not set.
        pad_token_id: None if not set: some warnings of transformers depend on that. `fill_token_id` applies the
            default.
        max_time: seconds; None for no limit.
        cache_backend: how the cache is quantised, "int8" or "fp8"; None for the model's dtype.
        outputs: which of "scores", "logits", "attentions", "hidden_states" to return.
        merged: the merged GenerationConfig, for fields that only processors and decoding modes read.
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
    max_time: float | None
    stop_strings: tuple[str, ...]
    use_cache: bool
    prefill_chunk_size: int | None
    cache_backend: str | None
    return_dict_in_generate: bool
    outputs: tuple[str, ...]
    merged: "GenerationConfig"

    @property
    def fill_token_id(self) -> int:
        """`pad_token_id`, by default the first eos. Without either, no row finishes early and none is padded."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def intermediates(self) -> tuple[str, ...]:
        """The intermediates to return: "attentions", "hidden_states", or both."""
        return tuple(name for name in self.outputs if name in ("attentions", "hidden_states"))

    def length_for(self, prompt_length: int, max_position_embeddings: int, ids: str = "input_ids") -> int:
        """The maximum length: `max_new_tokens` after the prompt, else `max_length`, else 20 tokens after the prompt.

        Raises:
            ValueError: if the prompt is already as long as `max_length`.
        """
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        max_length = self.max_length
        if max_length is None:
            max_length = min(prompt_length + _DEFAULT_NEW_TOKENS, max_position_embeddings)
            warn_caller(
                f"Using the model-agnostic default `max_length` (={max_length}) to control the generation length. We "
                "recommend setting `max_new_tokens` to control the maximum length of the generation.",
            )
        if prompt_length >= max_length:
            raise ValueError(
                f"Input length of {ids} is {prompt_length}, but `max_length` is set to {max_length}. This can lead "
                "to unexpected behavior. You should consider increasing `max_length` or, better yet, setting "
                "`max_new_tokens`."
            )
        return max_length

    def min_length_for(self, prompt_length: int, max_length: int) -> int:
        """The `min_length` for a prompt, with the warning of transformers if it is above `max_length`."""
        min_length = self.min_length
        suffix = (
            " Generation will stop at the defined maximum length. You should decrease the minimum length and/or "
            "increase the maximum length."
        )
        if self.min_new_tokens is not None:
            min_length = prompt_length + self.min_new_tokens
        if min_length > max_length:
            warn_caller(
                f"Unfeasible length constraints: `min_length` ({min_length}) is larger than the maximum possible "
                f"length ({max_length}).{suffix}",
            )
        return min_length


def freeze(merged: "GenerationConfig", has_default_max_length: bool) -> DecodeConfig:
    """The configuration of a call from the merged GenerationConfig, in which flags of 0 become False.

    Raises:
        ValueError: naming the field, its value and the range.
    """
    for name in FLAGS:
        if type(getattr(merged, name)) is int and not getattr(merged, name):  # 0, as in some files
            setattr(merged, name, False)
    for name in FLAGS:
        if not isinstance(getattr(merged, name), (bool, np.bool_, type(None))):
            raise ValueError(f"`{name}`={getattr(merged, name)!r} must be True or False.")
    max_new_tokens = integer("max_new_tokens", merged.max_new_tokens)
    max_length = integer("max_length", merged.max_length)
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
    eos = token_ids("eos_token_id", merged.eos_token_id)
    if any(token < 0 for token in eos):
        logger.warning(
            "`eos_token_id` should consist of positive integers, but is %s. Your generation will not stop until the "
            "maximum length is reached. Depending on other flags, it may even crash.",
            list(eos),
        )
    return DecodeConfig(
        max_length=None if has_default_max_length else max_length,
        max_new_tokens=max_new_tokens,
        min_length=integer("min_length", merged.min_length) or 0,
        min_new_tokens=integer("min_new_tokens", merged.min_new_tokens),
        bos_token_id=token_id("bos_token_id", merged.bos_token_id),
        eos_token_id=eos,
        pad_token_id=token_id("pad_token_id", merged.pad_token_id),
        do_sample=bool(merged.do_sample),
        num_return_sequences=positive("num_return_sequences", merged.num_return_sequences) or 1,
        max_time=None if merged.max_time in (None, math.inf) else number("max_time", merged.max_time, 0.0),
        stop_strings=_stop_strings(merged.stop_strings),
        use_cache=use_cache,
        prefill_chunk_size=positive("prefill_chunk_size", merged.prefill_chunk_size),
        cache_backend=_cache_backend(merged, use_cache),
        return_dict_in_generate=bool(merged.return_dict_in_generate),
        outputs=outputs,
        merged=merged,
    )


# These differ in how torch allocates them.
_OTHER_CACHES = (None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window")


def _cache_backend(merged: "GenerationConfig", use_cache: bool) -> str | None:
    if merged.cache_implementation in _OTHER_CACHES:
        return None
    if merged.cache_implementation != "quantized":
        raise ValueError(
            f"`cache_implementation`={merged.cache_implementation!r} is not supported: the cache is on the model's "
            "device. Leave it out, or pass 'quantized' for a smaller cache."
        )
    if not use_cache:
        return None
    options = {} if merged.cache_config is None else merged.cache_config
    if not isinstance(options, Mapping):
        raise ValueError(f"`cache_config`={options!r} must be a dict, such as `{{'backend': 'int8'}}`.")
    backend = options.get("backend", "quanto")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(
            f"`cache_config`={options!r} asks for the backend {backend!r} (transformers' default is 'quanto'), but "
            "jaxgen has 'fp8', which is that of transformers, and 'int8', which is more exact. Pass "
            "`cache_config={'backend': 'int8'}`."
        )
    if others := [name for name, value in options.items() if name != "backend" and value is not None]:
        raise ValueError(f"`cache_config` has {others}, which the backend {backend!r} does not have. Leave them out.")
    return backend


_LONGEST_STOP_STRING = 1000  # every step compares as many of the last tokens as the longest string may have


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(each, str) and each for each in strings):
        raise ValueError(f"`stop_strings`={value!r} must be a string or a list of strings, none of them empty.")
    if max(map(len, strings), default=0) > _LONGEST_STOP_STRING:
        raise ValueError(
            f"`stop_strings` holds a string of more than {_LONGEST_STOP_STRING} characters. Pass a part of it."
        )
    return tuple(strings)
