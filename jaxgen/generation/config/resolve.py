"""Merges keyword arguments, configs and defaults into one frozen `DecodeConfig`.

The rules are transformers' own: its `GenerationConfig` merges, validates and warns, in the order of transformers 5.24
`GenerationMixin._prepare_generation_config`. The result is checked field by field, so that no field is accepted and
then ignored without a warning.
"""

import copy
import difflib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxgen import lazy
from jaxgen.generation.config.decode_config import DecodeConfig, freeze
from jaxgen.generation.config.fields import MODEL_INPUTS, NO_EFFECT, REFUSED, SUPPORTED
from jaxgen.generation.modes import MODES
from jaxgen.generation.user_warnings import warn_once

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

logger = logging.getLogger(__name__)


def resolve(
    model_config: "GenerationConfig", generation_config: "GenerationConfig | None", kwargs: Mapping[str, Any]
) -> tuple[DecodeConfig, dict[str, Any]]:
    """Merges keywords, the call's config, the model's config and the defaults; earlier ones take precedence.

    An explicit None among the keywords switches a field off; a None in a config leaves it to the next one.

    Args:
        model_config: the model's `transformers.GenerationConfig`.
        generation_config: the call's, if any.
        kwargs: the call's keywords.

    Returns:
        The configuration, and the keywords that are not generation fields.

    Raises:
        ValueError: transformers' own errors, or naming a field that jaxgen does not support.
    """
    config_class: type[GenerationConfig] = lazy.transformers().GenerationConfig
    if generation_config is not None and not isinstance(generation_config, config_class):
        raise ValueError(
            f"`generation_config` must be a transformers.GenerationConfig, but is {type(generation_config).__name__}. "
            "Build one, or pass its fields as keyword arguments."
        )
    # The default of 20 tokens applies only if no level has a length.
    levels = (kwargs.get("max_length"), getattr(generation_config, "max_length", None), model_config.max_length)
    has_default_max_length = all(level is None for level in levels)
    min_levels = (kwargs.get("min_length"), getattr(generation_config, "min_length", None), model_config.min_length)
    kwargs = _with_watermark(kwargs)
    # `defaults_only` fills in fields that are None: the model's config first, then transformers' defaults.
    merged = copy.deepcopy(generation_config) or config_class()
    merged.update(**model_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    merged.update(**merged._get_default_generation_params(), defaults_only=True)
    fields = set(vars(merged))
    others = _update(merged, kwargs)
    if generation_config is not None and (passed := sorted(set(kwargs) - set(others))):
        warn_once(
            f"Passing `generation_config` together with generation-related arguments=({passed}) is deprecated and will "
            "be removed in future versions. Please pass either a `generation_config` object OR all generation "
            "parameters explicitly, but not both."
        )
    given_here = {
        *kwargs,
        *(name for name, value in vars(generation_config or config_class()).items() if value is not None),
    }
    _switch_off_ignored_fields(merged, given_here)
    _refuse_unsupported(merged)
    _refuse_unknown(others, fields)
    resolved = freeze(merged, has_default_max_length)
    if resolved.min_new_tokens is not None and any(level is not None for level in min_levels):
        logger.warning(
            "Both `min_new_tokens` (=%s) and `min_length`(=%s) seem to have been set. `min_new_tokens` will take "
            "precedence. Please refer to the documentation for more information. "
            "(https://huggingface.co/docs/transformers/main/en/main_classes/text_generation)",
            resolved.min_new_tokens,
            resolved.min_length,
        )
    return resolved, others


def _with_watermark(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keywords, with an object of transformers' class in place of a dict in `watermarking_config`."""
    if not isinstance(watermark := kwargs.get("watermarking_config"), dict):
        return kwargs
    try:
        return {**kwargs, "watermarking_config": lazy.generation_configs().WatermarkingConfig.from_dict(watermark)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"`watermarking_config`={watermark!r} is not a valid WatermarkingConfig: {error}.") from error


def _update(merged: "GenerationConfig", kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Sets and validates the fields among the keywords, as transformers does, and returns the other keywords."""

    def given(name: str) -> object:
        return kwargs.get(name, getattr(merged, name))

    # Set after the others are validated, since transformers 5 would refuse them; the modes check them.
    unchecked = set().union(*(mode.unchecked(given) for mode in MODES)) & set(kwargs)
    checked = {name: value for name, value in kwargs.items() if name not in unchecked}
    try:
        others = merged.update(**checked)
    except (TypeError, AttributeError) as error:  # transformers compares values before it checks their types
        ours = {name: value for name, value in checked.items() if name in vars(merged)}
        wrong = {name: value for name, value in ours.items() if not _has_valid_type(type(merged), name, value)} or ours
        shown = ", ".join(f"`{name}`={value!r}" for name, value in wrong.items())
        raise ValueError(f"{shown} has the wrong type: {error}.") from error
    for name in unchecked:
        setattr(merged, name, kwargs[name])
    return others


def _has_valid_type(config_class: "type[GenerationConfig]", name: str, value: Any) -> bool:
    """Whether transformers can validate a value of this type, even if it then refuses the value."""
    try:
        config_class().update(**{name: value})
    except (TypeError, AttributeError):
        return False
    except ValueError:
        pass
    return True


def _switch_off_ignored_fields(merged: "GenerationConfig", given_here: set[str]) -> None:
    """Switches off fields of the model's config that transformers 5.23 ignores because of other fields."""
    unheeded: dict[str, object] = {"cache_implementation": None} if merged.cache_implementation == "paged" else {}
    for mode in MODES:
        unheeded |= mode.unheeded(merged)
    for name, neutral in unheeded.items():
        value = getattr(merged, name)
        if name in given_here or value in (None, neutral):
            continue
        setattr(merged, name, neutral)
        if value:
            warn_once(
                f"The model's generation config has `{name}`={value!r}, which has no effect with the other fields of "
                "this call, as in transformers."
            )


def _refuse_unsupported(merged: "GenerationConfig") -> None:
    """Refuses fields that jaxgen does not support, and warns once about names that are not fields."""
    unread = [name for name, value in vars(merged).items() if not _is_known(name) and value is not None]
    if unread:
        warn_once(
            f"The generation config has {unread}, which are not fields of transformers' GenerationConfig. Neither "
            "transformers nor jaxgen reads them."
        )
    for name, value in vars(merged).items():
        if name not in REFUSED:
            continue
        if not any(value is off or (value == off and type(value) is not bool) for off in REFUSED[name]):
            raise ValueError(f"`{name}`={value!r} is not supported. Pass `{name}={REFUSED[name][-1]!r}`.")


def _is_known(name: str) -> bool:
    return name.startswith("_") or name in SUPPORTED or name in NO_EFFECT or name in REFUSED


def _refuse_unknown(others: Mapping[str, object], fields: set[str]) -> None:
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
