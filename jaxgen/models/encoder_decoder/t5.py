"""T5 and its relatives, from `config.json` to logits. Same as transformers 5.24 `T5ForConditionalGeneration`.

Flan-T5 and ByT5 are a T5 in all but their weights; mT5 and UMT5 have a `Dialect`. Attention scores are not scaled, and
get a learned bias for the distance between two columns in place of embeddings of positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxgen.base import Intermediates, tensor_shards
from jaxgen.kv_cache import KVCache
from jaxgen.models import config_keys
from jaxgen.models.encoder_decoder.model import (
    CrossAttention,
    EncoderDecoder,
    EncoderDecoderConfig,
    SelfAttention,
    run_layers,
)
from jaxgen.models.layers import ACTIVATIONS, Embed, Linear, RMSNorm, columns_at_once, unfuse
from jaxgen.pytree import pytree


@dataclass(frozen=True)
class Dialect:
    """How a family whose models are a T5 writes its `config.json`. Dialects compare by `model_type`.

    Attributes:
        model_type: the family's name.
        architecture: the class in transformers.
        defaults: the keys that may be left out, and their defaults in transformers 5.24.
        scales: whether some of its models scale the decoder's output before the head; see `T5Config`.
        bias_in_every_layer: whether every layer has a bias for distances, and not only the first, for all layers.
        spellings: other names of the architecture.
    """

    model_type: str
    architecture: str = field(compare=False)
    defaults: Mapping[str, object] = field(compare=False)
    scales: bool = field(default=True, compare=False)
    bias_in_every_layer: bool = field(default=False, compare=False)
    spellings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names that `architectures` in a config.json may have."""
        return self.architecture, *self.spellings, self.architecture.replace("ForConditionalGeneration", "Model")


