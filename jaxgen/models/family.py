"""The interface of a model family: `checkpoint` loads models by it, and `planning` computes their sizes by it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


class Config(Protocol):
    """The config of any family: a frozen dataclass whose fields are named as in `config.json`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model_type(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the embedding is also the head."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The content of the `config.json` that `save` writes."""
        ...


AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class ForwardPass:
    """The sizes of a forward pass on each device.

    Attributes:
        rows: N.
        columns: T.
        slots: S, the slots that the columns attend to; more than T for a step with a cache.
        itemsize: bytes per number of the activations.
        shards: devices on the axis "tensor".
        platform: "tpu", "gpu" or "cpu".
    """

    rows: int
    columns: int
    slots: int
    itemsize: int
    shards: int
    platform: str


@dataclass(frozen=True, eq=False)
class Gguf(Generic[AnyConfig]):
    """How a GGUF file stores a model whose `general.architecture` is the family's `model_type`.

    Attributes:
        config: (metadata of the architecture, its keys without the architecture's name; tensor names of the file;
            {buffer: values}) -> config.json, possibly of another family. Raises ValueError for metadata that would
            change the computation and is not implemented.
        buffers: names of tensors that are not weights; `config` gets their values.
        paired: (config, Hugging Face tensor names) -> {tensor: heads}, for the tensors whose rows llama.cpp stores in
            pairs and Hugging Face in two halves per head.
    """

    config: Callable[[Mapping[str, Any], Collection[str], Mapping[str, np.ndarray]], dict[str, Any]]
    buffers: tuple[str, ...]
    paired: Callable[[AnyConfig, Collection[str]], dict[str, int]]


@dataclass(frozen=True, eq=False)  # a family is part of a compile key, so it compares by identity
class Family(Generic[AnyConfig]):
    """How models of a `model_type` are built, loaded, sharded, planned and described.

    Attributes:
        config: config.json (and the names of the generation fields that it may hold) -> the family's frozen config.
        unread_keys: the same arguments -> the keys that are not read and so have no effect.
        build: config, `nnx.Rngs`, generation config, mesh -> the model, randomly initialised; see `base.Model`. It has
            this `config`, and its `generation_config` can be set.
        embedding: the path of the embedding [V, D], a parameter of one tensor. `checkpoint` takes the vocabulary size
            from it, and the dtype if config.json names none. `planning` counts only a few of its rows per step.
        head: the path of the head [V, D], a parameter of one tensor. It is in `weight_map` unless the config ties it to
            the embedding. If the checkpoint has no such tensor, `checkpoint` ties it. If it has one although the config
            ties it, `checkpoint` compares the two.
        prefix: the prefix of tensor names in a model with a head. Models saved without a head lack it.
        weight_map: config -> {parameter path: {Hugging Face tensor: rows}}, for loading and saving.
        buffers: {end of a tensor name: config -> its values}, for tensors that the config determines; None for tensors
            whose values do not matter. `checkpoint` does not load them, and warns if one has other values.
        partition: config, mesh -> (parameter path -> PartitionSpec), or a ValueError if the mesh does not fit.
            `planning` suggests only meshes that fit.
        cache_shards: config, devices on the axis "tensor" -> the number of them that the cache is sharded over.
        activation_bytes: config, forward pass -> bytes of activations at the peak on each device. Weights, cache and
            logits are not included; `planning` counts them itself.
        describe: config -> its sizes in one line, for `jaxgen inspect`.
        gguf: how its GGUF files are read; None if there are none.
        aliases: {tensor: the tensor that holds the same values}, for tensors that some files have twice.
        head_may_differ: whether a head that differs from the embedding counts although the config ties the two.
        wide: ends of the paths of parameters that are float32 in a model of float16.
        of_source: whether the parameter at a path is read only once, for the source of an encoder-decoder model, and
            not at every step.
        optional: {tensor: the flag of the config that says whether there is one}, for tensors that a file may lack.
    """

    config: Callable[..., AnyConfig]
    unread_keys: Callable[..., list[str]]
    build: Callable[..., Any]
    embedding: str
    head: str
    prefix: str
    weight_map: Callable[[AnyConfig], dict[str, dict[str, int]]]
    buffers: Mapping[str, Callable[[AnyConfig], np.ndarray] | None]
    partition: Callable[[AnyConfig, Mesh | AbstractMesh], Callable[[str], PartitionSpec]]
    activation_bytes: Callable[[AnyConfig, ForwardPass], int]
    describe: Callable[[AnyConfig], str]
    gguf: Gguf[AnyConfig] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    head_may_differ: bool = False
    of_source: Callable[[str], bool] = lambda path: False
    optional: Mapping[str, str] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    cache_shards: Callable[[AnyConfig, int], int] = lambda config, shards: shards

    def dtype_of(self, path: str, dtype: np.dtype) -> np.dtype:
        """The dtype of a parameter in a model of this dtype."""
        return np.dtype(np.float32) if dtype == np.float16 and path.endswith(self.wide) else dtype
