"""The arguments of `generate` as they were passed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.typing import ArrayLike

    from jaxgen.generation.running.streaming import Streamer
    from jaxgen.lazy import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """The arguments of `generate` in one object.

    Attributes:
        keywords: the other keyword arguments: generation fields, and inputs of the model such as `attention_mask`.
        reserve: see `padded_prompt`; not an argument of `generate`.
        entropy: the key if there is none; random by default. Not an argument of `generate` either.
    """

    inputs: "ArrayLike | None" = None
    generation_config: "GenerationConfig | None" = None
    logits_processor: list[Callable[..., object]] = field(default_factory=list)
    stopping_criteria: list[Callable[..., object]] = field(default_factory=list)
    prefix_allowed_tokens_fn: "Callable[[int, ndarray], ArrayLike] | None" = None
    synced_gpus: bool | None = None
    assistant_model: object = None
    streamer: "Streamer | None" = None
    negative_prompt_ids: "ArrayLike | None" = None
    negative_prompt_attention_mask: "ArrayLike | None" = None
    key: "ArrayLike | None" = None
    output_logprobs: bool = False
    tokenizer: "PreTrainedTokenizerBase | None" = None
    assistant_tokenizer: "PreTrainedTokenizerBase | None" = None
    keywords: Mapping[str, object] = field(default_factory=dict)
    reserve: int = 0
    entropy: int | None = None

    @classmethod
    def of(
        cls, inputs: "ArrayLike | None", generation_config: "GenerationConfig | None", keywords: Mapping[str, object]
    ) -> Self:
        """From keywords that mix arguments and generation fields, as `stream` and `prepare` take them."""
        names = {each.name for each in fields(cls)} - {"keywords", "reserve"}
        arguments: dict[str, Any] = {name: value for name, value in keywords.items() if name in names}
        arguments |= {name: listed(name, arguments.get(name)) for name in ("logits_processor", "stopping_criteria")}
        rest = {name: value for name, value in keywords.items() if name not in names}
        return cls(inputs=inputs, generation_config=generation_config, keywords=rest, **arguments)


def listed(name: str, given: Iterable[Callable[..., object]] | None) -> list[Callable[..., object]]:
    """The callables in a new list, empty for None."""
    if given is None:
        return []
    if not isinstance(given, Iterable):
        raise ValueError(f"`{name}`={given!r} must be a list of callables. Wrap a single one in a list.")
    return list(given)
