"""The source of a model: a checkpoint whose tensors are all accounted for, before any of them is read.

Loading takes two passes. The first reads only names and shapes and accounts for everything: each tensor is used once,
each parameter is filled once, and every shape matches, or nothing is loaded. The second reads one parameter at a time,
and each tensor straight into its rows of the parameter, so the host holds one parameter besides the model. On a mesh
of several processes each one reads only what its own devices hold.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxgen import lazy
from jaxgen.base import tensor_shards
from jaxgen.checkpoint import float8, gguf_file
from jaxgen.checkpoint.files import MOST_LAYERS, CheckpointError, Json, checkpoint_folder, holds, read_json
from jaxgen.checkpoint.folder import listed, read_configs, read_tensors
from jaxgen.checkpoint.safetensors_file import DTYPES, STORED, StoredTensor, Tensor
from jaxgen.models import FAMILIES, LoadedModel
from jaxgen.models.family import Config, Family

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

MANIFEST = "jaxgen.json"
NATIVE_FORMAT = 2
# A part of an array: a slice for each of its axes.
Part = tuple[slice, ...]
# Name parts that wrappers add to tensor names -> the wrapper, and how to save the model itself.
_WRAPPERS = {
    "_orig_mod": "torch.compile (`model._orig_mod.save_pretrained(...)`)",
    "module": "DistributedDataParallel or DeepSpeed (`model.module.save_pretrained(...)`)",
    "_fsdp_wrapped_module": "FSDP (gather the full state dict, and pass it to `save_pretrained`)",
    "_checkpoint_wrapped_module": "activation checkpointing (save the model without it)",
    "_forward_module": "Lightning (`model.module.save_pretrained(...)`)",
    "base_model": "peft (`model.merge_and_unload().save_pretrained(...)`)",
}


def abstract_model(
    family: Family, config: Config, generation_config: "GenerationConfig", mesh: Mesh | None
) -> LoadedModel:
    return nnx.eval_shape(lambda: family.build(config, _OneKey(), generation_config, mesh))


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are all accounted for; only their values are not read yet.

    Attributes:
        folder: the folder or GGUF file that was opened.
        raw: the content of config.json.
        family: the model's family.
        abstract: the model with shapes in place of weights.
        pieces: parameter path -> the tensors that are stacked along the first axis to make it.
        buffers: tensors whose values follow from the config, by name; not loaded.
        copies: name of a tensor -> name of the tensor that holds the same values.
        native: whether the folder was converted.
        warnings: messages for the user.
    """

    folder: Path
    raw: Json
    family: Family
    abstract: LoadedModel
    pieces: Mapping[str, list[Tensor]]
    buffers: Mapping[str, Tensor]
    copies: Mapping[str, str]
    native: bool
    warnings: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        """The default dtype of `load`: float32 instead of float64, which JAX supports only in x64 mode."""
        if self.is_float64:
            return np.dtype(np.float32)
        named = self.raw.get("dtype") or self.raw.get("torch_dtype")
        try:
            return weights_dtype(named) if named else self.own_dtype(self.family.embedding)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error} Or pass `dtype` to `load`.") from error

    @property
    def is_float64(self) -> bool:
        named = self.raw.get("dtype") or self.raw.get("torch_dtype")
        return str(named or self.own_dtype(self.family.embedding)) == "float64"

    def own_dtype(self, path: str) -> np.dtype:
        """The dtype that can hold all tensors of a parameter without loss."""
        return functools.reduce(jnp.promote_types, [tensor.dtype for tensor in self.pieces[path]])

    def parameters(self, dtype: np.dtype, parts: list[list[Part]]) -> Iterator[np.ndarray]:
        """The values, one parameter at a time in the order of the model's leaves.

        Args:
            dtype: of the model.
            parts: for each parameter what is read of it; the rest of its array is undefined.
        """
        leaves, spread = named_leaves(self.abstract), shardings(self.family, self.abstract)
        for (path, leaf), sharding, of_parameter in zip(leaves, spread, parts, strict=True):
            # Only what is written takes memory.
            array = np.empty(leaf.shape, self.family.dtype_of(path, dtype))
            for part in of_parameter:
                self._read_part(path, sharding, array, part)
            yield array

    def _read_part(self, path: str, sharding: NamedSharding | None, array: np.ndarray, part: Part) -> None:
        """Reads a part of a parameter into its place in the whole array."""
        wanted, *columns = part
        tensors = self.sources[path]
        sources = {name: tensor.rows for name, tensor in tensors.items()}
        for tensor, slices in zip(tensors.values(), row_slices(sources, sharding), strict=True):
            if columns and (columns[0].stop - columns[0].start < array.shape[1]):
                tensor = tensor.of_columns(columns[0])
            start = 0  # of the slice, in the tensor
            for rows in slices:
                first, last = max(rows.start, wanted.start), min(rows.stop, wanted.stop)
                if first < last:
                    tensor.read_into(array[(slice(first, last), *columns)], start + first - rows.start)
                start += rows.stop - rows.start

    @functools.cached_property
    def sources(self) -> dict[str, dict[str, Tensor]]:
        """Parameter path -> the tensors of a Hugging Face folder that it is made of, by their names."""
        table: dict[str, dict[str, Tensor]] = {}
        for path, parts in self.family.weight_map(self.abstract.config).items():
            pieces = self.pieces[path]
            if len(pieces) != len(parts):  # in a converted folder they are rows of one tensor, one after the other
                stored, stops = cast(StoredTensor, pieces[0]), itertools.accumulate(parts.values())
                pieces = [
                    stored.part(name, stop - rows, rows)
                    for (name, rows), stop in zip(parts.items(), stops, strict=True)
                ]
            table[path] = {name: replace(tensor, name=name) for name, tensor in zip(parts, pieces, strict=True)}
        return table


