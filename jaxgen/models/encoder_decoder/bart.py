"""BART and its relatives, from `config.json` to logits. Same as transformers 5.24 `BartForConditionalGeneration`.

mBART, Pegasus, Marian and M2M100 (which NLLB is too) are a BART with other positions and norms; each has a `Dialect`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from jaxgen.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear

# Where the embedding of a position comes from: a table in the checkpoint, sines and cosines of a column, or of a token
# counted without padding.
LEARNED, SINUSOIDAL, SINUSOIDAL_OF_TOKENS = "learned", "sinusoidal", "sinusoidal of tokens"

_LEARNED_OFFSET = 2  # the first two rows of a learned table belong to no position


@dataclass(frozen=True)
class Dialect:
    """How a family whose models are a BART is built and writes its `config.json`. Dialects compare by `model_type`.

    Attributes:
        model_type: the family's name.
        architecture: the class in transformers.
        defaults: the keys that may be left out, and their defaults in transformers 5.24.
        positions: `LEARNED`, `SINUSOIDAL` or `SINUSOIDAL_OF_TOKENS`.
        norm_first: whether norms come before attention and MLP, and once more after the last layer; else after each.
        embedding_norm: whether embeddings are normalised.
        logits_bias: whether files may hold a bias of the logits.
        clamps: whether float16 is clamped in the encoder even where all numbers are finite.
        fixed: keys with one value in all models that jaxgen implements.
        spellings: other names of the architecture.
    """

    model_type: str
    architecture: str = field(compare=False)
    defaults: Mapping[str, object] = field(compare=False)
    positions: str = field(default=LEARNED, compare=False)
    norm_first: bool = field(default=True, compare=False)
    embedding_norm: bool = field(default=False, compare=False)
    logits_bias: bool = field(default=True, compare=False)
    clamps: bool = field(default=True, compare=False)
    fixed: Mapping[str, object] = field(default_factory=dict, compare=False)
    spellings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names that `architectures` in a config.json may have."""
        base = self.architecture.replace("ForConditionalGeneration", "Model").replace("MTModel", "Model")
        return self.architecture, *self.spellings, base


# The keys that every family may leave out, with the defaults that most families have.
COMMON_DEFAULTS = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "init_std": 0.02,
    "scale_embedding": False,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}
BART = Dialect(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    defaults=COMMON_DEFAULTS,
    norm_first=False,
    embedding_norm=True,
    clamps=False,
    # Keys of old files, which transformers 5 does not read; with other values it would build another model too.
    fixed={"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": True},
)

_POSITIVE = (
    "vocab_size",
    "max_position_embeddings",
    "encoder_layers",
    "encoder_ffn_dim",
    "encoder_attention_heads",
    "decoder_layers",
    "decoder_ffn_dim",
    "decoder_attention_heads",
    "d_model",
)
_TYPES = dict.fromkeys((*_POSITIVE, "pad_token_id"), int) | {
    "activation_function": str,
    "init_std": float,
    "scale_embedding": bool,
    "tie_word_embeddings": bool,
}
# About training, other architectures, and what follows from the family.
_NO_EFFECT = frozenset(
    "encoder_layerdrop decoder_layerdrop dropout activation_dropout attention_dropout classifier_dropout "
    "classif_dropout num_hidden_layers is_encoder_decoder is_decoder add_bias_logits gradient_checkpointing "
    "output_past num_labels static_position_embeddings extra_pos_embeddings force_bos_token_to_be_generated "
    "normalize_before add_final_layer_norm normalize_embedding decoder_vocab_size share_encoder_decoder_embeddings "
    "max_length".split()
)


