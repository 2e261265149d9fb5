"""What the rest of the package asks of a model family: `checkpoint` to fill a model, `planning` to size it."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


class Config(Protocol):
    """What is read of the config of any family: a frozen dataclass, in the names of its `config.json`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model_type(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the embedding is the head too."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that `save` writes."""
        ...


@dataclass(frozen=True)
class ForwardPass:
    """The sizes of a forward pass, as each device has it.

    Attributes:
        rows: N.
        columns: T.
        slots: S that the columns attend; more than T in a step on a cache.
        itemsize: bytes of a number that is computed.
        shards: devices on the axis "tensor".
        platform: "tpu", "gpu" or "cpu".
    """

    rows: int
    columns: int
    slots: int
    itemsize: int
    shards: int
    platform: str


@dataclass(frozen=True, eq=False)  # a family is part of a compile key, and no two are the same
class Family:
    """How the models of a `model_type` are built, filled, spread, sized and described.

    Attributes:
        config: config.json (and the names of the generation fields it may hold) -> the family's frozen config.
        unread_keys: the same -> the keys that change nothing, since nobody reads them.
        build: config, `nnx.Rngs`, generation config, mesh -> the model, randomly initialised; see `base.Model`. Its
            `config` is the one given, and its `generation_config` can be set.
        embedding: the path of the parameter [V, D] that embeds tokens, of one tensor. `checkpoint` takes the size of
            the vocabulary from it, and the dtype where config.json names none; `planning` knows that a step reads only
            a few of its rows.
        head: the path of the parameter [V, D] that makes logits, of one tensor, and in `weight_map` unless the config
            ties it to the embedding. `checkpoint` ties it where there is no such tensor, and where there is one in
            spite of the config, compares the two.
        prefix: what the names of tensors begin with in a model with a head, and not in one that was saved without it.
        weight_map: config -> {parameter path: {Hugging Face tensor: rows}}. `checkpoint` loads and saves by it.
        buffers: {how the name of a tensor ends that the config determines: config -> its values}, with None for one
            that nobody looks at. `checkpoint` loads none of them, and warns where one has other values.
        partition: config, mesh -> (parameter path -> how it is spread over the mesh), or a ValueError if it cannot be.
            `planning` suggests meshes without one.
        activation_bytes: config, forward pass -> bytes that it has alive on each device beside weights, cache and
            logits, which `planning` counts itself.
        describe: config -> its sizes in one line, for `jaxgen inspect`.
    """

    config: Callable[..., Config]
    unread_keys: Callable[..., list[str]]
    build: Callable[..., Any]
    embedding: str
    head: str
    prefix: str
    weight_map: Callable[[Any], dict[str, dict[str, int]]]
    buffers: Mapping[str, Callable[[Any], np.ndarray] | None]
    partition: Callable[[Any, Mesh | AbstractMesh], Callable[[str], PartitionSpec]]
    activation_bytes: Callable[[Any, ForwardPass], int]
    describe: Callable[[Any], str]