def shardings(family: Family, model: LoadedModel) -> list[NamedSharding | None]:
    """The sharding of each parameter, in the order of the model's leaves; None without a mesh.

    Raises:
        ValueError: see `load`.
    """
    paths = [path for path, _ in named_leaves(model)]
    if model.mesh is None:
        return [None] * len(paths)
    spec = family.partition(model.config, model.mesh)
    return [NamedSharding(model.mesh, spec(path)) for path in paths]


def open_checkpoint(path: str | Path, mesh: Mesh | None = None, follow_links: bool = False) -> Source:
    """Reads the configs and headers of a checkpoint, and accounts for every tensor and parameter.

    Args:
        path, mesh, follow_links: see `load`.

    Raises:
        CheckpointError: see `load`.
    """
    folder = checkpoint_folder(path, follow_links)
    if gguf_file.is_gguf(folder):
        return _account(folder, *gguf_file.read(folder), native=False, mesh=mesh)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Pass the one that holds config.json; nothing is downloaded.")
    if holds(folder, "adapter_config.json"):
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a model. Merge it into its base model: `jaxgen convert BASE DST "
            f"--merge-lora {folder}`."
        )
    raw, generation = read_configs(folder)
    native = holds(folder, MANIFEST)
    if native and (version := read_json(folder, MANIFEST).get("format")) != NATIVE_FORMAT:
        raise CheckpointError(
            f"{folder} is a converted folder of format {version!r}, but this jaxgen reads {NATIVE_FORMAT}. Convert the "
            "original again."
        )
    return _account(folder, raw, generation, read_tensors(folder), native, mesh)


def _account(
    folder: Path,
    raw: Json,
    generation: Json | None,
    tensors: Mapping[str, Tensor],
    native: bool,
    mesh: Mesh | None,
) -> Source:
    """Assigns every tensor to a parameter, and checks that every parameter is filled.

    Args:
        folder: the folder or GGUF file, for messages.
        raw: the content of config.json.
        generation: the content of generation_config.json, if there is one.
        tensors: the checkpoint's tensors by name.
        native: whether tensors are named by parameter paths, as in a converted folder.
        mesh: see `load`.

    Raises:
        CheckpointError: see `load`.
    """
    _check_layers(folder, raw, len(tensors))
    unquantised = {key: value for key, value in raw.items() if key not in float8.KEYS}
    try:
        family, config, generation_config = parse_config(unquantised, generation)
        _check_numbers(config)
        # Buffers follow from the config, so the model has no parameters for them.
        buffers = {name: tensor for name, tensor in tensors.items() if name.endswith(tuple(family.buffers))}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
        untied = family.weight_map(replace(config, tie_word_embeddings=False))
        head, embedding = (path if native else next(iter(untied[path])) for path in (family.head, family.embedding))
        # Names get their prefix below, but the dtype is needed before that.
        stored = tensors.get(embedding, tensors.get(embedding.removeprefix(family.prefix)))
        tensors = float8.dequantised(tensors, raw, None if stored is None else stored.dtype)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    _check_dtypes(folder, tensors)
    aliases: dict[str, str] = {}
    if not native:
        known = {name for sources in untied.values() for name in sources}
        tensors, aliases = _resolve_aliases(folder, family, _with_names_of(known, family.prefix, tensors))
    config, copies = _resolve_head(folder, raw, family, config, tensors, head, embedding)
    # The weight map depends on whether there is a head, and the shapes on the vocabulary. So both are resolved first.
    config, resized = _resolve_vocabulary(config, tensors, head, embedding)
    config = replace(config, **{flag: name in tensors for name, flag in family.optional.items()})
    weight_map = family.weight_map(config)
    if native:
        weight_map = {path: _native_names(path, sources, tensors) for path, sources in weight_map.items()}
    # A tied head that is stored too was compared with the embedding, and is not loaded.
    copies |= aliases
    used = {name: tensor for name, tensor in tensors.items() if name not in copies}
    _match_names(folder, weight_map, used)
    model = abstract_model(family, config, generation_config, mesh)
    _match_shapes(folder, {name: leaf.shape for name, leaf in named_leaves(model)}, weight_map, used)
    pieces = {path: [tensors[name] for name in sources] for path, sources in weight_map.items()}
    source = Source(folder, raw, family, model, pieces, buffers, copies, native, ())
    messages = [*resized, *unread_message(family, unquantised), *_ignored_keys(raw)]
    messages += [*_wrong_buffers(family, config, buffers), *_float64_message(source)]
    return replace(source, warnings=tuple(f"{folder}: {message}" for message in messages))


