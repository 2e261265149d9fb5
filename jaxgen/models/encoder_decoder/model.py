"""What encoder-decoder families share: the encoder's pass, its memory in the cache, and the decoder's passes over it.

```
source [B, X] -> encode -> hidden [B, X, D] -> memory: keys and values of each cross-attention, [B, K, X, H]
text   [N, T] -> extend -> logits, with the text's own keys and values in the cache and the memory beside them
```

The decoder is a causal language model with a short prompt, so the decode loop treats it as one.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.base import Intermediates, Source, no_mesh
from jaxgen.encoder_memory import Memory
from jaxgen.kv_cache import KVCache
from jaxgen.models.language_model import LanguageModel
from jaxgen.models.layers import Bias, Linear, attend, unfuse


class EncoderDecoderConfig:
    """What the config of an encoder-decoder family has besides the fields of its `config.json`."""

    dialect: Any
    d_model: int

    @property
    def model_type(self) -> str:
        return self.dialect.model_type

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def heads(self) -> tuple[int, int]:
        """Q of the encoder and of the decoder; every query head has its own keys and values."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        """Of the decoder."""
        raise NotImplementedError

    @property
    def layers(self) -> tuple[int, int]:
        """The number of layers of the encoder and of the decoder."""
        raise NotImplementedError

    @property
    def units(self) -> tuple[int, int]:
        """The units of an MLP of the encoder and of the decoder."""
        raise NotImplementedError


class _Attention(nnx.Module):
    """The weights of an attention."""

    projections: ClassVar[dict[str, int]]  # {attribute: how many of q, k and v it computes}

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool,
        scale: float | None,
        std: float,
        rngs: nnx.Rngs,
        shards: int,
    ):
        self.heads, self.head_dim, self.scale, self.shards = heads, head_dim, scale, shards
        for name, count in self.projections.items():
            setattr(self, name, Linear(width, count * heads * head_dim, bias=bias, std=std, rngs=rngs))
        self.o_proj = Linear(heads * head_dim, width, bias=bias, std=std, rngs=rngs)


class SelfAttention(_Attention):
    """Attention of columns to each other, with the projections of q, k and v fused."""

    projections: ClassVar = {"qkv_proj": 3}
    qkv_proj: Linear

    def __call__(
        self, x: jax.Array, mask: jax.Array, bias: Bias | None, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None, Callable[[], jax.Array]]:
        """[N, T, D] -> [N, T, D], the cache, and a function that computes the attention weights [N, Q, T, S].

        Args:
            x: [N, T, D].
            mask: bool [N, T, S].
            bias: added to the scores.
            cache: of this layer only; without one, as in an encoder, columns attend only each other, and S is T.
        """
        rows, columns, _ = x.shape
        # [N, T, 3Q * H] -> [N, 3Q, T, H], then q, k and v [N, Q, T, H] along axis 1.
        qkv = self.qkv_proj(x).reshape(rows, columns, -1, self.head_dim).transpose(0, 2, 1, 3)
        queries, keys, values = unfuse(qkv, (self.heads,) * 3, self.shards, axis=1)
        if cache is not None:
            cache, keys, values = cache.update(0, keys, values)
        attended, weights = attend(queries[:, :, None], keys, values, mask, self.scale, bias)
        # [N, K, G, T, H] -> [N, T, Q * H]
        attended = attended.transpose(0, 3, 1, 2, 4).reshape(rows, columns, -1)
        return self.o_proj(attended), cache, lambda: weights().reshape(rows, self.heads, columns, -1)


class CrossAttention(_Attention):
    """Attention of the decoder's columns to the source, with the projections of k and v fused."""

    projections: ClassVar = {"q_proj": 1, "kv_proj": 2}
    q_proj: Linear
    kv_proj: Linear

    def keys_and_values(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The encoder's output [B, X, D] -> keys and values, each [B, K, X, H]."""
        rows, columns, _ = hidden.shape
        fused = self.kv_proj(hidden).reshape(rows, columns, -1, self.head_dim).transpose(0, 2, 1, 3)
        keys, values = unfuse(fused, (self.heads,) * 2, self.shards, axis=1)
        return keys, values

    def __call__(self, x: jax.Array, memory: Memory) -> tuple[jax.Array, Callable[[], jax.Array]]:
        """[N, T, D] -> [N, T, D], and a function that computes the attention weights [N, Q, T, X].

        Args:
            x: [N, T, D].
            memory: of this layer only.
        """
        rows, columns, _ = x.shape
        sources, width = memory.mask.shape
        keys, values = memory.layers[0]
        # The rows of a source are more columns to its memory, which is not repeated for them:
        # [N, T, Q * H] -> [B, rows, T, K, H] -> [B, K, rows, T, H] -> [B, K, 1, rows * T, H]
        queries = self.q_proj(x).reshape(sources, -1, columns, self.heads, self.head_dim).transpose(0, 3, 1, 2, 4)
        mask = jnp.broadcast_to(memory.mask[:, None], (sources, rows // sources * columns, width))
        flat = queries.reshape(sources, self.heads, 1, -1, self.head_dim)
        attended, weights = attend(flat, keys, values, mask, self.scale)
        attended = attended.reshape(queries.shape).transpose(0, 2, 3, 1, 4).reshape(rows, columns, -1)

        def by_row() -> jax.Array:
            # [B, K, 1, rows * T, X] -> [B, K, rows, T, X] -> [N, Q, T, X]
            apart = weights().reshape(sources, self.heads, -1, columns, width)
            return apart.transpose(0, 2, 1, 3, 4).reshape(rows, self.heads, columns, width)

        return self.o_proj(attended), by_row


def run_layers(
    layers: Iterable[tuple[nnx.Module, tuple[Any, ...]]],
    x: jax.Array,
    cache: KVCache | None,
    norm: Callable[[jax.Array], jax.Array] | None,
    intermediates: tuple[str, ...],
) -> tuple[jax.Array, KVCache | None, Intermediates]:
    """The layers of an encoder or a decoder: [N, T, D], the cache with these columns, and the intermediates asked for.

    Args:
        layers: each with its arguments besides `x` and `cache`. A layer returns [N, T, D], the cache, and functions
            that compute the weights of self- and cross-attention.
        x: [N, T, D], embeddings.
        cache: after `extend`, with the memory; None in an encoder.
        norm: after the last layer.
        intermediates: of "hidden_states", "attentions", "cross_attentions".
    """
    hidden_states, attentions, cross_attentions, pairs = [x], [], [], []
    with_weights = any(name.endswith("attentions") for name in intermediates)
    for number, (layer, arguments) in enumerate(layers):
        x, layer_cache, weights = _run(layer, x, cache and cache.of_layer(number), arguments, with_weights)
        pairs += [] if layer_cache is None else layer_cache.layers
        hidden_states.append(x)
        attentions += weights[:1]
        cross_attentions += weights[1:]
    x = x if norm is None else norm(x)
    computed = {
        # As in transformers, the last one is after the final norm.
        "hidden_states": (*hidden_states[:-1], x),
        "attentions": tuple(attentions),
        "cross_attentions": tuple(cross_attentions),
    }
    return x, cache and replace(cache, layers=tuple(pairs)), {name: computed[name] for name in intermediates}


# Jitted and inlined as the layers of a Llama.
@partial(jax.jit, static_argnames="with_weights", inline=True)
def _run(
    layer: Any, x: jax.Array, cache: KVCache | None, arguments: tuple[Any, ...], with_weights: bool
) -> tuple[jax.Array, KVCache | None, list[jax.Array]]:
    x, cache, weights = layer(x, cache, *arguments)
    return x, cache, [each() for each in weights] if with_weights else []


class EncoderDecoder(LanguageModel):
    """A language model with an encoder; see `base.EncoderDecoderModel`. A family adds its embeddings and layers."""

    windowed: ClassVar[bool] = False

    # What a family adds.

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """int32 [...] -> [..., D], without positions; of source and text alike."""
        raise NotImplementedError

    def encode_layers(
        self, x: jax.Array, input_ids: jax.Array | None, attention_mask: jax.Array, intermediates: tuple[str, ...]
    ) -> tuple[jax.Array, Intermediates]:
        """The layers of the encoder.

        Args:
            x: [B, X, D], embeddings.
            input_ids: int32 [B, X]; None if the caller passed embeddings.
            attention_mask: bool [B, X].
            intermediates: of "hidden_states", "attentions".

        Returns:
            [B, X, D], and the intermediates.
        """
        raise NotImplementedError

    def cross_layers(self) -> list[CrossAttention]:
        """The cross-attention of each layer of the decoder."""
        raise NotImplementedError

    def decode_layers(
        self,
        x: jax.Array,
        input_ids: jax.Array | None,
        positions: jax.Array,
        mask: jax.Array,
        cache: KVCache,
        intermediates: tuple[str, ...],
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        """The layers of the decoder.

        Args:
            x: [N, T, D], embeddings.
            input_ids: int32 [N, T]; None if the caller passed embeddings.
            positions: int32 [N, T].
            mask: bool [N, T, S].
            cache: after its `extend`.
            intermediates: of "hidden_states", "attentions", "cross_attentions".

        Returns:
            [N, T, D], the cache with these columns, and the intermediates.
        """
        raise NotImplementedError

    # What all share.

    @property
    def is_encoder_decoder(self) -> bool:
        return True

    @property
    def cache_bytes_per_token(self) -> int:
        config = self.config
        return 2 * config.layers[1] * config.heads[1] * config.head_dim * self.dtype.itemsize

    def intermediates_bytes(self, name: str, columns: int, slots: int) -> int:
        """See `base.Model.intermediates_bytes`."""
        decoder = not name.startswith("encoder")
        layers = self.config.layers[decoder]
        if name.endswith("attentions"):
            return columns * layers * self.config.heads[decoder] * slots * self.dtype.itemsize
        return columns * (layers + 1) * self.hidden_size * self.dtype.itemsize

    def first_layers(self, count: int) -> NoReturn:
        del count
        raise ValueError("`assistant_early_exit` is for models without an encoder. Leave it out.")

    def make_cache(self, rows: int, slots: int) -> KVCache:
        config, (_, heads) = self.config, self.config.heads
        cache = KVCache.zeros(config.layers[1], rows, slots, heads, config.head_dim, self.dtype, self.windowed)
        return cache if self.mesh is None else cache.placed(self.mesh, rows, heads)

    def encode(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """The output of the encoder, [B, X, D], which `generate` and `decode` take as `encoder_outputs`.

        Args:
            input_ids: int32 [B, X], or float [B, X, D] embeddings.
            attention_mask: bool [B, X], all True by default.
        """
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape[:2], bool)
        with no_mesh():
            return self._encode(Source(input_ids, attention_mask.astype(bool)), ())[0]

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every column of the decoder, without returning a cache: for training and scoring.

        Args:
            input_ids: int32 [B, X], the source; not read with `encoder_outputs`.
            attention_mask: bool [B, X], all True by default.
            decoder_input_ids: int32 [B, T], which begin with the start token.
            decoder_attention_mask: bool [B, T], all True by default.
            encoder_outputs: float [B, X, D], from `encode`.

        Returns:
            float32 [B, T, V].
        """
        if decoder_input_ids is None:
            raise ValueError("`decoder_input_ids` are missing. Pass the text, beginning with its start token.")
        inputs = input_ids if encoder_outputs is None else encoder_outputs
        if attention_mask is None:
            attention_mask = jnp.ones(inputs.shape[:2], bool)
        if decoder_attention_mask is None:
            decoder_attention_mask = jnp.ones_like(decoder_input_ids, bool)
        with no_mesh():
            cache = self.make_cache(*decoder_input_ids.shape)
            source = Source(inputs, attention_mask.astype(bool), encoded=encoder_outputs is not None)
            cache, _ = self.read(cache, source)
            # By columns, as in transformers; a cache counts unmasked columns.
            positions = jnp.broadcast_to(
                jnp.arange(decoder_input_ids.shape[1], dtype=jnp.int32)[None], decoder_input_ids.shape
            )
            mask = decoder_attention_mask.astype(bool)
            hidden, _, _ = self.hidden_states(cache, decoder_input_ids, mask, positions)
            return self.logits(hidden)

    def read(
        self, cache: KVCache, source: Source, intermediates: tuple[str, ...] = ()
    ) -> tuple[KVCache, Intermediates]:
        """See `base.EncoderDecoderModel.read`."""
        mask = source.attention_mask.astype(bool)
        hidden, computed = self._encode(source, tuple(name.removeprefix("encoder_") for name in intermediates))
        memory = Memory.of((layer.keys_and_values(hidden) for layer in self.cross_layers()), mask)
        return replace(cache, memory=memory), {f"encoder_{name}": arrays for name, arrays in computed.items()}

    def _encode(self, source: Source, intermediates: tuple[str, ...]) -> tuple[jax.Array, Intermediates]:
        inputs = source.inputs
        if source.encoded:
            return inputs.astype(self.dtype), {}
        x, ids = (self.embed(inputs), inputs) if inputs.ndim == 2 else (inputs.astype(self.dtype), None)
        return self.encode_layers(self.sharded_by_rows(x), ids, source.attention_mask.astype(bool), intermediates)

    def hidden_states(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        intermediates: tuple[str, ...] = (),
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        x, ids = (self.embed(input_ids), input_ids) if input_ids.ndim == 2 else (input_ids.astype(self.dtype), None)
        cache, positions, mask = cache.extend(attention_mask, position_ids)
        return self.decode_layers(self.sharded_by_rows(x), ids, positions, mask, cache, intermediates)
