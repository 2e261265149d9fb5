"""The registry of model families: `model_type` of a config.json -> how to build and fill that model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxgen.models import llama


@dataclass(frozen=True)
class Family:
    """What `checkpoint` needs to know of a family.

    Attributes:
        config: config.json (and the names of the generation fields it may hold) -> the family's frozen config.
        build: config, `nnx.Rngs`, generation config -> the model, randomly initialised.
        weight_map: config -> {parameter path: {Hugging Face tensor: rows}}.
    """

    config: Callable[..., Any]
    build: Callable[..., Any]
    weight_map: Callable[[Any], dict[str, dict[str, int]]]


FAMILIES = {"llama": Family(llama.LlamaConfig.from_json, llama.Llama, llama.weight_map)}
