"""Llama, from its `config.json` to its logits. Same computation as transformers 5.23 `LlamaForCausalLM`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.base import Internals
from jaxgen.kv_cache import KVCache
from jaxgen.models import rope
from jaxgen.models.layers import Embed, HostOnly, Linear, RMSNorm, attend
from jaxgen.models.rope import Rope

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# What `config.json` may leave out, with the defaults of transformers 5.23 `LlamaConfig`.
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TYPES = dict.fromkeys((*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int) | {
    "hidden_act": str,
    "rms_norm_eps": float,
    "initializer_range": float,
    "attention_bias": bool,
    "mlp_bias": bool,
    "tie_word_embeddings": bool,
}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
# Read elsewhere, or without effect on a forward pass.
_NO_EFFECT = frozenset(
    "model_type architectures dtype torch_dtype transformers_version _name_or_path use_cache attention_dropout "
    "bos_token_id eos_token_id pad_token_id return_dict id2label label2id chunk_size_feed_forward tokenizer_class "
    "_attn_implementation_autoset _attn_implementation is_llama_config transformers.js_config unsloth_version "
    "unsloth_fixed pretraining_tp max_sequence_length task_specific_params auto_map".split()
)


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a checkpoint, in the names of its `config.json`; part of the compile key."""

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
    mlp_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    rope: Rope

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], generation_fields: frozenset[str] = frozenset()) -> Self:
        """Reads a `config.json`, refusing what would change the computation and is not handled.

        Args:
            raw: the parsed file.
            generation_fields: the names that belong to the generation config, where old files kept them.

        Raises:
            ValueError: naming the key, its value and the way out.
        """
        values = {**_DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
        _refuse_unhandled(values, generation_fields)
        for key, kind in _TYPES.items():
            # JSON tells 1 from true, and 1e-5 may be written as a whole number.
            if type(values.get(key)) not in (kind, *([int] if kind is float else [])) and values.get(key) is not None:
                raise ValueError(f"`{key}`={values[key]!r} in config.json must be of type {kind.__name__}.")
        for key in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if values.get(key) is not None and values[key] < 1:
                raise ValueError(f"`{key}`={values[key]!r} in config.json must be positive.")
        if missing := [key for key in _REQUIRED if key not in values]:
            raise ValueError(f"config.json lacks {missing}, which a Llama needs.")
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values["num_key_value_heads"] or heads
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
        _check_geometry(values)
        fields = {key: values[key] for key in (*_REQUIRED, *_DEFAULTS)}
        return cls(**fields, rope=rope.from_config(values, values["head_dim"]))

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read alike, rotary parameters in both spellings."""
        raw = {key: getattr(self, key) for key in (*_REQUIRED, *_DEFAULTS)}
        parameters = rope.to_config(self.rope)
        raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_parameters": parameters}
        raw["rope_theta"] = parameters["rope_theta"]
        if parameters["rope_type"] != "default":
            raw["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return raw


def _refuse_unhandled(values: Mapping[str, Any], generation_fields: frozenset[str]) -> None:
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ValueError(f"the checkpoint is quantised (`quant_method`={method!r}). Use the unquantised original.")
    if values.get("architectures") not in (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]):
        raise ValueError(
            f"`architectures`={values['architectures']!r} in config.json is not ['LlamaForCausalLM']. Save the model "
            "with its language modelling head."
        )
    known = {*_DEFAULTS, *_REQUIRED, *_ROPE, *_NO_EFFECT, *generation_fields}
    for key, value in values.items():
        # A falsy value is how configs say that a feature is off, and rotating all of each head is what Llama does.
        if key not in known and value and (key, value) != ("partial_rotary_factor", 1):
            raise ValueError(
                f"config.json has `{key}`={value!r}, which jaxgen does not know and which may change the computation. "
                "If it does not, remove it from the file."
            )


def _check_geometry(values: Mapping[str, Any]) -> None:
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if values["hidden_size"] % heads:
        raise ValueError(f"`hidden_size`={values['hidden_size']} is not a multiple of `num_attention_heads`={heads}.")
    if heads % kv_heads:
        raise ValueError(f"`num_attention_heads`={heads} is not a multiple of `num_key_value_heads`={kv_heads}.")
    if values["head_dim"] % 2:
        raise ValueError(f"`head_dim`={values['head_dim']} must be even: rotary embeddings turn pairs of dimensions.")
    if values["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"`hidden_act`={values['hidden_act']!r} is not supported; it may be one of {[*ACTIVATIONS]}.")


class Attention(nnx.Module):
    """Same as transformers 5.23 `LlamaAttention`, its three input products fused into one."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        inner = config.num_attention_heads * config.head_dim
        fused = inner + 2 * config.num_key_value_heads * config.head_dim
        options = {"bias": config.attention_bias, "std": config.initializer_range, "rngs": rngs}
        self.qkv_proj = Linear(config.hidden_size, fused, **options)
        self.o_proj = Linear(inner, config.hidden_size, **options)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache, Callable[[], jax.Array]]:
        """[N, T, D] -> [N, T, D], the cache, and what gives the weights [N, Q, T, S].

        cos and sin are [N, T, H], the mask is bool [N, T, S], and the cache is of this layer only.
        """
        rows, columns, _ = x.shape
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        heads = self.config.num_attention_heads
        qkv = self.qkv_proj(x).reshape(rows, columns, -1, head_dim).transpose(0, 2, 1, 3)
        queries, keys, values = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
        queries, keys = (rope.rotate(each, cos[:, None], sin[:, None]) for each in (queries, keys))
        cache, keys, values = cache.update(0, keys, values)
        queries = queries.reshape(rows, kv_heads, heads // kv_heads, columns, head_dim)
        attended, weights = attend(queries, keys, values, mask)
        attended = attended.transpose(0, 3, 1, 2, 4).reshape(rows, columns, -1)
        return self.o_proj(attended), cache, lambda: weights().reshape(rows, heads, columns, -1)


class MLP(nnx.Module):
    """Same as transformers 5.23 `LlamaMLP`, its two input products fused into one."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.hidden_act = config.hidden_act
        options = {"bias": config.mlp_bias, "std": config.initializer_range, "rngs": rngs}
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, **options)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, T, D]."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        # In float32 and rounded once, as torch's activations are; rounding in between costs 5 % more KL in bf16.
        activated = ACTIVATIONS[self.hidden_act](gate.astype(jnp.float32)).astype(x.dtype)
        return self.down_proj(activated * up)


class Layer(nnx.Module):
    """Same as transformers 5.23 `LlamaDecoderLayer`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache, Callable[[], jax.Array]]:
        """As `Attention`."""
        attended, cache, weights = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache, weights