@dataclass(frozen=True)
class BartConfig(EncoderDecoderConfig):
    """The architecture of a checkpoint, in the names of its `config.json`; part of the compile key.

    Attributes:
        init_std: of random weights.
        pad_token_id: the token that `SINUSOIDAL_OF_TOKENS` does not count.
        has_logits_bias: whether the checkpoint has a bias of the logits, which some files leave out.
    """

    dialect: Dialect
    vocab_size: int
    max_position_embeddings: int
    encoder_layers: int
    encoder_ffn_dim: int
    encoder_attention_heads: int
    decoder_layers: int
    decoder_ffn_dim: int
    decoder_attention_heads: int
    activation_function: str
    d_model: int
    init_std: float
    scale_embedding: bool
    pad_token_id: int
    tie_word_embeddings: bool
    has_logits_bias: bool = False

    @property
    def heads(self) -> tuple[int, int]:
        return self.encoder_attention_heads, self.decoder_attention_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.decoder_attention_heads

    @property
    def layers(self) -> tuple[int, int]:
        return self.encoder_layers, self.decoder_layers

    @property
    def units(self) -> tuple[int, int]:
        return self.encoder_ffn_dim, self.decoder_ffn_dim

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Any], generation_fields: frozenset[str] = frozenset(), dialect: Dialect = BART
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
        for key, value in dialect.fixed.items():
            if given.get(key, value) != value:
                raise ValueError(
                    f"`{key}`={given[key]!r} in config.json makes another architecture of a {dialect.model_type}, "
                    "which jaxgen does not implement. Run this model with transformers."
                )
        config = cls(dialect=dialect, **{key: values[key] for key in COMMON_DEFAULTS})
        for heads in config.heads:
            if config.d_model % heads:
                raise ValueError(
                    f"`d_model`={config.d_model} is not a multiple of {heads} attention heads. Correct config.json."
                )
        if config.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"`activation_function`={config.activation_function!r} is not supported; it may be one of "
                f"{[*ACTIVATIONS]}."
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """A `config.json` with the same meaning in transformers 4 and 5."""
        raw = {key: getattr(self, key) for key in COMMON_DEFAULTS}
        raw |= {"model_type": self.model_type, "architectures": [self.dialect.architecture]}
        return {**raw, "is_encoder_decoder": True}


def unread_keys(
    raw: Mapping[str, object], generation_fields: frozenset[str] = frozenset(), dialect: Dialect = BART
) -> list[str]:
    """The keys of a `config.json` that have no effect, since they are not read; see `config_keys`.

    Args:
        raw, generation_fields, dialect: as in `BartConfig.from_json`.

    Raises:
        ValueError: naming a key that would change the computation and is not implemented.
    """
    return config_keys.unread_keys(raw, {*dialect.defaults, *dialect.fixed, *_NO_EFFECT, *generation_fields})


def sinusoids(count: int, width: int) -> np.ndarray:
    """float32 [positions, D]: the sines of all frequencies, then the cosines.

    As `MarianSinusoidalPositionalEmbedding`.
    """
    angles = np.arange(count)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)[None]
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