def _check_dtypes(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a dtype that cannot be read."""
    if unreadable := sorted({str(t.dtype) for t in tensors.values()} - set(map(str, STORED.values()))):
        raise CheckpointError(f"{folder} holds tensors of dtype {unreadable}; jaxgen reads {list(STORED)}.")


def _check_layers(folder: Path, raw: Json, tensors: int) -> None:
    """Raises CheckpointError for an impossible number of layers, before the names of their tensors are listed."""
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        layers = raw.get(key)
        if isinstance(layers, int) and layers > min(tensors, MOST_LAYERS):
            raise CheckpointError(
                f"{folder} holds {tensors} tensors, but its config.json has `{key}`={layers}. Each layer needs tensors "
                f"of its own, and the limit is {MOST_LAYERS} layers. Download it again."
            )


def parse_config(raw: Json, generation: Json | None) -> tuple[Family, Config, "GenerationConfig"]:
    """The family, its config, and the generation config, from the parsed JSON files."""
    generation_class = lazy.transformers().GenerationConfig
    if str(raw.get("model_type")) not in FAMILIES:
        code = " Code that comes with a checkpoint (`auto_map`) is never run." if raw.get("auto_map") else ""
        raise ValueError(
            f"`model_type`={raw.get('model_type')!r} is not supported; it may be one of {list(FAMILIES)}.{code}"
        )
    family = FAMILIES[raw["model_type"]]
    config = family.config(raw, _generation_fields())
    try:
        if generation is not None:
            return family, config, generation_class.from_dict(dict(generation))
        return family, config, generation_class.from_model_config(dict(raw))
    except Exception as error:  # transformers raises many kinds for values of the wrong type
        name = "config.json" if generation is None else "generation_config.json"
        raise ValueError(f"transformers cannot read the generation config in {name} ({error!r}).") from error


def _generation_fields() -> frozenset[str]:
    return frozenset(lazy.transformers().GenerationConfig().to_dict())


def unread_message(family: Family, raw: Json) -> Iterator[str]:
    if keys := family.unread_keys(raw, _generation_fields()):
        yield (
            f"config.json has {listed(keys, most=40)}. Neither transformers nor jaxgen reads these keys in a "
            f"{raw['model_type']}: the model is the same without them."
        )


def _check_numbers(config: Config) -> None:
    """Raises ValueError for an integer that overflows int32, or a float that is not finite."""
    for field in fields(config):
        value = getattr(config, field.name)
        if (type(value) is int and value >= 1 << 31) or (type(value) is float and not math.isfinite(value)):
            raise ValueError(
                f"`{field.name}`={value!r} in config.json must be finite, and below 2**31 if it is an integer."
            )


def _with_names_of(known: set[str], prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors to the names of a model with a head, which are in `known`.

    A model that was saved without its head lacks the prefix. Same as transformers 5.23 `rename_source_key`, for each
    name by itself.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        others = (name.removeprefix(prefix), prefix + name)
        new = name if name in known else next((other for other in others if other in known), name)
        # Two tensors with one new name: the second keeps its own, and is later refused as unused.
        if new != name and new not in tensors and new not in renamed:
            name, tensor = new, replace(tensor, name=new)
        renamed[name] = tensor
    return renamed


def _resolve_aliases(
    folder: Path, family: Family, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, of which one may have had another name, and {alias: tensor} of those that are there twice."""
    resolved, aliases = dict(tensors), {}
    for alias, name in family.aliases.items():
        if alias not in resolved:
            continue
        if name not in resolved:
            resolved[name] = replace(resolved.pop(alias), name=name)
        elif same_bytes(resolved[alias], resolved[name]):
            aliases[alias] = name
        else:
            raise CheckpointError(f"{folder}: `{alias}` differs from `{name}`, which it should equal.")
    return resolved, aliases


def _resolve_head(
    folder: Path,
    raw: Json,
    family: Family,
    config: Config,
    tensors: Mapping[str, Tensor],
    head: str,
    embedding: str,
) -> tuple[Config, dict[str, str]]:
    """Ties a missing head to the embedding, whatever the config says. If a tied head is stored, it must be equal.

    Returns:
        The config with the right flag, and {head: embedding} if the checkpoint stores both of a tied pair.
    """
    if head not in tensors:
        if not config.tie_word_embeddings and any(
            str(name).endswith("Model") for name in raw.get("architectures") or []
        ):
            raise CheckpointError(
                f"{folder} holds a model without a head (`architectures`={raw['architectures']!r}, no `{head}`). Save "
                "the model with its language modelling head."
            )
        return replace(config, tie_word_embeddings=True), {}
    if not config.tie_word_embeddings or embedding not in tensors:
        return config, {}
    if not same_bytes(tensors[head], tensors[embedding]):
        if family.head_may_differ:
            return replace(config, tie_word_embeddings=False), {}
        raise CheckpointError(
            f"{folder}: config.json has `tie_word_embeddings`=true, but `{head}` differs from `{embedding}`. Set the "
            "flag to false if the checkpoint has a head of its own."
        )
    return config, {head: embedding}


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(
        np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))
        for one, other in zip(first.blocks(), second.blocks(), strict=True)
    )


