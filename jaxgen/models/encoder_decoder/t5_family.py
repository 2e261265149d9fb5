"""The `Family` of models that are a T5, for `checkpoint` and `planning`; see `family.Family`."""

from collections.abc import Callable, Iterator
from functools import partial

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.base import tensor_shards
from jaxgen.models.encoder_decoder.sizes import activation_bytes, of_source
from jaxgen.models.encoder_decoder.t5 import Dialect, T5Config, T5Model, unread_keys
from jaxgen.models.family import Family
from jaxgen.models.partition import partition_of


def like_t5(dialect: Dialect) -> Family[T5Config]:
    """The family of a dialect."""
    return Family(
        config=partial(T5Config.from_json, dialect=dialect),
        unread_keys=partial(unread_keys, dialect=dialect),
        build=T5Model,
        embedding="shared.weight",
        head="lm_head.weight",
        prefix="",
        weight_map=weight_map,
        # Old files have this one; transformers ignores it by its name too.
        buffers={"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": None},
        partition=partition,
        activation_bytes=activation_bytes,
        describe=describe,
        of_source=of_source,
        aliases={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
        head_may_differ=True,
        wide=(".mlp.wo.weight",),  # as transformers' `_keep_in_fp32_modules`
    )


def weight_map(config: T5Config) -> dict[str, dict[str, int]]:
    """{parameter path: {Hugging Face tensor: rows}}. Fused parameters stack several tensors along their first axis."""
    width = config.d_model
    table = {"shared.weight": {"shared.weight": config.vocab_size}}
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = {"lm_head.weight": config.vocab_size}
    for stack, layers in zip(("encoder", "decoder"), config.layers, strict=True):
        table[f"{stack}.final_layer_norm.weight"] = {f"{stack}.final_layer_norm.weight": width}
        for layer in range(layers):
            for path, parts in _block_weights(config, stack == "decoder", layer):
                sources = {f"{stack}.block.{layer}.layer.{part}.weight": rows for part, rows in parts.items()}
                table[f"{stack}.block.{layer}.{path}.weight"] = sources
    return table


def _block_weights(config: T5Config, decoder: bool, layer: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The parameters of a block: path, and {Hugging Face tensor: rows}, both without what comes before."""
    width, inner = config.d_model, config.num_heads * config.d_kv
    own, cross, mlp = "0.SelfAttention", "1.EncDecAttention", f"{2 if decoder else 1}.DenseReluDense"
    yield "self_attention_norm", {"0.layer_norm": width}
    yield "self_attention.qkv_proj", {f"{own}.{part}": inner for part in "qkv"}
    yield "self_attention.o_proj", {f"{own}.o": width}
    if config.dialect.bias_in_every_layer or not layer:
        bias = "relative_attention_bias"
        yield bias, {f"{own}.{bias}": config.relative_attention_num_buckets}
    if decoder:
        yield "cross_attention_norm", {"1.layer_norm": width}
        yield "cross_attention.q_proj", {f"{cross}.q": inner}
        yield "cross_attention.kv_proj", {f"{cross}.{part}": inner for part in "kv"}
        yield "cross_attention.o_proj", {f"{cross}.o": width}
    yield "mlp_norm", {f"{2 if decoder else 1}.layer_norm": width}
    first = ("wi_0", "wi_1") if config.gated else ("wi",)
    yield "mlp.wi", {f"{mlp}.{part}": config.d_ff for part in first}
    yield "mlp.wo", {f"{mlp}.wo": width}


def partition(config: T5Config, mesh: Mesh | AbstractMesh) -> Callable[[str], PartitionSpec]:
    """See `partition.partition_of`."""
    by_rows = ["self_attention.qkv_proj.weight", "cross_attention.q_proj.weight", "cross_attention.kv_proj.weight"]
    by_rows += ["mlp.wi.weight"]
    by_rows += ["shared.weight", "lm_head.weight"] if config.vocab_size % tensor_shards(mesh) == 0 else []
    by_columns = ("o_proj.weight", "mlp.wo.weight")
    return partition_of({"num_heads": config.num_heads, "d_ff": config.d_ff}, by_rows, by_columns, mesh)


def describe(config: T5Config) -> str:
    """As "2 + 2 layers of 32, 4 heads of 8, gated-gelu MLP of 64"."""
    encoder, decoder = config.layers
    return (
        f"{encoder} + {decoder} layers of {config.d_model}, {config.num_heads} heads of {config.d_kv}, "
        f"{config.feed_forward_proj} MLP of {config.d_ff}"
    )