class Layer(nnx.Module):
    """Same as transformers 5.24 `BartEncoderLayer`, or with cross-attention `BartDecoderLayer`."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs, shards: int, decoder: bool):
        self.config = config
        self.decoder = decoder
        width, heads, units = config.d_model, config.heads[decoder], config.units[decoder]
        options = {"heads": heads, "head_dim": width // heads, "width": width, "bias": True, "scale": None}
        options |= {"std": config.init_std, "rngs": rngs, "shards": shards}
        self.self_attn = SelfAttention(**options)
        self.self_attn_layer_norm = LayerNorm(width)
        self.encoder_attn = CrossAttention(**options) if decoder else None
        self.encoder_attn_layer_norm = LayerNorm(width) if decoder else None
        self.fc1 = Linear(width, units, bias=True, std=config.init_std, rngs=rngs)
        self.fc2 = Linear(units, width, bias=True, std=config.init_std, rngs=rngs)
        self.final_layer_norm = LayerNorm(width)

    def __call__(
        self, x: jax.Array, cache: KVCache | None, mask: jax.Array
    ) -> tuple[jax.Array, KVCache | None, list[Callable[[], jax.Array]]]:
        """[N, T, D] -> [N, T, D], the cache, and functions that compute the weights of self- and cross-attention.

        Args:
            x: [N, T, D].
            cache: of this layer only, with its memory; None in the encoder.
            mask: bool [N, T, S]; of the encoder [N, T, T].
        """
        first = self.config.dialect.norm_first
        normed = self.self_attn_layer_norm(x) if first else x
        attended, cache, weights = self.self_attn(normed, mask, None, cache)
        x, all_weights = x + attended, [weights]
        x = x if first else self.self_attn_layer_norm(x)
        if self.encoder_attn is not None and self.encoder_attn_layer_norm is not None:
            assert cache is not None and cache.memory is not None, "a decoder needs a source"
            normed = self.encoder_attn_layer_norm(x) if first else x
            attended, weights = self.encoder_attn(normed, cache.memory)
            x, all_weights = x + attended, [*all_weights, weights]
            x = x if first else self.encoder_attn_layer_norm(x)
        units = self.fc1(self.final_layer_norm(x) if first else x)
        # Activations in float32, rounded once, as in torch.
        units = ACTIVATIONS[self.config.activation_function](units.astype(jnp.float32)).astype(x.dtype)
        x = x + self.fc2(units)
        x = x if first else self.final_layer_norm(x)
        return x if self.decoder else self._clamped(x), cache, all_weights

    def _clamped(self, x: jax.Array) -> jax.Array:
        """In float16 without infinities, as in transformers; other dtypes unchanged."""
        if x.dtype != jnp.float16:
            return x
        limit = float(jnp.finfo(x.dtype).max) - 1000
        clamped = jnp.clip(x, -limit, limit)
        return clamped if self.config.dialect.clamps else jnp.where(jnp.isfinite(x).all(), x, clamped)


class Stack(nnx.Module):
    """Same as transformers 5.24 `BartEncoder` or `BartDecoder`, without the embedding of tokens."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs, shards: int, decoder: bool):
        self.config = config
        width, entries, dialect = config.d_model, config.max_position_embeddings + _LEARNED_OFFSET, config.dialect
        learned = dialect.positions == LEARNED
        self.embed_positions = Embed(entries, width, std=config.init_std, rngs=rngs) if learned else None
        self.layernorm_embedding = LayerNorm(width) if dialect.embedding_norm else None
        self.layers = nnx.List([Layer(config, rngs, shards, decoder) for _ in range(config.layers[decoder])])
        self.layer_norm = LayerNorm(width) if dialect.norm_first else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KVCache | None,
        intermediates: tuple[str, ...],
    ) -> tuple[jax.Array, KVCache | None, Intermediates]:
        """[N, T, D], the cache with these columns, and the intermediates asked for.

        Args:
            x: [N, T, D], embeddings.
            positions: int32 [N, T], or [1, T]; negative for the embedding of zeros.
            mask: bool [N, T, S]; of the encoder [N, T, T].
            cache: after `extend`, with the memory; None in the encoder.
            intermediates: of "hidden_states", "attentions", "cross_attentions".
        """
        x = x + self._embedded(positions).astype(x.dtype)
        x = x if self.layernorm_embedding is None else self.layernorm_embedding(x)
        layers = ((layer, (mask,)) for layer in self.layers)
        return run_layers(layers, x, cache, self.layer_norm, intermediates)

    def _embedded(self, positions: jax.Array) -> jax.Array:
        """The embeddings of int32 [N, T] positions, [N, T, D]."""
        width = self.config.d_model
        if self.embed_positions is not None:
            return self.embed_positions(positions + _LEARNED_OFFSET)
        if self.config.dialect.positions == SINUSOIDAL:
            return jnp.asarray(sinusoids(self.config.max_position_embeddings, width))[positions]
        # As `M2M100SinusoidalPositionalEmbedding`: float32 throughout, for texts of any length.
        half = width // 2
        frequencies = jnp.asarray(np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000) / (half - 1))))
        angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
        embedded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return jnp.where((positions < 0)[..., None], 0, jnp.pad(embedded, ((0, 0), (0, 0), (0, width % 2))))