def _resolve_vocabulary(
    config: Config, tensors: Mapping[str, Tensor], head: str, embedding: str
) -> tuple[Config, tuple[str, ...]]:
    """Takes the vocabulary size from the embedding: configs often do not count added tokens and padding rows."""
    shapes = {tensors[name].shape for name in (head, embedding) if name in tensors}
    # Where the two differ or are not [V, D], `_match_shapes` reports it.
    if embedding not in tensors or len(shapes) != 1 or (shape := shapes.pop())[1:] != (config.hidden_size,):
        return config, ()
    if shape[0] in (config.vocab_size, 0):
        return config, ()
    message = f"the embedding has {shape[0]} rows, but config.json says `vocab_size`={config.vocab_size}."
    return replace(config, vocab_size=shape[0]), (message,)


def _float64_message(source: Source) -> Iterator[str]:
    if source.is_float64:
        yield "its weights are float64. They are held as float32, unless `dtype` says otherwise."


def _ignored_keys(raw: Json) -> Iterator[str]:
    if raw.get("auto_map"):
        yield "config.json has `auto_map`: code that comes with a checkpoint is never run."
    if raw.get("pretraining_tp") not in (None, 1):
        yield f"`pretraining_tp`={raw['pretraining_tp']!r} in config.json is ignored, as by transformers 5."


