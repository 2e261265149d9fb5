"""Llama, from its `config.json` to its logits. Same computation as transformers 5.24 `LlamaForCausalLM`.

Several families are a Llama with a few flags: other biases, norms on queries and keys, sliding windows. They share this
implementation. Each has a `Dialect` in its own file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import Intermediates, no_mesh, rows_axis, tensor_shards
from jaxgen.kv_cache import KVCache
from jaxgen.models import config_keys, rope
from jaxgen.models.decode_attention import BLOCK, fits
from jaxgen.models.language_model import LanguageModel
from jaxgen.models.layers import ACTIVATIONS, Embed, Linear, RMSNorm, attend, by_tokens, unfuse
from jaxgen.models.rope import Rope

# The values of `layer_types`.
FULL, SLIDING = "full_attention", "sliding_attention"

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_POSITIVE = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_TYPES = dict.fromkeys((*_POSITIVE, "max_window_layers"), int) | {
    "hidden_act": str,
    "rms_norm_eps": float,
    "initializer_range": float,
    "attention_bias": bool,
    "mlp_bias": bool,
    "tie_word_embeddings": bool,
    "use_sliding_window": bool,
}
# Keys where null is a value: as many key-value heads as query heads, and no window. Elsewhere null means a default.
_NULLABLE = frozenset({"num_key_value_heads", "sliding_window"})
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")


@dataclass(frozen=True)
class Dialect:
    """How a family of Llama-like models writes its `config.json`. Dialects compare by `model_type`.

    Attributes:
        model_type: the family's name.
        architecture: the class in transformers.
        defaults: the keys that may be left out, and their defaults in transformers 5.24.
        fixed: flags of `LlamaConfig` that have the same value in all models of the family. transformers ignores these
            keys in a config.json of the family.
        spellings: other names of the architecture in config.json.
    """

    model_type: str
    architecture: str = field(compare=False)
    defaults: Mapping[str, object] = field(compare=False)
    fixed: Mapping[str, bool] = field(compare=False)
    spellings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def base_architecture(self) -> str:
        """The name of the class without a head; its tensors have no prefix."""
        return self.architecture.replace("ForCausalLM", "Model")


# The keys that every family may leave out, with the defaults that most families have.
COMMON_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
LLAMA = Dialect(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    fixed={"qk_norm": False},
    spellings=("LLaMAForCausalLM",),
)


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a checkpoint, in the names of its `config.json`; part of the compile key.

    Attributes:
        attention_bias: whether q_proj, k_proj and v_proj have a bias.
        o_proj_bias: whether o_proj has a bias.
        qk_norm: whether queries and keys are normalised, per head.
        sliding_window: how many columns a column attends to in sliding layers, itself included; None without such
            layers.
        layer_types: `FULL` or `SLIDING`, for each layer.
    """

    dialect: Dialect
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    o_proj_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    initializer_range: float
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: Rope

    @property
    def model_type(self) -> str:
        return self.dialect.model_type

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Any], generation_fields: frozenset[str] = frozenset(), dialect: Dialect = LLAMA
    ) -> Self:
        """Reads a `config.json`. Keys that would change the computation and are not implemented are refused.

        Args:
            raw: the parsed file.
            generation_fields: names of generation fields, which old files have in config.json; see `unread_keys`.
            dialect: the family's dialect.

        Raises:
            ValueError: naming the key, its value and what to do.
        """
        given = {key: value for key, value in raw.items() if value is not None or key in _NULLABLE}
        values: dict[str, Any] = {**dialect.defaults, **given}
        config_keys.refuse_unhandled(values, (dialect.architecture, *dialect.spellings, dialect.base_architecture))
        unread_keys(raw, generation_fields, dialect)
        config_keys.check_types({key: values.get(key) for key in (*_REQUIRED, *dialect.defaults)}, _TYPES, _POSITIVE)
        if missing := [key for key in _REQUIRED if key not in values]:
            raise ValueError(f"config.json lacks {missing}, which a {dialect.model_type} needs.")
        settings = {**{key: values[key] for key in (*_REQUIRED, *dialect.defaults)}, **dialect.fixed}
        _check_geometry(settings)
        heads = settings["num_attention_heads"]
        settings["num_key_value_heads"] = settings["num_key_value_heads"] or heads
        settings["head_dim"] = settings["head_dim"] or settings["hidden_size"] // heads
        # A Llama has one flag for all four projections; other families fix this one.
        settings.setdefault("o_proj_bias", settings["attention_bias"])
        settings["sliding_window"], settings["layer_types"] = _windows(settings)
        settings["rope"] = rope.from_config(values, settings["head_dim"])
        settings["dialect"] = dialect
        return cls(**{each.name: settings[each.name] for each in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """A `config.json` with the same meaning in transformers 4 and 5: rotary parameters in both spellings."""
        slide = [kind == SLIDING for kind in self.layer_types]
        settings = {
            **vars(self),
            "use_sliding_window": any(slide),
            "layer_types": [*self.layer_types],
            "max_window_layers": [*slide, True].index(True),  # for versions of transformers without `layer_types`
        }
        raw = {key: settings[key] for key in (*_REQUIRED, *self.dialect.defaults)}
        parameters = rope.to_config(self.rope)
        raw |= {"model_type": self.model_type, "architectures": [self.dialect.architecture]}
        raw |= {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"]}
        if parameters["rope_type"] != "default":
            raw["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return raw


def unread_keys(
    raw: Mapping[str, object], generation_fields: frozenset[str] = frozenset(), dialect: Dialect = LLAMA
) -> list[str]:
    """The keys of a `config.json` that are not read and so have no effect; see `config_keys`.

    Args:
        raw, generation_fields, dialect: as in `LlamaConfig.from_json`.

    Raises:
        ValueError: naming a key that would change the computation and is not implemented.
    """
    implemented = {*dialect.defaults, *_REQUIRED, *_ROPE, "partial_rotary_factor", *generation_fields, *dialect.fixed}
    contradicted = [key for key, value in dialect.fixed.items() if raw.get(key) not in (None, value)]
    if "layer_types" not in dialect.defaults and raw.get("layer_types") is not None:
        implemented.add("layer_types")
        _check_layer_types(raw, dialect)
    return [*contradicted, *config_keys.unread_keys(raw, implemented), *rope.unread_keys(raw)]


def _check_layer_types(raw: Mapping[str, object], dialect: Dialect) -> None:
    """Raises a ValueError for layers that are not full, in a family without this key.

    transformers' cache reads the key even in a Llama, and treats a Mistral with this key as another family, Ministral.
    """
    kinds = raw["layer_types"]
    count = len(kinds) if isinstance(kinds, list | tuple) and all(kind == FULL for kind in kinds) else None
    if "sliding_window" in dialect.defaults or count != raw.get("num_hidden_layers"):
        raise ValueError(
            f"`layer_types`={kinds!r:.200} in config.json turns a {dialect.model_type} into another architecture, "
            "which jaxgen does not implement. Run this model with transformers."
        )


def _windows(settings: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """The fields `sliding_window` and `layer_types` of `LlamaConfig`, from the keys of the family."""
    layers, kinds = settings["num_hidden_layers"], settings.get("layer_types")
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if kinds is None:
        # In Qwen2, the first `max_window_layers` layers are full. Mistral lacks this key and has no full layers.
        full = layers if window is None else settings.get("max_window_layers", 0)
        kinds = [FULL if layer < full else SLIDING for layer in range(layers)]
    if not isinstance(kinds, list | tuple) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise ValueError(f"`layer_types`={kinds!r} in config.json must be a list of {FULL!r} and {SLIDING!r}.")
    if len(kinds) != layers:
        raise ValueError(f"`layer_types`={kinds!r} in config.json has {len(kinds)} entries for {layers} layers.")
    if SLIDING in kinds and window is None:
        raise ValueError(
            f"`layer_types`={kinds!r} in config.json has sliding layers, but there is no `sliding_window`, or "
            "`use_sliding_window` is not true. Set both, or make the layers full."
        )
    return (window if SLIDING in kinds else None), tuple(kinds)


def _check_geometry(settings: Mapping[str, Any]) -> None:
    """Raises a ValueError for inconsistent sizes and for an unknown activation."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    if settings["head_dim"] is None and hidden % heads:
        raise ValueError(
            f"`hidden_size`={hidden} is not a multiple of `num_attention_heads`={heads}, and there is no `head_dim`. "
            "Correct one of them in config.json."
        )
    kv_heads, head_dim = settings["num_key_value_heads"] or heads, settings["head_dim"] or hidden // heads
    if heads % kv_heads:
        raise ValueError(f"`num_attention_heads`={heads} is not a multiple of `num_key_value_heads`={kv_heads}.")
    if head_dim % 2:
        raise ValueError(f"`head_dim`={head_dim} must be even: rotary embeddings turn pairs of dimensions.")
    if (act := settings["hidden_act"]) not in ACTIVATIONS:
        raise ValueError(f"`hidden_act`={act!r} is not supported; it may be one of {[*ACTIVATIONS]}.")


def attention_shards(config: LlamaConfig, shards: int) -> int:
    """The devices, of `shards`, that queries, keys and values are computed on: 1 if it does not divide the heads."""
    return shards if config.num_key_value_heads % shards == 0 else 1


def head_copies(config: LlamaConfig, shards: int) -> int:
    """How often each key-value head is in the cache: on a mesh with more devices than heads, once on each device.

    ```
    device                0      1      2      3        2 key-value heads, 8 query heads, 2 copies
    key-value head        a      a      b      b
    query heads          0 1    2 3    4 5    6 7
    ```
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return shards // kv_heads if shards % kv_heads == 0 and heads % shards == 0 else 1


class Attention(nnx.Module):
    """Same as transformers 5.24 `LlamaAttention` or `Qwen3Attention`, with the projections of q, k and v fused."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, shards: int = 1):
        self.config = config
        self.shards = attention_shards(config, shards)
        inner = config.num_attention_heads * config.head_dim
        fused = inner + 2 * config.num_key_value_heads * config.head_dim
        options = {"std": config.initializer_range, "rngs": rngs}
        self.qkv_proj = Linear(config.hidden_size, fused, bias=config.attention_bias, **options)
        self.o_proj = Linear(inner, config.hidden_size, bias=config.o_proj_bias, **options)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array, cache: KVCache, mesh: Mesh | None
    ) -> tuple[jax.Array, KVCache, Callable[[], jax.Array]]:
        """[N, T, D] -> [N, T, D], the cache, and a function that computes the attention weights [N, Q, T, S].

        Args:
            x: [N, T, D].
            cos, sin: [N, T, H].
            mask: bool [N, T, S].
            cache: the cache of this layer only.
            mesh: of the model; None if nothing is sharded.
        """
        rows, columns, _ = x.shape
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        heads = self.config.num_attention_heads
        # [N, T, (Q + 2K) * H] -> [N, Q + 2K, T, H], then q [N, Q, ...], k and v [N, K, ...] along axis 1.
        qkv = self.qkv_proj(x).reshape(rows, columns, -1, head_dim).transpose(0, 2, 1, 3)
        sizes = heads, kv_heads, kv_heads
        if mesh is not None and cache.copies > 1:
            # Every device takes its heads from all of them. XLA would share out the fused heads as they come, and send
            # each where it belongs: 46 exchanges in a layer on 16 TPUs instead of 8.
            whole = NamedSharding(mesh, PartitionSpec(rows_axis(mesh, rows)))
            parts = unfuse(lax.with_sharding_constraint(qkv, whole), sizes, self.shards, axis=1)
            queries, keys, values = lax.with_sharding_constraint(parts, whole)
        else:
            queries, keys, values = unfuse(qkv, sizes, self.shards, axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = (rope.rotate(each, cos[:, None], sin[:, None]) for each in (queries, keys))
        cache, keys, values = cache.update(0, keys, values)
        # Query head g of group k is head k * G + g: [N, Q, T, H] -> [N, K, G, T, H] -> [N, T, Q * H]. The heads of a
        # group are shared out among the copies of its key-value head.
        queries = queries.reshape(rows, kv_heads * cache.copies, -1, columns, head_dim)
        attended, weights = attend(queries, keys, values, mask, kernel=mesh is None)
        attended = attended.transpose(0, 3, 1, 2, 4).reshape(rows, columns, -1)
        return self.o_proj(attended), cache, lambda: weights().reshape(rows, heads, columns, -1)


class MLP(nnx.Module):
    """Same as transformers 5.24 `LlamaMLP`, with the projections of gate and up fused."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, shards: int = 1):
        self.hidden_act = config.hidden_act
        self.shards = shards
        options = {"bias": config.mlp_bias, "std": config.initializer_range, "rngs": rngs}
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, **options)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, T, D]."""
        fused = self.gate_up_proj(x)
        gate, up = unfuse(fused, (fused.shape[-1] // 2,) * 2, self.shards, axis=2)
        # Activations in float32, rounded once, as in torch. With rounding in between, the KL in bf16 is 5 % higher.
        activated = ACTIVATIONS[self.hidden_act](gate.astype(jnp.float32)).astype(x.dtype)
        return self.down_proj(activated * up)


class Layer(nnx.Module):
    """Same as transformers 5.24 `LlamaDecoderLayer`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, shards: int = 1):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, rngs, shards)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, rngs, shards)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array, cache: KVCache, mesh: Mesh | None
    ) -> tuple[jax.Array, KVCache, Callable[[], jax.Array]]:
        """As `Attention`."""
        attended, cache, weights = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, mesh)

        def with_mlp(x: jax.Array) -> jax.Array:
            return x + self.mlp(self.post_attention_layernorm(x))

        x = x + attended
        return with_mlp(x) if mesh is not None else by_tokens(with_mlp, x), cache, weights


