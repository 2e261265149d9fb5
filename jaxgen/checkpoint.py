"""Reading and writing checkpoints: a Hugging Face folder, or the native folder that `convert` makes.

Loading goes in two passes. The first reads names and shapes only and accounts for everything: each tensor is used once,
each parameter is filled once, every shape fits - or nothing is loaded. The second reads one parameter at a time, its
tensors straight into their rows, so the host holds one parameter beside the model.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxgen import lazy, safetensors_file
from jaxgen.models import FAMILIES, Family
from jaxgen.safetensors_file import DTYPES, CheckpointError, Tensor

MANIFEST = "jaxgen.json"
NATIVE_FORMAT = 1
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BUNDLED_MODEL = Path(__file__).parent / "stories"

# Buffers that old checkpoints hold and that the config determines.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", "rope.freqs")


def load(path: str | Path, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """Loads a model from a Hugging Face folder (config.json and safetensors) or a folder written by `convert`.

    Args:
        path: the folder. Nothing is downloaded.
        dtype: what to hold the weights in: float32, bfloat16 or float16. By default, and with "auto", the config's
            dtype, else that of the embedding.

    Returns:
        The model, on JAX's default device, with `config` and `generation_config`.

    Raises:
        CheckpointError: one sentence about what is missing, broken or unknown. Nothing is loaded then.
    """
    source = open_folder(path)
    target = source.dtype if dtype in (None, "auto") else _dtype(dtype)
    leaves, treedef = jax.tree.flatten(source.abstract)
    total = sum(leaf.size for leaf in leaves) * target.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", delay=2) as bar:
        arrays = []
        for array in source.parameters(target):
            arrays.append(jax.device_put(array))
            bar.update(array.nbytes)
    return jax.tree.unflatten(treedef, arrays)


def from_config(config: Any, key: jax.Array | int = 0, dtype: jax.typing.DTypeLike = "float32") -> Any:
    """A model with random weights, normal with the config's `initializer_range`.

    Args:
        config: the content of a config.json, or a `transformers.LlamaConfig`.
        key: a `jax.random` key or a seed.
        dtype: what to hold the weights in: float32, bfloat16 or float16.
    """
    raw = config if isinstance(config, Mapping) else config.to_dict()
    family, parsed, generation_config = _parse_config(raw, None)
    model = _random_model(family, parsed, _dtype(dtype), jax.random.key(key) if isinstance(key, int) else key)
    model.generation_config = generation_config
    return model


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_model(family: Family, config: Any, dtype: np.dtype, key: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), family.build(config, nnx.Rngs(key)))


def save(model: Any, path: str | Path) -> None:
    """Writes a Hugging Face folder: config.json, generation_config.json and model.safetensors.

    Args:
        path: the folder, made if needed; files of these names in it are replaced.

    Raises:
        ValueError: if the folder holds a checkpoint of another layout, whose files would win over the new ones.
    """
    folder = Path(path)
    if taken := [name for name in (INDEX, MANIFEST) if (folder / name).exists()]:
        raise ValueError(f"{folder} holds a checkpoint of another layout ({taken}). Choose an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_json(), "dtype": str(model.dtype)}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = getattr(model.generation_config, key)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Not `save_pretrained`, which refuses what many checkpoints hold: sampling fields without `do_sample`.
    model.generation_config.to_json_file(folder / "generation_config.json")
    parameters = dict(named_leaves(model))
    pieces = {
        name: (path, start, rows)
        for path, sources in FAMILIES[config["model_type"]].weight_map(model.config).items()
        for name, start, rows in _stack(sources)
    }
    header = {
        name: (np.dtype(parameters[path].dtype), (rows, *parameters[path].shape[1:]))
        for name, (path, _, rows) in pieces.items()
    }
    arrays = (jax.device_get(parameters[path])[start : start + rows] for path, start, rows in pieces.values())
    safetensors_file.write(folder / SINGLE_FILE, header, arrays)


@dataclass(frozen=True)
class Source:
    """An accounted-for checkpoint folder: everything about it is known but the values.

    Attributes:
        raw: its config.json.
        abstract: the model with shapes in place of weights.
        pieces: parameter path -> the tensors that make it, stacked along the first axis.
    """

    folder: Path
    raw: Mapping[str, Any]
    abstract: Any
    pieces: Mapping[str, list[Tensor]]

    @property
    def dtype(self) -> np.dtype:
        """What `load` holds the weights in by default."""
        named = self.raw.get("dtype") or self.raw.get("torch_dtype")
        try:
            return _dtype(named) if named else self.own_dtype("embed_tokens.weight")
        except ValueError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error} Or pass another to `load`.") from error

    def own_dtype(self, path: str) -> np.dtype:
        """The dtype that holds all tensors of a parameter without loss."""
        dtypes = [DTYPES[tensor.dtype] for tensor in self.pieces[path]]
        return functools.reduce(jnp.promote_types, dtypes)

    def parameters(self, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The values, one parameter at a time in the order of the model's leaves, in one dtype or each in its own."""
        for path, leaf in named_leaves(self.abstract):
            array = np.empty(leaf.shape, dtype or self.own_dtype(path))
            row = 0
            for tensor in self.pieces[path]:
                tensor.read_into(array[row : row + tensor.shape[0]])
                row += tensor.shape[0]
            yield array


