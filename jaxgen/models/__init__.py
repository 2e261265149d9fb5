"""The registry of model families: `model_type` of a config.json -> how to build and fill that model.

A family reads the keys of a config.json that transformers reads for it, and no others: see `config_keys`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.models.llama import LLAMA, Dialect, Llama, LlamaConfig, partition, unread_keys, weight_map
from jaxgen.models.mistral import MISTRAL
from jaxgen.models.qwen2 import QWEN2
from jaxgen.models.qwen3 import QWEN3


@dataclass(frozen=True)
class Family:
    """What `checkpoint` needs to know of a family.

    Attributes:
        config: config.json (and the names of the generation fields it may hold) -> the family's frozen config.
        unread_keys: the same -> the keys that change nothing, since nobody reads them.
        build: config, `nnx.Rngs`, generation config, mesh -> the model, randomly initialised.
        weight_map: config -> {parameter path: {Hugging Face tensor: rows}}.
        partition: config, mesh -> (parameter path -> how it is spread over the mesh).
    """

    config: Callable[..., Any]
    unread_keys: Callable[..., list[str]]
    build: Callable[..., Any]
    weight_map: Callable[[Any], dict[str, dict[str, int]]]
    partition: Callable[[Any, Mesh | AbstractMesh], Callable[[str], PartitionSpec]]


def _like_llama(dialect: Dialect) -> Family:
    return Family(
        partial(LlamaConfig.from_json, dialect=dialect),
        partial(unread_keys, dialect=dialect),
        Llama,
        weight_map,
        partition,
    )


FAMILIES = {
    "llama": _like_llama(LLAMA),
    "mistral": _like_llama(MISTRAL),
    "qwen2": _like_llama(QWEN2),
    "qwen3": _like_llama(QWEN3),
}