class Bart(EncoderDecoder):
    """A BART: a pytree of weights in one dtype.

    On a mesh, heads, MLP units and, if divisible, vocabulary entries are sharded over the axis "tensor", rows over
    "data".
    """

    config: BartConfig

    def __init__(self, config: BartConfig, rngs: nnx.Rngs, generation_config: object = None, mesh: Mesh | None = None):
        super().__init__(config, generation_config, mesh)
        shards, std = tensor_shards(mesh), config.init_std
        self.shared = Embed(config.vocab_size, config.d_model, std=std, rngs=rngs)
        self.encoder = Stack(config, rngs, shards, decoder=False)
        self.decoder = Stack(config, rngs, shards, decoder=True)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.d_model, config.vocab_size, bias=False, std=std, rngs=rngs)
        bias = jnp.zeros((1, config.vocab_size), jnp.float32)
        self.final_logits_bias = nnx.Param(bias) if config.has_logits_bias else None

    @property
    def max_position_embeddings(self) -> int:
        return self.config.max_position_embeddings

    @property
    def has_position_table(self) -> bool:
        return self.config.dialect.positions != SINUSOIDAL_OF_TOKENS

    @property
    def dtype(self) -> jnp.dtype:
        return self.shared.weight[...].dtype

    def encode_layers(
        self, x: jax.Array, input_ids: jax.Array | None, attention_mask: jax.Array, intermediates: tuple[str, ...]
    ) -> tuple[jax.Array, Intermediates]:
        columns = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        positions = self._positions(input_ids, columns, counted=True)
        mask = jnp.broadcast_to(attention_mask[:, None], (*x.shape[:2], x.shape[1]))
        hidden, _, computed = self.encoder(x, positions, mask, None, intermediates)
        return hidden, computed

    def cross_layers(self) -> list[CrossAttention]:
        return [layer.encoder_attn for layer in self.decoder.layers if layer.encoder_attn is not None]

    def decode_layers(
        self,
        x: jax.Array,
        input_ids: jax.Array | None,
        positions: jax.Array,
        mask: jax.Array,
        cache: KVCache,
        intermediates: tuple[str, ...],
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        positions = self._positions(input_ids, positions, counted=False)
        hidden, extended, computed = self.decoder(x, positions, mask, cache, intermediates)
        assert extended is not None
        return hidden, extended, computed

    def _positions(self, input_ids: jax.Array | None, columns: jax.Array, counted: bool) -> jax.Array:
        """Columns, int32 [N, T] or [1, T], as positions of the embedding; with `counted` those of padding do not count.

        In an M2M100, with "." for padding:

        ```
        text         . . a b c
        counted     -1 -1 2 3 4      a is the first token, and positions begin after `pad_token_id`, 1
        else        -1 -1 4 5 6
        ```
        """
        if self.config.dialect.positions != SINUSOIDAL_OF_TOKENS:
            return columns
        first = self.config.pad_token_id + 1
        if input_ids is None:
            return columns + first
        token = input_ids != self.config.pad_token_id
        number = jnp.cumsum(token, axis=1, dtype=jnp.int32) - 1 if counted else columns
        return jnp.where(token, number + first, -1)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        embedded = self.shared(input_ids)
        return embedded * self.config.d_model**0.5 if self.config.scale_embedding else embedded

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = self.shared.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        if self.final_logits_bias is not None:
            logits = logits + self.final_logits_bias[...].reshape(*[1] * (logits.ndim - 1), -1)
        return logits.astype(jnp.float32)