def open_folder(path: str | Path) -> Source:
    """Reads what a folder holds, without its values, and accounts for every tensor and parameter.

    Raises:
        CheckpointError: see `load`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Pass the one that holds config.json; nothing is downloaded.")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, which would be left out. Merge it into its base model first."
        )
    raw = _read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    try:
        family, config, generation_config = _parse_config(
            raw, _read_json(generation_file) if generation_file.exists() else None
        )
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    tensors = {name: t for name, t in _tensors(folder).items() if not name.endswith(_IGNORED_SUFFIXES)}
    if unreadable := sorted({t.dtype for t in tensors.values()} - set(DTYPES)):
        raise CheckpointError(f"{folder} holds tensors of dtype {unreadable}; jaxgen reads {list(DTYPES)}.")
    native = (folder / MANIFEST).exists()
    if native and (version := _read_json(folder / MANIFEST).get("format")) != NATIVE_FORMAT:
        raise CheckpointError(
            f"{folder} is a converted folder of format {version!r}, and this jaxgen reads {NATIVE_FORMAT}. Convert the "
            "original again."
        )
    config = _resolve_head(folder, config, tensors, native)
    abstract = nnx.eval_shape(lambda: family.build(config, nnx.Rngs(0), generation_config))
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract)}
    wanted = {path: {path: shape[0]} for path, shape in shapes.items()} if native else family.weight_map(config)
    _account(folder, shapes, wanted, tensors)
    pieces = {path: [tensors[name] for name in sources] for path, sources in wanted.items()}
    return Source(folder, raw, abstract, pieces)


def _parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[Family, Any, Any]:
    """The family, its config, and the `transformers.GenerationConfig`, from the parsed JSON files."""
    generation_class = lazy.transformers().GenerationConfig
    if str(raw.get("model_type")) not in FAMILIES:
        raise ValueError(f"`model_type`={raw.get('model_type')!r} is not supported; it may be one of {list(FAMILIES)}.")
    family = FAMILIES[raw["model_type"]]
    config = family.config(raw, frozenset(generation_class().to_dict()))
    if generation is not None:
        return family, config, generation_class.from_dict(dict(generation))
    return family, config, generation_class.from_model_config(dict(raw))


def _resolve_head(folder: Path, config: Any, tensors: dict[str, Tensor], native: bool) -> Any:
    """A missing head is the embedding's, whatever the config says; a head beside a tied flag must equal it."""
    head, embedding = ("lm_head.weight", "embed_tokens.weight" if native else "model.embed_tokens.weight")
    if head not in tensors:
        return replace(config, tie_word_embeddings=True)
    if not config.tie_word_embeddings or embedding not in tensors:
        return config
    if not _equal(tensors.pop(head), tensors[embedding]):
        raise CheckpointError(
            f"{folder}: config.json has `tie_word_embeddings`=true, but `{head}` differs from `{embedding}`. Set the "
            "flag to false if the checkpoint has a head of its own."
        )
    return config


def _equal(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(one == other for one, other in zip(first.chunks(), second.chunks(), strict=True))


def _account(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Mapping[str, int]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Every tensor is used exactly once, every parameter filled exactly once, every shape fits."""
    names = [name for sources in wanted.values() for name in sources]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"{folder} lacks {_listed(missing)}. The checkpoint is incomplete; download it again.")
    if unknown := sorted(set(tensors) - set(names)):
        raise CheckpointError(f"{folder} holds {_listed(unknown)}, which the model of its config.json has no use for.")
    for path, sources in wanted.items():
        for name, rows in sources.items():
            expected = (rows, *shapes[path][1:])
            if tensors[name].shape != expected:
                raise CheckpointError(
                    f"{folder}: `{name}` has shape {tensors[name].shape}, but its config.json asks for {expected}."
                )


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. The index is authoritative; a stray file beside it is never read."""
    index_file = folder / INDEX
    if not index_file.exists():
        if not (folder / SINGLE_FILE).exists():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".safetensors", ".gguf"))
            raise CheckpointError(
                f"{folder} has neither {INDEX} nor {SINGLE_FILE}"
                + (f"; jaxgen does not read {others}. Save the model as safetensors." if others else ".")
            )
        return safetensors_file.read_header(folder / SINGLE_FILE)
    index = _read_json(index_file).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{index_file} has no `weight_map` from tensors to files. Download it again.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        if Path(file).name != file or file in ("", "..") or "\\" in file or not file.isprintable() or len(file) > 255:
            raise CheckpointError(f"{index_file} names {file!r}, which is not a plain file name in its folder.")
        found = safetensors_file.read_header(folder / file)
        listed = {name for name, owner in index.items() if owner == file}
        if difference := sorted(listed ^ set(found)):
            raise CheckpointError(f"{INDEX} and {folder / file} disagree about {_listed(difference)}.")
        tensors |= found
    return tensors


def named_leaves(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameter paths such as "layers.0.self_attn.qkv_proj.weight", in the order of the model's leaves."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        keys = (str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", None)))) for key in path)
        yield ".".join(keys).removesuffix(".value"), leaf


def _stack(sources: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Each source with its first row and its number of rows."""
    start = 0
    for name, rows in sources.items():
        yield name, start, rows
        start += rows


def _dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    try:
        return next(known for known in DTYPES.values() if known == jnp.dtype(dtype))
    except (TypeError, StopIteration) as error:
        names = [str(known) for known in DTYPES.values()]
        raise ValueError(f"`dtype`={dtype!r} is not supported; it may be one of {names}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Pass the folder that holds it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download it again.")
    return content


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
