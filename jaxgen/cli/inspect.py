"""`jaxgen inspect`: describes a checkpoint, from its config and the headers of its files."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxgen.checkpoint import gguf_file
from jaxgen.checkpoint.hub import commit_of, local_path
from jaxgen.checkpoint.source import Source, named_leaves, open_checkpoint
from jaxgen.cli.terminal import byte_count, counted, open_tokenizer

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def run(arguments: argparse.Namespace) -> int:
    source = open_checkpoint(local_path(arguments.folder, arguments.revision), follow_links=arguments.follow_links)
    for name, value in describe(source).items():
        print(f"{name:<12}{value}")
    for message in source.warnings:
        print(f"jaxgen: {message}", file=sys.stderr)
    return 0


def describe(source: Source) -> dict[str, str]:
    """The lines to print, {heading: text}."""
    model, config = source.abstract, source.abstract.config
    sizes = {path: math.prod(leaf.shape) for path, leaf in named_leaves(model)}
    parameters = sum(sizes.values())
    stored = sorted({tensor.stored for path in sizes for tensor in source.pieces[path]})
    weights = parameters * source.dtype.itemsize
    loaded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, source.dtype), model)
    # `cache_bytes_per_token` needs arrays, but here are only shapes. So `eval_shape` computes it, as the size of an
    # array.
    per_token = jax.eval_shape(lambda model: jnp.zeros(model.cache_bytes_per_token, bool), loaded).size
    # Without a table of positions, models with an encoder have no longest text.
    longest = None if model.is_encoder_decoder and not model.has_position_table else model.max_position_embeddings
    full_cache = "" if longest is None else f"; {byte_count(per_token * longest)} for a full context"
    of_source = f"; {byte_count(per_token)} per token of the source" if model.is_encoder_decoder else ""
    commit = commit_of(source.folder)
    return {
        "folder": f"{source.folder} ({_layout(source)})",
        **({"commit": commit} if commit else {}),
        "family": f"{source.raw['model_type']}, {source.family.describe(config)}",
        "vocabulary": f"{config.vocab_size:,} ids, {'tied' if config.tie_word_embeddings else 'separate'} head",
        "context": "without a limit" if longest is None else counted(longest, "token"),
        "parameters": f"{parameters:,}",
        "dtype": f"{source.dtype} (stored: {', '.join(stored)})",
        "weights": byte_count(weights),
        "cache": f"{byte_count(per_token)} per token and row{full_cache}{of_source}",
        "stops at": _stops(source, model.generation_config),
        "chat": "has a template" if _has_template(source.folder) else "has no template",
    }


def _layout(source: Source) -> str:
    return "GGUF" if source.folder.is_file() else "converted" if source.native else "Hugging Face"


def _stops(source: Source, generation_config: "GenerationConfig") -> str:
    ids = generation_config.eos_token_id  # an int, a list or None
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    if not ids or not (source.folder.is_file() or (source.folder / "tokenizer.json").exists()):
        return str(ids) if ids else "no eos id"
    try:
        tokenizer = open_tokenizer(source.folder)
    except ValueError as error:
        return f"{ids}; {error}"
    return ", ".join(f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)})" for token_id in ids)


def _has_template(folder: Path) -> bool:
    if folder.is_file():
        return "tokenizer.chat_template" in gguf_file.read_metadata(folder)
    config = folder / "tokenizer_config.json"
    return any((folder / name).exists() for name in _TEMPLATES) or (
        config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")
    )