# Traced once and not once per layer, which is most of the time before the first token of a program that is compiled
# already (135M: 0.7 -> 0.1 s). Inlined, so that the program's text is the same: as a function that it calls 30 times,
# XLA:CPU takes half as long again to compile it.
@partial(jax.jit, static_argnames="with_weights", inline=True)
def _run(
    layer: Layer, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array, cache: KVCache, with_weights: bool
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """A layer, with its attention's weights if they are wanted."""
    x, cache, weights = layer(x, cos, sin, mask, cache)
    return x, cache, weights() if with_weights else None


class Llama(nnx.Module):
    """A causal Llama: a pytree of weights in one dtype, with Hugging Face's attribute names where nothing is fused."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, generation_config: Any = None):
        std = config.initializer_range
        self.config = config
        self.host = HostOnly(generation_config)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, std=std, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, std=std, rngs=rngs)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_bytes_per_token(self) -> int:
        config = self.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.dtype.itemsize

    def internals_bytes(self, name: str, columns: int, slots: int) -> int:
        """See `base.Model.internals_bytes`."""
        config = self.config
        per_column = {
            "hidden_states": (config.num_hidden_layers + 1) * config.hidden_size,
            "attentions": config.num_hidden_layers * config.num_attention_heads * slots,
        }[name]
        return columns * per_column * self.dtype.itemsize

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed_tokens.weight[...].dtype

    @property
    def generation_config(self) -> Any:
        return self.host.value

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.host = HostOnly(value)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Logits of every column, without a cache to keep: for training and scoring.

        Args:
            input_ids: int32 [N, T].
            attention_mask: bool [N, T], all True by default.

        Returns:
            float32 [N, T, V].
        """
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids, bool)
        cache = self.make_cache(*input_ids.shape)
        hidden, _, _ = self._hidden_states(cache, input_ids, attention_mask.astype(bool))
        return self._logits(hidden)

    def make_cache(self, rows: int, slots: int) -> KVCache:
        config = self.config
        return KVCache.zeros(
            config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim, self.dtype
        )

    def extend(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        collect: tuple[str, ...] = (),
    ) -> tuple[jax.Array, KVCache, Internals]:
        """See `base.Model.extend`: the head runs on the last column only, or on that of each branch."""
        hidden, cache, internals = self._hidden_states(cache, input_ids, attention_mask, position_ids, collect)
        last = hidden[:, -cache.branches :].reshape(-1, hidden.shape[-1])
        return self._logits(last), cache, internals

    def _hidden_states(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        collect: tuple[str, ...] = (),
    ) -> tuple[jax.Array, KVCache, Internals]:
        """float [N, T, D] after the final norm, the cache T columns longer, and the internals asked for."""
        x = self.embed_tokens(input_ids) if input_ids.ndim == 2 else input_ids.astype(self.dtype)
        cache, positions, mask = cache.extend(attention_mask, position_ids)
        cos, sin = rope.cos_sin(self.config.rope, positions, x.dtype)
        hidden_states, attentions, pairs = [x], [], []
        for layer, pair in zip(self.layers, cache.layers, strict=True):
            x, own, weights = _run(layer, x, cos, sin, mask, replace(cache, layers=(pair,)), "attentions" in collect)
            pairs += own.layers
            hidden_states.append(x)
            attentions.append(weights)
        cache = replace(cache, layers=tuple(pairs))
        x = self.norm(x)
        # As in transformers, the last of the hidden states is the one after the final norm.
        internals = {"hidden_states": (*hidden_states[:-1], x), "attentions": tuple(attentions)}
        return x, cache, {name: internals[name] for name in collect}

    def _logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], rounded to the model's dtype on the way, as transformers' are."""
        logits = self.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        return logits.astype(jnp.float32)


def weight_map(config: LlamaConfig) -> dict[str, dict[str, int]]:
    """Each parameter's path, and the Hugging Face tensors stacked along its first axis with the rows each has."""
    table = {
        "embed_tokens.weight": {"model.embed_tokens.weight": config.vocab_size},
        "norm.weight": {"model.norm.weight": config.hidden_size},
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = {"lm_head.weight": config.vocab_size}
    for layer in range(config.num_hidden_layers):
        for path, parts, has_bias in _layer_weights(config):
            for kind in ("weight", "bias") if has_bias else ("weight",):
                sources = {f"model.layers.{layer}.{part}.{kind}": rows for part, rows in parts.items()}
                table[f"layers.{layer}.{path}.{kind}"] = sources
    return table


def _layer_weights(config: LlamaConfig) -> list[tuple[str, dict[str, int], bool]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    qkv = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    return [
        ("input_layernorm", {"input_layernorm": hidden}, False),
        ("self_attn.qkv_proj", qkv, config.attention_bias),
        ("self_attn.o_proj", {"self_attn.o_proj": hidden}, config.attention_bias),
        ("post_attention_layernorm", {"post_attention_layernorm": hidden}, False),
        ("mlp.gate_up_proj", {"mlp.gate_proj": inner, "mlp.up_proj": inner}, config.mlp_bias),
        ("mlp.down_proj", {"mlp.down_proj": hidden}, config.mlp_bias),
    ]
