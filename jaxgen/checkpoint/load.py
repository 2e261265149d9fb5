"""Creates models from a checkpoint, from a config with random weights, or with shapes only; and saves them."""

import functools
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxgen.base import no_mesh, tensor_shards
from jaxgen.checkpoint import safetensors_file
from jaxgen.checkpoint.files import Json
from jaxgen.checkpoint.folder import INDEX, SINGLE_FILE, listed
from jaxgen.checkpoint.hub import local_path
from jaxgen.checkpoint.processes import gathered, processes_of, together
from jaxgen.checkpoint.source import (
    MANIFEST,
    Part,
    abstract_model,
    automatic_mesh,
    local_parts,
    named_leaves,
    open_checkpoint,
    parse_config,
    row_slices,
    rows_are_sharded,
    shardings,
    unread_message,
    weights_dtype,
)
from jaxgen.models import FAMILIES, LoadedModel, int4, int8
from jaxgen.models.family import Config, Family
from jaxgen.models.int4 import Int4
from jaxgen.models.int8 import Array, Int8

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedConfig

BUNDLED_MODEL = Path(__file__).parent.parent / "stories"
BUNDLED_SPELLER = Path(__file__).parent.parent / "speller"
QUANTIZATIONS = ("int8", "int4")


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
            its devices directly. The devices may belong to several processes, which all call `load`: each one reads
            only what its own devices hold. It reads whole rows where those are computed, of GGUF and of 8-bit floats.
        quantize: "int8" to store every matrix as one byte per weight and a float32 scale per row, except for a few of
            its columns, which stay in `dtype`. Activations and the cache have that dtype too. "int4" to store half a
            byte per weight and a byte per 32 of them; the embedding and the head are in int8 then. The columns are
            chosen by all weights of a matrix, so every process reads all of it.
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
    abstract_leaves, treedef = jax.tree.flatten(source.abstract)
    spread = shardings(source.family, source.abstract)
    paths = [path for path, _ in named_leaves(source.abstract)]
    # The outlier columns are chosen by all rows of a matrix, and the scales by all columns.
    parts = [
        local_parts(leaf.shape, None if quantize else each) for leaf, each in zip(abstract_leaves, spread, strict=True)
    ]
    total = sum(map(_size, parts)) * target.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", delay=2) as bar:
        leaves = []
        for path, array, read, sharding in zip(paths, source.parameters(target, parts), parts, spread, strict=True):
            bar.update(_size(read) * array.itemsize)
            leaves.append(_placed(_quantised(source.family, path, array, quantize), sharding))
    return jax.tree.unflatten(treedef, leaves)


def _size(parts: list[Part]) -> int:
    return sum(math.prod(axis.stop - axis.start for axis in part) for part in parts)


def _placed(parameter: Array | Int8, sharding: NamedSharding | None) -> jax.Array | Int8:
    """A parameter on the devices of this process that hold it, or without a sharding on JAX's default device.

    Unlike `jax.device_put` it takes every process at its word that all have the same values, so none waits for another.
    """
    if sharding is None:
        return jax.device_put(parameter)

    def place(array: Array, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, parameter, _of_parts(parameter, sharding))


def _of_parts(parameter: Any, sharding: NamedSharding) -> "NamedSharding | Int8":
    """The sharding of a parameter, or if that is `Int8` of each of its arrays."""
    if not isinstance(parameter, Int8):
        return sharding
    # Values [out, in] are sharded as the matrix would be, scales and outliers as its first axis.
    rows, columns = (*sharding.spec, None, None)[:2]
    everywhere, by_row = (NamedSharding(sharding.mesh, PartitionSpec(*spec)) for spec in ((), (rows,)))
    parts = replace(parameter, values=sharding, scales=by_row, columns=everywhere, outliers=by_row)
    if not isinstance(parameter, Int4):
        return parts
    # Values are [16, out, groups] and multipliers [out, groups]. Groups are sharded if they divide evenly.
    if parameter.multipliers.shape[1] % tensor_shards(sharding.mesh):
        columns = None
    values, multipliers = (
        NamedSharding(sharding.mesh, PartitionSpec(*spec)) for spec in ((None, rows, columns), (rows, columns))
    )
    return replace(parts, values=values, multipliers=multipliers)


