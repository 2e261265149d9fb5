"""The `Family` of Llama-like models, for `checkpoint` and `planning`; see `family.Family`."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.base import tensor_shards
from jaxgen.models.family import Family, ForwardPass, Gguf
from jaxgen.models.layers import columns_at_once, tokens_at_once
from jaxgen.models.llama import Dialect, Llama, LlamaConfig, attention_shards, head_copies, unread_keys
from jaxgen.models.partition import partition_of

# Memory at the peak of attention, in units of the prompt's float32 scores. A CPU also holds their exponentials; a TPU
# or GPU holds parts of these in a dtype of half the size.
_SCORE_BUFFERS = {"cpu": 2.0, "tpu": 1.25, "gpu": 1.25}


def like_llama(dialect: Dialect, gguf: Gguf[LlamaConfig] | None = None) -> Family[LlamaConfig]:
    """The family of a dialect; for `gguf` see `Family`."""
    return Family(
        config=partial(LlamaConfig.from_json, dialect=dialect),
        unread_keys=partial(unread_keys, dialect=dialect),
        build=Llama,
        embedding="embed_tokens.weight",
        head="lm_head.weight",
        prefix="model.",
        weight_map=weight_map,
        buffers={
            ".rotary_emb.inv_freq": _inverse_frequencies,
            "rope.freqs": _inverse_frequencies,
            ".attn.masked_bias": None,
            ".self_attn.masked_bias": None,
        },
        partition=partition,
        cache_shards=cache_shards,
        activation_bytes=activation_bytes,
        describe=describe,
        gguf=gguf,
    )


def weight_map(config: LlamaConfig) -> dict[str, dict[str, int]]:
    """{parameter path: {Hugging Face tensor: rows}}. Fused parameters stack several tensors along their first axis."""
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


def partition(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> Callable[[str], PartitionSpec]:
    """How each parameter, by its path, is sharded over the mesh axis "tensor".

    Weights [out, in] that produce heads or MLP units, and the embedding and the head [V, D], are sharded by rows.
    Weights that consume heads or units are sharded by columns. All others are replicated. If the axis does not divide
    the key-value heads, every device gets the queries, keys and values of all heads, but has only a share of the
    columns of attention's weights, which take 144 GB in a 405B. See `head_copies` for what it attends to.

    Raises:
        ValueError: if the axis does not divide the units.
    """
    shards = tensor_shards(mesh)
    spread = attention_shards(config, shards) == shards
    products = (*(("self_attn.qkv_proj",) if spread else ()), "mlp.gate_up_proj")
    by_rows = [f"{path}.{kind}" for path in products for kind in ("weight", "bias")]
    by_rows += ["embed_tokens.weight", "lm_head.weight"] if config.vocab_size % shards == 0 else []
    inner = config.num_attention_heads * config.head_dim
    by_columns = ["mlp.down_proj.weight"]
    by_columns += ["self_attn.o_proj.weight"] if inner % shards == 0 else []
    by_columns += ["self_attn.qkv_proj.weight"] if not spread and config.hidden_size % shards == 0 else []
    return partition_of({"intermediate_size": config.intermediate_size}, by_rows, by_columns, mesh)


def _layer_weights(config: LlamaConfig) -> list[tuple[str, dict[str, int], bool]]:
    """The parameters of a layer: path, {Hugging Face tensor: rows}, and whether there is a bias."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    qkv = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    return [
        ("input_layernorm", {"input_layernorm": hidden}, False),
        ("self_attn.qkv_proj", qkv, config.attention_bias),
        ("self_attn.o_proj", {"self_attn.o_proj": hidden}, config.o_proj_bias),
        *((f"self_attn.{norm}", {f"self_attn.{norm}": config.head_dim}, False) for norm in norms),
        ("post_attention_layernorm", {"post_attention_layernorm": hidden}, False),
        ("mlp.gate_up_proj", {"mlp.gate_proj": inner, "mlp.up_proj": inner}, config.mlp_bias),
        ("mlp.down_proj", {"mlp.down_proj": hidden}, config.mlp_bias),
    ]


def _inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """float32 [H/2], a buffer in old checkpoints."""
    return np.asarray(config.rope.inverse_frequencies(1))


def cache_shards(config: LlamaConfig, shards: int) -> int:
    """See `Family.cache_shards`: a copy of a head on another device saves nothing."""
    copies = head_copies(config, shards)
    return attention_shards(config, shards) if copies == 1 else shards // copies


def activation_bytes(config: LlamaConfig, forward: ForwardPass) -> int:
    """See `Family.activation_bytes`: the larger of attention and MLP of a layer, plus the residual stream.

    On several devices it is also what they add up, and the sum.
    """
    rows, columns, item, platform = forward.rows, forward.columns, forward.itemsize, forward.platform
    qkv_shards = attention_shards(config, forward.shards)
    head_shards = qkv_shards if head_copies(config, forward.shards) == 1 else forward.shards
    if columns < forward.slots:  # a step, in which everything but the scores is negligible
        return 2 * (4 * rows * config.num_attention_heads // head_shards * columns * forward.slots)
    # Sharded, XLA:GPU allocates the scores of all heads on each device.
    shards = 1 if platform == "gpu" else head_shards
    scores = 4 * rows * config.num_attention_heads // shards * columns_at_once(columns) * columns
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    qkv = item * rows * columns * heads * config.head_dim // qkv_shards
    hidden = item * rows * columns * config.hidden_size
    tokens = tokens_at_once(rows * columns) if platform == "cpu" and forward.shards == 1 else rows * columns
    units = item * tokens * config.intermediate_size // forward.shards
    # Gate and up, and their product, the input of down.
    mlp = 3 * units
    attention = int(_SCORE_BUFFERS[platform] * scores) + (0 if platform == "cpu" else qkv)
    return max(attention + hidden, mlp) + (1 if forward.shards == 1 else 3) * hidden


def describe(config: LlamaConfig) -> str:
    """As "2 layers of 32, 4 heads on 2 of 8, MLP of 40, default rope"."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return (
        f"{layers} layer{'s' * (layers > 1)} of {config.hidden_size}, {heads} head{'s' * (heads > 1)} on "
        f"{config.num_key_value_heads} of {config.head_dim}, MLP of {config.intermediate_size}, "
        f"{type(config.rope).__name__.lower()} rope"
    )
