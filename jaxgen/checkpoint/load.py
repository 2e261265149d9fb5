"""Creates models from a checkpoint, from a config with random weights, or with shapes only; and saves them."""

import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxgen.base import no_mesh
from jaxgen.checkpoint import safetensors_file
from jaxgen.checkpoint.files import Json
from jaxgen.checkpoint.folder import INDEX, SINGLE_FILE, listed
from jaxgen.checkpoint.hub import local_path
from jaxgen.checkpoint.source import (
    MANIFEST,
    abstract_model,
    automatic_mesh,
    named_leaves,
    open_checkpoint,
    parse_config,
    row_slices,
    unread_message,
    weights_dtype,
)
from jaxgen.models import FAMILIES, LoadedModel
from jaxgen.models.family import Config, Family
from jaxgen.models.int8 import Int8, quantised

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedConfig

BUNDLED_MODEL = Path(__file__).parent.parent / "stories"
BUNDLED_SPELLER = Path(__file__).parent.parent / "speller"


def load(
    path: str | Path,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    follow_links: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Loads a model from a Hugging Face folder, a folder written by `convert`, a GGUF file or the Hugging Face hub.

    Args:
        path: the folder (config.json and safetensors), the GGUF file, or the name of a model on the Hugging Face hub,
            "owner/name", which is downloaded to the hub's cache. An existing path always wins over a name, and a `Path`
            is never downloaded.
        dtype: the dtype of the weights: float32, bfloat16 or float16. By default, and with "auto", it is the config's,
            else the embedding's. Quantised blocks of GGUF are dequantised and count as float32.
        mesh: devices to shard the model over, with the axes "tensor" (attention heads, MLP units, the vocabulary),
            "data" (rows of a batch) or both, as `jax.make_mesh((2, 4), ("data", "tensor"))`. Each parameter is put on
            its devices directly.
        quantize: "int8" to store every matrix as one byte per weight and a float32 scale per row, except for a few of
            its columns, which stay in `dtype`. Activations and the cache have that dtype too.
        follow_links: also read files outside the folder that its links lead to. Links from a snapshot to the blobs of
            the Hugging Face hub's cache are always followed.
        revision: the branch, tag or commit of a model on the hub; "main" by default.

    Returns:
        The model, on the mesh or on JAX's default device, with `config` and `generation_config`.

    Raises:
        CheckpointError: if something is missing, broken or unknown. Nothing is loaded then.
        ValueError: if the mesh has other axes, or sizes that do not divide the heads or units; for any other `dtype` or
            `quantize`; for a `revision` with a path.
    """
    check_quantize(quantize)
    source = open_checkpoint(local_path(path, revision), None if mesh is None else automatic_mesh(mesh), follow_links)
    for message in source.warnings:
        warnings.warn(message, stacklevel=2)
    target = source.dtype if dtype in (None, "auto") else weights_dtype(dtype)
    shardings = source.shardings()
    leaves, treedef = jax.tree.flatten(source.abstract)
    total = sum(leaf.size for leaf in leaves) * target.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", delay=2) as bar:
        arrays = []
        for array, sharding in zip(source.parameters(target), shardings, strict=True):
            bar.update(array.nbytes)
            parameter = quantised(array) if quantize else array
            if isinstance(parameter, Int8) and sharding is not None:
                # values [out, in] are sharded as the matrix would be, scales and outliers as its first axis
                by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
                everywhere = NamedSharding(sharding.mesh, PartitionSpec())
                sharding = replace(parameter, values=sharding, scales=by_row, columns=everywhere, outliers=by_row)
            arrays.append(jax.device_put(parameter, sharding))
    return jax.tree.unflatten(treedef, arrays)


def from_config(
    config: "Json | PreTrainedConfig",
    key: jax.Array | int = 0,
    dtype: jax.typing.DTypeLike = "float32",
    quantize: str | None = None,
) -> LoadedModel:
    """A model with random weights, normal with the config's `initializer_range`.

    Args:
        config: the content of a config.json, or a config of transformers such as `LlamaConfig`.
        key: a `jax.random` key or a seed.
        dtype: the dtype of the weights: float32, bfloat16 or float16.
        quantize: see `load`.
    """
    check_quantize(quantize)
    raw = config if isinstance(config, Mapping) else config.to_dict()
    family, parsed, generation_config = parse_config(raw, None)
    for message in unread_message(family, raw):
        warnings.warn(message, stacklevel=2)
    with no_mesh():
        key = jax.random.key(key) if isinstance(key, int) else key
        model = _random_model(family, parsed, weights_dtype(dtype), quantize is not None, key)
    model.generation_config = generation_config
    return model


def abstract(config: Json, mesh: Mesh | None = None) -> LoadedModel:
    """A model with `jax.ShapeDtypeStruct` in place of weights: nothing is allocated.

    Args:
        config: the content of a config.json.
        mesh: see `load`.
    """
    return abstract_model(*parse_config(config, None), None if mesh is None else automatic_mesh(mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _random_model(family: Family, config: Config, dtype: np.dtype, quantize: bool, key: jax.Array) -> LoadedModel:
    built = family.build(config, nnx.Rngs(key))
    leaves, treedef = jax.tree.flatten(built)
    dtypes = [family.dtype_of(path, dtype) for path, _ in named_leaves(built)]
    model = treedef.unflatten(leaf.astype(each) for leaf, each in zip(leaves, dtypes, strict=True))
    return jax.tree.map(quantised, model) if quantize else model


def to_int8(model: LoadedModel) -> LoadedModel:
    """A copy of the model with its matrices in int8, as `load` with `quantize="int8"` makes it.

    It drafts well for the model itself: `generate(model, ..., assistant_model=to_int8(model))`.

    Raises:
        ValueError: if the model is already in int8.
    """
    if any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, Int8))):
        raise ValueError("`model` is already in int8. Use it as it is.")
    return jax.tree.map(quantised, model)


def check_quantize(quantize: object) -> None:
    """Raises ValueError unless `load` supports this `quantize`."""
    if quantize not in (None, "int8"):
        raise ValueError(f'`quantize`={quantize!r} is not supported; it may be "int8" or None.')


def save(model: LoadedModel, path: str | Path) -> None:
    """Writes a Hugging Face folder: config.json, generation_config.json and model.safetensors.

    Args:
        model: the model, not quantised, with exactly the parameters of its family.
        path: the folder, which is created if needed; files of these names in it are replaced.

    Raises:
        ValueError: if the folder holds a checkpoint in another layout, which would be loaded instead of the new files;
            if the model is quantised or has other parameters than its family.
    """
    if any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, Int8))):
        raise ValueError(
            "`model` is quantised, but a Hugging Face folder holds the full weights. Save it before you quantise it."
        )
    family = FAMILIES[model.config.model_type]
    parameters, stacks = dict(named_leaves(model)), family.weight_map(model.config)
    if unknown := sorted(set(parameters) ^ set(stacks)):
        raise ValueError(
            f"`model` does not have exactly the parameters of a {model.config.model_type} ({listed(unknown)}). Where a "
            "layer is an `nnx.LoRA`, add the product to its weights, `lora.base_module.weight[...] += "
            "(lora.lora_a[...] @ lora.lora_b[...]).T`, and put the base module back in its place."
        )
    folder = Path(path)
    if taken := [name for name in (INDEX, MANIFEST) if (folder / name).exists()]:
        raise ValueError(f"{folder} holds a checkpoint in another layout ({taken}). Choose an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_json(), "dtype": str(model.dtype)}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = getattr(model.generation_config, key)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Not `save_pretrained`: it refuses sampling fields without `do_sample`, which many checkpoints have.
    model.generation_config.to_json_file(folder / "generation_config.json")
    written = [*stacks.items()]
    if not (config["tie_word_embeddings"] or family.head_may_differ):
        # transformers 5 then ties nothing to the embedding, and draws its copies at random if they are missing.
        written += [(family.embedding, {alias: model.config.vocab_size}) for alias in family.aliases]
    # A parameter is split into the tensors that it is made of, in the order of the header.
    header = {
        name: (np.dtype(parameters[path].dtype), (rows, *parameters[path].shape[1:]))
        for path, sources in written
        for name, rows in sources.items()
    }
    arrays = (
        np.concatenate([parameter[rows] for rows in slices])
        for path, sources in written
        for parameter in [jax.device_get(parameters[path])]
        for slices in row_slices(sources, model.mesh)
    )
    safetensors_file.write(folder / SINGLE_FILE, header, arrays)