def from_config(
    config: "Json | PreTrainedConfig",
    key: jax.Array | int = 0,
    dtype: jax.typing.DTypeLike = "float32",
    quantize: str | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """A model with random weights, normal with the config's `initializer_range`.

    Args:
        config: the content of a config.json, or a config of transformers such as `LlamaConfig`.
        key: a `jax.random` key or a seed.
        dtype: the dtype of the weights: float32, bfloat16 or float16.
        quantize: see `load`.
        mesh: see `load`. Each device makes its own shards, with the values that the model has without a mesh. All
            processes of the mesh call this function, with the same key.

    Raises:
        ValueError: for a mesh, `dtype` or `quantize` that `load` refuses, or a config that is not supported.
    """
    check_quantize(quantize)
    mesh = None if mesh is None else automatic_mesh(mesh)
    raw = config if isinstance(config, Mapping) else config.to_dict()
    family, parsed, generation_config = parse_config(raw, None)
    for message in unread_message(family, raw):
        warnings.warn(message, stacklevel=2)
    arguments = family, parsed, weights_dtype(dtype), quantize, mesh
    with no_mesh():
        key = jax.random.key(key) if isinstance(key, int) else key
        of_arguments = range(len(arguments))
        make = jax.jit(_random_model, static_argnums=of_arguments, out_shardings=_random_shardings(*arguments))
        model = make(*arguments, key)
    model.generation_config = generation_config
    return model


def abstract(config: Json, mesh: Mesh | None = None) -> LoadedModel:
    """A model with `jax.ShapeDtypeStruct` in place of weights: nothing is allocated.

    Args:
        config: the content of a config.json.
        mesh: see `load`.
    """
    return abstract_model(*parse_config(config, None), None if mesh is None else automatic_mesh(mesh))


def _random_model(
    family: Family, config: Config, dtype: np.dtype, quantize: str | None, mesh: Mesh | None, key: jax.Array
) -> LoadedModel:
    built = family.build(config, nnx.Rngs(key), None, mesh)
    stacks = family.weight_map(config)
    leaves = [
        _in_shards(leaf, stacks[path], sharding).astype(family.dtype_of(path, dtype))
        for (path, leaf), sharding in zip(named_leaves(built), shardings(family, built), strict=True)
    ]
    model = jax.tree.structure(built).unflatten(leaves)
    return quantised_model(model, quantize)


def _in_shards(stacked: jax.Array, sources: Mapping[str, int], sharding: NamedSharding | None) -> jax.Array:
    """A parameter whose sources follow each other, with its rows in the order of `row_slices`."""
    if sharding is None or not rows_are_sharded(sharding) or len(sources) == 1:
        return stacked
    if stacked.ndim == 2 and stacked.shape[1] % tensor_shards(sharding.mesh) == 0:
        # Made by columns, its rows are reordered within a device. Made by rows, they would first be gathered.
        by_columns = NamedSharding(sharding.mesh, PartitionSpec(None, "tensor"))
        stacked = jax.lax.with_sharding_constraint(stacked, by_columns)
    # Of each slice the start in the parameter, and its rows as they are now.
    pieces: list[tuple[int, jax.Array]] = []
    start = 0
    for slices in row_slices(sources, sharding):
        for rows in slices:
            stop = start + rows.stop - rows.start
            pieces.append((rows.start, stacked[start:stop]))
            start = stop
    return jnp.concatenate([piece for _, piece in sorted(pieces, key=itemgetter(0))])


def _random_shardings(
    family: Family, config: Config, dtype: np.dtype, quantize: str | None, mesh: Mesh | None
) -> LoadedModel | None:
    """The shardings of what `_random_model` returns, as the same pytree; None without a mesh."""
    if mesh is None:
        return None
    abstract = jax.eval_shape(
        functools.partial(_random_model, family, config, dtype, quantize, mesh), jax.random.key(0)
    )
    leaves, treedef = jax.tree.flatten(abstract, is_leaf=lambda leaf: isinstance(leaf, Int8))
    spec = family.partition(config, mesh)
    paths = (path for path, _ in named_leaves(treedef.unflatten(range(len(leaves)))))
    return treedef.unflatten(
        _of_parts(leaf, NamedSharding(mesh, spec(path))) for leaf, path in zip(leaves, paths, strict=True)
    )


def to_int8(model: LoadedModel) -> LoadedModel:
    """A copy of the model with its matrices in int8, as `load` with `quantize="int8"` makes it.

    It drafts well for the model itself: `generate(model, ..., assistant_model=to_int8(model))`.

    Raises:
        ValueError: if the model is already quantised.
    """
    _check_not_quantised(model)
    return quantised_model(model, "int8")


def to_int4(model: LoadedModel) -> LoadedModel:
    """A copy of the model with its matrices in int4, as `load` with `quantize="int4"` makes it.

    It drafts for the model itself, as that of `to_int8` does, with half of its bytes but more wrong tokens.

    Raises:
        ValueError: if the model is already quantised.
    """
    _check_not_quantised(model)
    return quantised_model(model, "int4")


def quantised_model(model: LoadedModel, quantize: str | None) -> LoadedModel:
    """A copy of an unquantised model, with its matrices as `load` quantises them."""
    if quantize is None:
        return model
    family = FAMILIES[model.config.model_type]
    leaves = [_quantised(family, path, leaf, quantize) for path, leaf in named_leaves(model)]
    return jax.tree.structure(model).unflatten(leaves)


def _quantised(family: Family, path: str, array: Array, quantize: str | None) -> Array | Int8:
    """A parameter as `quantize` says. In int4, the embedding and the head would double the divergence."""
    if quantize is None:
        return array
    of_tokens = path in (family.embedding, family.head)
    return int8.quantised(array) if of_tokens or quantize == "int8" else int4.quantised(array)


def _kinds(model: LoadedModel) -> set[str]:
    """Which of int8 and int4 the model has matrices in."""
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, Int8))
    return {type(leaf).__name__.lower() for leaf in leaves if isinstance(leaf, Int8)}