_COMMON = {
    "d_model": 512,
    "d_kv": 64,
    "num_decoder_layers": None,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
}
T5 = Dialect(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    defaults={
        **_COMMON,
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    spellings=("T5WithLMHeadModel",),
)
_MULTILINGUAL = {
    **_COMMON,
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
MT5 = Dialect("mt5", "MT5ForConditionalGeneration", _MULTILINGUAL, scales=False)
UMT5 = Dialect("umt5", "UMT5ForConditionalGeneration", _MULTILINGUAL, bias_in_every_layer=True)

_POSITIVE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
_TYPES = dict.fromkeys(_POSITIVE, int) | {
    "layer_norm_epsilon": float,
    "initializer_factor": float,
    "feed_forward_proj": str,
    "tie_word_embeddings": bool,
    "scale_decoder_outputs": bool,
}
# Dropout is for training, and the classifier for another architecture.
_NO_EFFECT = ("dropout_rate", "classifier_dropout", "n_positions", "output_past", "is_decoder", "is_gated_act")
_NO_EFFECT += ("dense_act_fn", "is_encoder_decoder", "tokenizer_class", "use_cache")


@dataclass(frozen=True)
class T5Config(EncoderDecoderConfig):
    """The architecture of a checkpoint, in the names of its `config.json`; part of the compile key.

    Attributes:
        feed_forward_proj: an activation, or "gated-" and an activation.
        scale_decoder_outputs: whether the decoder's output is multiplied by d_model ** -0.5 before the head, as in the
            original T5. Files of transformers 4 say so by `tie_word_embeddings`, which is false in later models.
    """

    dialect: Dialect
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    initializer_factor: float
    feed_forward_proj: str
    scale_decoder_outputs: bool
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.d_kv

    @property
    def heads(self) -> tuple[int, int]:
        return self.num_heads, self.num_heads

    @property
    def layers(self) -> tuple[int, int]:
        return self.num_layers, self.num_decoder_layers

    @property
    def units(self) -> tuple[int, int]:
        return self.d_ff, self.d_ff

    @property
    def activation(self) -> str:
        """The name of the activation in `ACTIVATIONS`."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Any], generation_fields: frozenset[str] = frozenset(), dialect: Dialect = T5
    ) -> Self:
        """Reads a `config.json`. Keys that would change the computation and are not implemented are refused.

        Args:
            raw: the parsed file.
            generation_fields: names of generation fields, which old files have in config.json; see `unread_keys`.
            dialect: of the family.

        Raises:
            ValueError: naming the key, its value and the way out.
        """
        given = {key: value for key, value in raw.items() if value is not None}
        values: dict[str, Any] = {**dialect.defaults, **given}
        config_keys.refuse_unhandled(values, dialect.architectures)
        unread_keys(raw, generation_fields, dialect)
        config_keys.check_types(values, _TYPES, _POSITIVE)
        settings = {key: values[key] for key in dialect.defaults}
        settings["num_decoder_layers"] = settings["num_decoder_layers"] or settings["num_layers"]
        unscaled = values.get("tie_word_embeddings", True) is False
        settings["scale_decoder_outputs"] = dialect.scales and values.get("scale_decoder_outputs", not unscaled)
        config = cls(dialect=dialect, **settings)
        if config.activation not in ACTIVATIONS:
            raise ValueError(
                f"`feed_forward_proj`={config.feed_forward_proj!r} in config.json is not supported; it may be one of "
                f'{[*ACTIVATIONS]}, also with "gated-" before it.'
            )
        if config.relative_attention_num_buckets < 4:
            raise ValueError(
                f"`relative_attention_num_buckets`={config.relative_attention_num_buckets} in config.json must be at "
                "least 4."
            )
        # Up to this distance every one has a bucket of its own in the decoder.
        if config.relative_attention_max_distance <= (exact := config.relative_attention_num_buckets // 2):
            raise ValueError(
                f"`relative_attention_max_distance`={config.relative_attention_max_distance} in config.json must be "
                f"more than {exact}, half of `relative_attention_num_buckets`."
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """A `config.json` with the same meaning in transformers 4 and 5."""
        raw = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "dialect"}
        raw |= {"model_type": self.model_type, "architectures": [self.dialect.architecture]}
        raw["tie_word_embeddings"] = self.scale_decoder_outputs if self.dialect.scales else self.tie_word_embeddings
        return {**raw, "is_encoder_decoder": True}


def unread_keys(
    raw: Mapping[str, object], generation_fields: frozenset[str] = frozenset(), dialect: Dialect = T5
) -> list[str]:
    """The keys of a `config.json` that have no effect, since they are not read; see `config_keys`.

    Args:
        raw, generation_fields, dialect: as in `T5Config.from_json`.

    Raises:
        ValueError: naming a key that would change the computation and is not implemented.
    """
    read = {*dialect.defaults, "tie_word_embeddings", "scale_decoder_outputs", *_NO_EFFECT, *generation_fields}
    return config_keys.unread_keys(raw, read)


def distance_buckets(config: T5Config, bidirectional: bool) -> np.ndarray:
    """int32 [2 * max_distance + 1]: the bucket of each distance from -max_distance on. Farther ones are in the last.

    A distance is the attended column minus the attending one. Half of the buckets hold one distance each, and the
    others hold ranges that grow with the distance. As `T5Attention._relative_position_bucket`, in the same order of
    operations: float32 decides on which side of a border a distance is.
    """
    farthest, count = config.relative_attention_max_distance, config.relative_attention_num_buckets
    distances = np.arange(-farthest, farthest + 1)
    first = np.zeros_like(distances)
    if bidirectional:
        count //= 2
        first = np.where(distances > 0, count, 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = count // 2
    with np.errstate(divide="ignore"):  # log(0), of a distance that has a bucket of its own
        ratio = np.log(distances.astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(farthest / exact)) * np.float32(count - exact)
    ranged = exact + np.where(distances < exact, 0, ratio).astype(np.int64)
    return (first + np.where(distances < exact, distances, np.minimum(ranged, count - 1))).astype(np.int32)


@pytree
@dataclass(frozen=True)
class DistanceBias:
    """The bias of the attention scores for the distance between two columns; a `layers.Bias`.

    Attributes:
        by_distance: float32 [Q, 2 * max_distance + 1], from -max_distance on.
        attending: int32 [N, T], or [1, T] for all rows. Columns of the text.
        attended: int32 [N, S], or [1, S].
    """

    by_distance: jax.Array
    attending: jax.Array
    attended: jax.Array

    def __call__(self, start: jax.Array | int, count: int) -> jax.Array:
        attending = jax.lax.dynamic_slice_in_dim(self.attending, start, count, axis=1)
        farthest = self.by_distance.shape[1] // 2
        distances = jnp.clip(self.attended[:, None] - attending[:, :, None], -farthest, farthest)
        # [Q, N, count, S] -> [N, K, G, count, S], with one query head for each key-value head.
        return jnp.moveaxis(self.by_distance[:, distances + farthest], 0, 1)[:, :, None]


class MLP(nnx.Module):
    """Same as transformers 5.24 `T5DenseActDense`, or `T5DenseGatedActDense` with its first two matrices fused."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, shards: int):
        self.config = config
        self.shards = shards
        factor, units = config.initializer_factor, config.d_ff * (2 if config.gated else 1)
        self.wi = Linear(config.d_model, units, bias=False, std=factor * config.d_model**-0.5, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, bias=False, std=factor * config.d_ff**-0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, T, D], in float32 in a model of float16, whose `wo` is float32."""
        units = self.wi(x)
        linear = None
        if self.config.gated:
            units, linear = unfuse(units, (self.config.d_ff,) * 2, self.shards, axis=2)
        # Activations in float32, rounded once, as in torch.
        units = ACTIVATIONS[self.config.activation](units.astype(jnp.float32)).astype(x.dtype)
        units = units if linear is None else units * linear
        return self.wo(units.astype(self.wo.weight[...].dtype))


class Block(nnx.Module):
    """Same as transformers 5.24 `T5Block`: of the encoder, or with cross-attention of the decoder."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, shards: int, decoder: bool, biased: bool):
        width, factor = config.d_model, config.initializer_factor
        std = factor * width**-0.5
        options = {"heads": config.num_heads, "head_dim": config.d_kv, "width": width, "bias": False, "scale": 1.0}
        options |= {"std": std, "rngs": rngs, "shards": shards}
        norms = [RMSNorm(width, eps=config.layer_norm_epsilon) for _ in range(3)]
        self.self_attention_norm = norms[0]
        self.self_attention = SelfAttention(**options)
        buckets = config.relative_attention_num_buckets
        self.relative_attention_bias = Embed(buckets, config.num_heads, std=std, rngs=rngs) if biased else None
        self.cross_attention_norm = norms[1] if decoder else None
        self.cross_attention = CrossAttention(**options) if decoder else None
        self.mlp_norm = norms[2]
        self.mlp = MLP(config, rngs, shards)

    def __call__(
        self, x: jax.Array, cache: KVCache | None, mask: jax.Array, bias: DistanceBias | jax.Array
    ) -> tuple[jax.Array, KVCache | None, list[Callable[[], jax.Array]]]:
        """[N, T, D] -> [N, T, D], the cache, and functions that compute the weights of self- and cross-attention.

        Args:
            x: [N, T, D].
            cache: of this layer only, with its memory; None in the encoder.
            mask: bool [N, T, S]; of the encoder [N, T, T].
            bias: float32 [N, K, G, T, S], or a function that gives it by columns.
        """
        by_columns = bias if isinstance(bias, DistanceBias) else lambda start, count: bias
        attended, cache, weights = self.self_attention(self.self_attention_norm(x), mask, by_columns, cache)
        x, all_weights = _clamped(_added(x, attended)), [weights]
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert cache is not None and cache.memory is not None, "a decoder needs a source"
            attended, weights = self.cross_attention(self.cross_attention_norm(x), cache.memory)
            x, all_weights = _clamped(_added(x, attended)), [*all_weights, weights]
        return _clamped(_added(x, self.mlp(self.mlp_norm(x)))), cache, all_weights


def _added(x: jax.Array, change: jax.Array) -> jax.Array:
    """The residual stream after a layer; in a model of float16, as in transformers, float32 after the first MLP."""
    dtype = jnp.promote_types(x.dtype, change.dtype)
    return x.astype(dtype) + change.astype(dtype)


def _clamped(x: jax.Array) -> jax.Array:
    """In float16 without infinities, as in transformers; other dtypes unchanged."""
    if x.dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(x.dtype).max)
    limit = jnp.where(jnp.isinf(x).any(), largest - 1000, largest).astype(x.dtype)
    return jnp.clip(x, -limit, limit)


class Stack(nnx.Module):
    """Same as transformers 5.24 `T5Stack`, without the embedding."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, shards: int, decoder: bool):
        every = config.dialect.bias_in_every_layer
        self.config = config
        self.decoder = decoder
        self.block = nnx.List(
            [
                Block(config, rngs, shards, decoder, biased=every or not number)
                for number in range(config.layers[decoder])
            ]
        )
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        columns: tuple[jax.Array, jax.Array],
        cache: KVCache | None,
        intermediates: tuple[str, ...],
    ) -> tuple[jax.Array, KVCache | None, Intermediates]:
        """[N, T, D] after the final norm, the cache with these columns, and the intermediates asked for.

        Args:
            x: [N, T, D], embeddings.
            mask: bool [N, T, S]; of the encoder [N, T, T].
            columns: int32 [N, T] and [N, S], or [1, ...], the attending and the attended columns of the text.
            cache: after `extend`, with the memory; None in the encoder.
            intermediates: of "hidden_states", "attentions", "cross_attentions".
        """
        biases = self._biases(columns)
        layers = ((block, (mask, bias)) for block, bias in zip(self.block, biases, strict=True))
        return run_layers(layers, x, cache, self.final_layer_norm, intermediates)

    def _biases(self, columns: tuple[jax.Array, jax.Array]) -> list[DistanceBias | jax.Array]:
        """The `bias` of each block: the last one that it or a block before it has."""
        buckets = jnp.asarray(distance_buckets(self.config, bidirectional=not self.decoder))
        count, biases = columns[0].shape[1], []
        for block in self.block:
            if block.relative_attention_bias is None:
                biases.append(biases[-1])
                continue
            # [buckets, Q] -> [Q, distances]
            bias = DistanceBias(block.relative_attention_bias(buckets).T.astype(jnp.float32), *columns)
            # Computed once for all blocks, unless attention asks for a part at a time.
            biases.append(bias(0, count) if columns_at_once(count) == count else bias)
        return biases


class T5Model(EncoderDecoder):
    """A T5: a pytree of weights in one dtype.

    On a mesh, heads, MLP units and, if divisible, vocabulary entries are sharded over the axis "tensor", rows over
    "data".
    """

    config: T5Config
    windowed = True  # its caches keep the columns of the text, for distances

    def __init__(self, config: T5Config, rngs: nnx.Rngs, generation_config: object = None, mesh: Mesh | None = None):
        super().__init__(config, generation_config, mesh)
        shards, std = tensor_shards(mesh), config.initializer_factor
        self.shared = Embed(config.vocab_size, config.d_model, std=std, rngs=rngs)
        self.encoder = Stack(config, rngs, shards, decoder=False)
        self.decoder = Stack(config, rngs, shards, decoder=True)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.d_model, config.vocab_size, bias=False, std=std, rngs=rngs)

    @property
    def max_position_embeddings(self) -> int:
        return 2**31 - 1  # distances have no limit

    @property
    def dtype(self) -> jnp.dtype:
        return self.shared.weight[...].dtype

    def encode_layers(
        self, x: jax.Array, input_ids: jax.Array | None, attention_mask: jax.Array, intermediates: tuple[str, ...]
    ) -> tuple[jax.Array, Intermediates]:
        del input_ids
        columns = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        mask = jnp.broadcast_to(attention_mask[:, None], (*x.shape[:2], x.shape[1]))
        hidden, _, computed = self.encoder(x, mask, (columns, columns), None, intermediates)
        return hidden, computed

    def cross_layers(self) -> list[CrossAttention]:
        return [block.cross_attention for block in self.decoder.block if block.cross_attention is not None]

    def decode_layers(
        self,
        x: jax.Array,
        input_ids: jax.Array | None,
        positions: jax.Array,
        mask: jax.Array,
        cache: KVCache,
        intermediates: tuple[str, ...],
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        del input_ids, positions  # distances take the place of positions
        hidden, extended, computed = self.decoder(x, mask, cache.text_columns(x.shape[1]), cache, intermediates)
        assert extended is not None
        return hidden, extended, computed

    def embed(self, input_ids: jax.Array) -> jax.Array:
        return self.shared(input_ids)

    def logits(self, hidden: jax.Array) -> jax.Array:
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        logits = self.shared.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        return logits.astype(jnp.float32)
