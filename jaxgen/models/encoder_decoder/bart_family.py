"""The `Family` of models that are a BART, for `checkpoint` and `planning`; see `family.Family`."""

from collections.abc import Callable, Iterator
from functools import partial

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.base import tensor_shards
from jaxgen.models.encoder_decoder.bart import LEARNED, SINUSOIDAL, Bart, BartConfig, Dialect, sinusoids, unread_keys
from jaxgen.models.encoder_decoder.sizes import activation_bytes, of_source
from jaxgen.models.family import Family
from jaxgen.models.partition import partition_of


def like_bart(dialect: Dialect) -> Family[BartConfig]:
    """The family of a dialect."""

    def positions(config: BartConfig):
        return sinusoids(config.max_position_embeddings, config.d_model)

    computed = positions if dialect.positions == SINUSOIDAL else None
    tables = {} if dialect.positions == LEARNED else {".embed_positions.weight": computed}
    return Family(
        config=partial(BartConfig.from_json, dialect=dialect),
        unread_keys=partial(unread_keys, dialect=dialect),
        build=Bart,
        embedding="shared.weight",
        head="lm_head.weight",
        prefix="model.",
        weight_map=weight_map,
        buffers={"encoder.version": None, "decoder.version": None, ".embed_positions.weights": None, **tables},
        partition=partition,
        activation_bytes=activation_bytes,
        describe=describe,
        of_source=of_source,
        aliases={
            "model.encoder.embed_tokens.weight": "model.shared.weight",
            "model.decoder.embed_tokens.weight": "model.shared.weight",
        },
        optional={"final_logits_bias": "has_logits_bias"} if dialect.logits_bias else {},
    )


def weight_map(config: BartConfig) -> dict[str, dict[str, int]]:
    """{parameter path: {Hugging Face tensor: rows}}. Fused parameters stack several tensors along their first axis."""
    dialect, width = config.dialect, config.d_model
    table = {"shared.weight": {"model.shared.weight": config.vocab_size}}
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = {"lm_head.weight": config.vocab_size}
    if config.has_logits_bias:
        table["final_logits_bias"] = {"final_logits_bias": 1}
    for stack, layers in zip(("encoder", "decoder"), config.layers, strict=True):
        if dialect.positions == LEARNED:
            name = f"{stack}.embed_positions.weight"
            table[name] = {f"model.{name}": config.max_position_embeddings + 2}
        norms = ["layernorm_embedding"] * dialect.embedding_norm + ["layer_norm"] * dialect.norm_first
        for norm in norms:
            table |= {f"{stack}.{norm}.{kind}": {f"model.{stack}.{norm}.{kind}": width} for kind in ("weight", "bias")}
        for layer in range(layers):
            for path, parts in _layer_weights(config, stack == "decoder"):
                for kind in ("weight", "bias"):
                    sources = {f"model.{stack}.layers.{layer}.{part}.{kind}": rows for part, rows in parts.items()}
                    table[f"{stack}.layers.{layer}.{path}.{kind}"] = sources
    return table


def _layer_weights(config: BartConfig, decoder: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """The parameters of a layer: path, and {Hugging Face tensor: rows}, each with a weight and a bias."""
    width = config.d_model
    yield "self_attn.qkv_proj", {f"self_attn.{part}_proj": width for part in "qkv"}
    yield "self_attn.o_proj", {"self_attn.out_proj": width}
    yield "self_attn_layer_norm", {"self_attn_layer_norm": width}
    if decoder:
        yield "encoder_attn.q_proj", {"encoder_attn.q_proj": width}
        yield "encoder_attn.kv_proj", {f"encoder_attn.{part}_proj": width for part in "kv"}
        yield "encoder_attn.o_proj", {"encoder_attn.out_proj": width}
        yield "encoder_attn_layer_norm", {"encoder_attn_layer_norm": width}
    yield "fc1", {"fc1": config.units[decoder]}
    yield "fc2", {"fc2": width}
    yield "final_layer_norm", {"final_layer_norm": width}


def partition(config: BartConfig, mesh: Mesh | AbstractMesh) -> Callable[[str], PartitionSpec]:
    """See `partition.partition_of`."""
    by_rows = [
        f"{path}.{kind}"
        for path in ("self_attn.qkv_proj", "encoder_attn.q_proj", "encoder_attn.kv_proj", "fc1")
        for kind in ("weight", "bias")
    ]
    by_rows += ["shared.weight", "lm_head.weight"] if config.vocab_size % tensor_shards(mesh) == 0 else []
    sizes = {
        "encoder_attention_heads": config.heads[0],
        "decoder_attention_heads": config.heads[1],
        "encoder_ffn_dim": config.units[0],
        "decoder_ffn_dim": config.units[1],
    }
    return partition_of(sizes, by_rows, ("o_proj.weight", "fc2.weight"), mesh)


def describe(config: BartConfig) -> str:
    """As "2 + 2 layers of 32, 4 heads, gelu MLP of 64"."""
    encoder, decoder = config.layers
    return (
        f"{encoder} + {decoder} layers of {config.d_model}, {config.heads[1]} heads, "
        f"{config.activation_function} MLP of {config.units[1]}"
    )