def _check_not_quantised(model: LoadedModel) -> None:
    if kinds := _kinds(model):
        raise ValueError(f"`model` is already in {min(kinds)}. Use it as it is.")


def check_quantize(quantize: object) -> None:
    """Raises ValueError unless `load` supports this `quantize`."""
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"`quantize`={quantize!r} is not supported; it may be one of {[*QUANTIZATIONS]} or None.")


def save(model: LoadedModel, path: str | Path) -> None:
    """Writes a Hugging Face folder: config.json, generation_config.json and model.safetensors.

    If the devices of the model belong to several processes, all of them call `save` with the same folder, on a file
    system that all share. Each process writes a file with its share of the tensors, and the first one also their index.
    Parameters are gathered one after the other, and for that moment every device holds a whole one.

    Args:
        model: the model, not quantised, with exactly the parameters of its family.
        path: the folder, which is created if needed; files of these names in it are replaced.

    Raises:
        ValueError: if the folder holds a checkpoint in another layout, which would be loaded instead of the new files;
            if the model is quantised or has other parameters than its family.
        OSError: if a file cannot be written, or if another process fails. The index is then not written.
    """
    if _kinds(model):
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
    processes, folder = processes_of(model.mesh), Path(path)
    files = [f"model-{number:05}-of-{len(processes):05}.safetensors" for number in range(1, len(processes) + 1)]
    files = files if len(files) > 1 else [SINGLE_FILE]
    with together(model.mesh):
        others = {INDEX, MANIFEST, SINGLE_FILE} - {*files}
        if taken := sorted(name for name in others if (folder / name).exists()):
            raise ValueError(f"{folder} holds a checkpoint in another layout ({taken}). Choose an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_json(), "dtype": str(model.dtype)}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = getattr(model.generation_config, key)
    written = [*stacks.items()]
    if not (config["tie_word_embeddings"] or family.head_may_differ):
        # transformers 5 then ties nothing to the embedding, and draws its copies at random if they are missing.
        written += [(family.embedding, {alias: model.config.vocab_size}) for alias in family.aliases]
    spread = dict(zip(parameters, shardings(family, model), strict=True))
    own, shares = processes.index(jax.process_index()), _shares(written, parameters, len(files))
    # A parameter is split into the tensors that it is made of, in the order of the header.
    headers = [
        {
            name: (np.dtype(parameters[path].dtype), (rows, *parameters[path].shape[1:]))
            for path, sources in share
            for name, rows in sources.items()
        }
        for share in shares
    ]

    def arrays() -> Iterator[np.ndarray]:
        for number, (path, sources) in ((number, each) for number, share in enumerate(shares) for each in share):
            parameter = gathered(parameters[path], model.mesh)
            if number == own:
                values = jax.device_get(parameter)
                for slices in row_slices(sources, spread[path]):
                    yield np.concatenate([values[rows] for rows in slices])

    with together(model.mesh):
        own_arrays = arrays()
        try:
            safetensors_file.write(folder / files[own], headers[own], own_arrays)
        finally:
            for _ in own_arrays:  # the other processes wait for this one to gather the rest with them
                pass
    with together(model.mesh):
        if own == 0:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            # Not `save_pretrained`: it refuses sampling fields without `do_sample`, which many checkpoints have.
            model.generation_config.to_json_file(folder / "generation_config.json")
        if own == 0 and len(files) > 1:
            listing = {name: file for file, header in zip(files, headers, strict=True) for name in header}
            total = sum(parameters[path].nbytes for path, _ in written)
            index = {"metadata": {"total_size": total}, "weight_map": listing}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shares(
    written: list[tuple[str, dict[str, int]]], parameters: Mapping[str, jax.Array], count: int
) -> list[list[tuple[str, dict[str, int]]]]:
    """What each of `count` processes writes: every parameter goes to the one that has the fewest bytes so far."""
    shares: list[list[tuple[str, dict[str, int]]]] = [[] for _ in range(count)]
    sizes = [0] * count
    for path, sources in written:
        least = sizes.index(min(sizes))
        shares[least].append((path, sources))
        sizes[least] += parameters[path].nbytes
    return shares
