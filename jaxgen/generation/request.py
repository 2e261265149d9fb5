"""The arguments of `generate`, as they were passed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`, see there, in one place.

    Attributes:
        keywords: the rest of them: fields of a GenerationConfig, and inputs of the model such as `attention_mask`.
        reserve: see `padded_prompt`; not an argument of `generate`.
    """

    inputs: Any = None
    generation_config: Any = None
    logits_processor: list[Any] = field(default_factory=list)
    stopping_criteria: list[Any] = field(default_factory=list)
    prefix_allowed_tokens_fn: Any = None
    synced_gpus: bool | None = None
    assistant_model: Any = None
    streamer: Any = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    key: Any = None
    output_logprobs: bool = False
    tokenizer: Any = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    reserve: int = 0

    @classmethod
    def of(cls, inputs: Any, generation_config: Any, keywords: Mapping[str, Any]) -> Self:
        """Of keywords in which arguments and fields are mixed, as in `stream` and `prepare`."""
        names = {each.name for each in fields(cls)} - {"keywords", "reserve"}
        own = {name: value for name, value in keywords.items() if name in names}
        own |= {name: listed(name, own.get(name)) for name in ("logits_processor", "stopping_criteria")}
        rest = {name: value for name, value in keywords.items() if name not in names}
        return cls(inputs=inputs, generation_config=generation_config, keywords=rest, **own)


def listed(name: str, given: Any) -> list[Any]:
    """What may be None or any iterable, as a list."""
    if given is None:
        return []
    if not isinstance(given, Iterable):
        raise ValueError(f"`{name}`={given!r} must be a list of callables. Wrap a single one in a list.")
    return list(given)