# Jitted, so that it is traced once and not for each layer. With a compiled program in the cache, tracing is most of the
# time to the first token (135M: 0.7 -> 0.1 s). Inlined, since XLA:CPU takes 1.5 times as long to compile a program that
# calls a function 30 times.
@partial(jax.jit, static_argnames=("mesh", "with_weights"), inline=True)
def _run(
    layer: Layer,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    cache: KVCache,
    mesh: Mesh | None,
    with_weights: bool,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """A layer, with its attention weights [N, Q, T, S] if `with_weights`."""
    x, cache, weights = layer(x, cos, sin, mask, cache, mesh)
    return x, cache, weights() if with_weights else None


class Llama(LanguageModel):
    """A causal Llama: a pytree of weights in one dtype, with Hugging Face's attribute names except for fused weights.

    On a mesh, MLP units and, if divisible, heads and vocabulary entries are sharded over the axis "tensor", rows over
    "data".
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, generation_config: object = None, mesh: Mesh | None = None):
        std, shards = config.initializer_range, tensor_shards(mesh)
        super().__init__(config, generation_config, mesh)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, std=std, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs, shards) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, std=std, rngs=rngs)

    @property
    def max_position_embeddings(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_bytes_per_token(self) -> int:
        config, heads = self.config, self.config.num_key_value_heads * self._head_copies
        return 2 * config.num_hidden_layers * heads * config.head_dim * self.dtype.itemsize

    @property
    def _head_copies(self) -> int:
        return head_copies(self.config, tensor_shards(self.mesh))

    def intermediates_bytes(self, name: str, columns: int, slots: int) -> int:
        """See `base.Model.intermediates_bytes`."""
        config = self.config
        per_column = {
            "hidden_states": (config.num_hidden_layers + 1) * config.hidden_size,
            "attentions": config.num_hidden_layers * config.num_attention_heads * slots,
        }[name]
        return columns * per_column * self.dtype.itemsize

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed_tokens.weight[...].dtype

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Logits of every column, without returning a cache: for training and scoring.

        Args:
            input_ids: int32 [N, T].
            attention_mask: bool [N, T], all True by default.

        Returns:
            float32 [N, T, V].
        """
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids, bool)
        with no_mesh():
            cache = self.make_cache(*input_ids.shape)
            hidden, _, _ = self.hidden_states(cache, input_ids, attention_mask.astype(bool))
            return self.logits(hidden)

    @property
    def slots_per_block(self) -> int | None:
        """See `base.Model.slots_per_block`. None without the kernel of `decode_attention`."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        kernel = jax.default_backend() == "gpu" and self.mesh is None
        return BLOCK if kernel and fits(group, BLOCK, self.config.head_dim, self.dtype) else None

    def first_layers(self, count: int) -> Self:
        """See `base.Model.first_layers`. The weights are shared."""
        layers = self.config.num_hidden_layers
        if not 1 <= count < layers:
            raise ValueError(f"the model has {layers} layers, and a draft model must have fewer, but at least one.")
        part = nnx.clone(self, variables=False)
        part.config = replace(self.config, num_hidden_layers=count, layer_types=self.config.layer_types[:count])
        part.layers = nnx.List([*self.layers][:count])
        return part

    def make_cache(self, rows: int, slots: int) -> KVCache:
        config, windowed = self.config, self.config.sliding_window is not None
        heads = config.num_key_value_heads
        sizes = config.num_hidden_layers, rows, slots, heads, config.head_dim
        cache = KVCache.zeros(*sizes, self.dtype, windowed, self._head_copies)
        return cache if self.mesh is None else cache.placed(self.mesh, rows, heads)

    def hidden_states(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        intermediates: tuple[str, ...] = (),
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        x = self.embed_tokens(input_ids) if input_ids.ndim == 2 else input_ids.astype(self.dtype)
        x = self.sharded_by_rows(x)
        cache, positions, mask = cache.extend(attention_mask, position_ids)
        # One mask for each kind of layer, and not for each layer.
        masks = {FULL: mask}
        if (window := self.config.sliding_window) is not None:
            masks[SLIDING] = cache.within(window, mask)
        cos, sin = rope.cos_sin(self.config.rope, positions, x.dtype)
        hidden_states, attentions, pairs = [x], [], []
        for number, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            # A cache of one layer, so that all layers have the same types and `_run` is traced once.
            layer_cache = cache.of_layer(number)
            x, layer_cache, weights = _run(
                *(layer, x, cos, sin, masks[kind], layer_cache, self.mesh, "attentions" in intermediates)
            )
            pairs += layer_cache.layers
            hidden_states.append(x)
            attentions.append(weights)
        cache = replace(cache, layers=tuple(pairs))
        x = self.norm(x)
        # As in transformers, the last hidden state is the one after the final norm, which replaces the one before it.
        computed = {"hidden_states": (*hidden_states[:-1], x), "attentions": tuple(attentions)}
        return x, cache, {name: computed[name] for name in intermediates}

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = self.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        return logits.astype(jnp.float32)