def _wrong_buffers(family: Family, config: Config, buffers: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in buffers.items():
        values = next(values for end, values in family.buffers.items() if name.endswith(end))
        if values is not None:
            expected = values(config)
            # Stored in another float dtype, a value differs by rounding.
            matches = tensor.dtype in DTYPES.values() and tensor.shape == expected.shape
            if matches:
                stored = np.concatenate([block.astype(np.float32) for block in tensor.blocks()])
                matches = np.allclose(stored, expected, rtol=4 * float(jnp.finfo(tensor.dtype).eps), atol=0)
            if not matches:
                yield f"`{name}` differs from the values that config.json implies, and is ignored."


def _native_names(path: str, sources: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """{name: rows} of the tensors that a converted folder stores for the parameter `path`.

    Usually that is one tensor, named `path`. If the source tensors had different dtypes, they are stored separately, as
    `path.0`, `path.1` and so on.
    """
    if path in tensors or len(sources) == 1:
        return {path: sum(sources.values())}
    return {f"{path}.{number}": rows for number, rows in enumerate(sources.values())}


class _OneKey:
    """Gives the same key to every parameter, in place of `nnx.Rngs`, where a model is built only for its shapes.

    The counters that `nnx.Rngs` keeps would take most of the time of building it.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def _match_names(folder: Path, weight_map: Mapping[str, Mapping[str, int]], tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless every tensor is used, and every parameter filled, exactly once."""
    names = [name for sources in weight_map.values() for name in sources]
    for name in sorted(set(tensors) - set(names)):
        if wrapper := next((part for part in name.split(".") if part in _WRAPPERS), None):
            raise CheckpointError(
                f"{folder} holds `{name:.100}`, where `{wrapper}.` comes from {_WRAPPERS[wrapper]}. Save the model "
                f"itself, or remove `{wrapper}.` from the names in every file and the index."
            )
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"{folder} lacks {listed(missing)}. The checkpoint is incomplete; download it again.")
    if unknown := sorted(set(tensors) - set(names)):
        raise CheckpointError(f"{folder} holds {listed(unknown)}, which the model in its config.json does not use.")


def _match_shapes(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    weight_map: Mapping[str, Mapping[str, int]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raises CheckpointError unless every tensor has the shape of its part of the parameter."""
    for path, sources in weight_map.items():
        for name, rows in sources.items():
            expected = (rows, *shapes[path][1:])
            if tensors[name].shape != expected:
                raise CheckpointError(
                    f"{folder}: `{name}` has shape {tensors[name].shape}, but its config.json implies {expected}."
                )


def named_leaves(model: object) -> Iterator[tuple[str, Any]]:
    """Pairs of a path, such as "layers.0.self_attn.qkv_proj.weight", and an array, in the order of the leaves."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        keys = (str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", None)))) for key in path)
        yield ".".join(keys).removesuffix(".value"), leaf


def row_slices(sources: Mapping[str, int], sharding: NamedSharding | None) -> Iterator[list[slice]]:
    """For each source, {tensor: rows}, the rows of the parameter that it fills: one slice for each shard.

    If the rows are sharded, every device has its share of each source, so that it multiplies whole heads or units.
    Queries of 4 rows, keys of 2 and values of 2, not sharded and over 2 devices:

        q q q q k k v v        q q k v | q q k v
    """
    shards = 1
    if sharding is not None and rows_are_sharded(sharding) and len(sources) > 1:
        shards = tensor_shards(sharding.mesh)
    shard_rows = sum(sources.values()) // shards
    start = 0  # of the source within a shard
    for rows in sources.values():
        stop = start + rows // shards
        yield [slice(shard * shard_rows + start, shard * shard_rows + stop) for shard in range(shards)]
        start = stop


def rows_are_sharded(sharding: NamedSharding) -> bool:
    return sharding.spec[:1] == ("tensor",)


def local_parts(shape: tuple[int, ...], sharding: NamedSharding | None) -> list[Part]:
    """The parts of an array that devices of this process hold, joined where they touch; all of it without a sharding.

    Only one axis of an array is sharded, so each axis can be looked at by itself.
    """
    if sharding is None:
        return [tuple(slice(0, size) for size in shape)]
    indices = sharding.addressable_devices_indices_map(shape).values()
    axes = [_joined(slices, size) for slices, size in zip(zip(*indices, strict=True), shape, strict=True)]
    return list(itertools.product(*axes))


def _joined(slices: Iterable[slice], size: int) -> list[slice]:
    """Equal or disjoint slices of an axis, in order and without those that begin where another ends."""
    joined: list[slice] = []
    for start, stop in sorted({each.indices(size)[:2] for each in slices}):
        if joined and joined[-1].stop == start:
            start = joined.pop().start
        joined.append(slice(start, stop))
    return joined


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The mesh with `Auto` axes, so that XLA chooses the shardings of activations."""
    if not mesh.axis_names or {*mesh.axis_names} - {"data", "tensor"}:
        raise ValueError(
            f"`mesh` has the axes {mesh.axis_names}, but must have 'data', 'tensor' or both, and no others. Rename its "
            "axes."
        )
    if not mesh.local_devices:
        raise ValueError(
            f"`mesh` has none of the devices of process {jax.process_index()}, {jax.local_devices()}. Only processes "
            "with a device on the mesh may use it."
        )
    return Mesh(mesh.devices, mesh.axis_names)


def weights_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    try:
        return next(known for known in DTYPES.values() if known == jnp.dtype(dtype))
    except (TypeError, StopIteration) as error:
        names = [str(known) for known in DTYPES.values()]
        raise ValueError(f"`dtype`={dtype!r} is not supported; it may be one of {names}.") from error
