"""Pickled checkpoints: `pytorch_model.bin` and Meta's `consolidated.*.pth`.

A pickle can run code when it is read. So pickles are only read on request, with torch's restricted loader
(`weights_only`), in a separate process. That process writes the tensors as safetensors, in Hugging Face's names and
layout, to a folder that is then converted like any other.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from jaxgen.checkpoint.files import CheckpointError, Json, LinkedFolder, checkpoint_folder, file_in, holds, read_json
from jaxgen.checkpoint.folder import INDEX, SINGLE_FILE

if TYPE_CHECKING:
    from torch import Tensor

_BIN, _BIN_INDEX, _META = "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"


@contextlib.contextmanager
def unpickled(folder: Path, target: Path) -> Iterator[Path]:
    """A temporary folder of safetensors with the tensors of a folder of pickles; other folders are yielded unchanged.

    Args:
        folder: the checkpoint.
        target: the destination of the conversion; the temporary folder is next to it.

    Raises:
        CheckpointError: if torch is missing or too old, or refuses the pickle.
    """
    if holds(folder, INDEX) or holds(folder, SINGLE_FILE) or not _pickles(folder):
        yield folder
        return
    warnings.warn(
        f"{folder} is read from pickles. torch's restricted loader runs only known code, but safetensors cannot run "
        "any code. Prefer them where they exist.",
        stacklevel=4,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.unpickled-", dir=target.parent) as name:
        staged = Path(name)
        # -P keeps the working directory off the import path, since it may be the checkpoint's folder.
        command = [sys.executable, "-P", "-m", __name__, str(folder.resolve()), str(staged.resolve())]
        command += ["--follow-links"] if isinstance(folder, LinkedFolder) else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1:] or [f"the process ended with {result.returncode}"]
            raise CheckpointError(f"{folder} cannot be read: {reason[0]}")
        yield staged


def _pickles(folder: Path) -> list[Path]:
    """The pickles to read: transformers' files if there are any, else Meta's, in their order."""
    if holds(folder, _BIN_INDEX):
        names = read_json(folder, _BIN_INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{folder / _BIN_INDEX} has no `weight_map` from tensors to files.")
        return [file_in(folder, name) for name in sorted(set(names.values()))]
    if holds(folder, _BIN):
        return [file_in(folder, _BIN)]
    parts = []
    while holds(folder, name := f"consolidated.{len(parts):02}.pth"):
        parts.append(file_in(folder, name))
    return parts


def _unpickle(folder: Path, staged: Path) -> None:
    """Writes the folder of safetensors, one tensor at a time. Runs in the separate process."""
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise CheckpointError("reading pickles needs torch 2.6 or newer. Install it, or convert elsewhere.") from error
    if Version(torch.__version__).release < (2, 6):
        raise CheckpointError(f"torch {torch.__version__} has a loader that pickles can escape. Install 2.6 or newer.")
    pickles = _pickles(folder)
    parts = [_load(path) for path in pickles]
    if pickles[0].name == _META:
        tensors = _from_meta(parts, read_json(folder, "params.json"))
    else:
        tensors = {name: partial(_itself, tensor) for part in parts for name, tensor in part.items()}
        if len(tensors) < sum(map(len, parts)):
            raise CheckpointError("two of its files hold a tensor of the same name.")
    index = {}
    for number, (name, make) in enumerate(sorted(tensors.items())):
        # A file and a copy for each: safetensors refuses tensors that share memory, such as a tied head.
        index[name] = f"tensor-{number:05}.safetensors"
        save_file({name: make().contiguous().clone()}, staged / index[name])
    (staged / INDEX).write_text(json.dumps({"weight_map": index}))
    for name in ("config.json", "generation_config.json"):
        if holds(folder, name):
            shutil.copyfile(file_in(folder, name), staged / name)
    if not holds(folder, "config.json"):
        config = _meta_config(read_json(folder, "params.json"), {name: make().shape for name, make in tensors.items()})
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _itself(tensor: "Tensor") -> "Tensor":
    return tensor


def _load(path: Path) -> "dict[str, Tensor]":
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [""]
        raise CheckpointError(
            f"torch's restricted loader refuses {path} ({type(error).__name__}: {first[0]})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors. Save the `state_dict()` of the model.")
    return content


# Meta's names, Hugging Face's, and the axis that tensor parallelism splits; None if each file has the whole tensor.
_META_TENSORS = {
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}


def _from_meta(parts: "list[dict[str, Tensor]]", params: Json) -> "dict[str, Callable[[], Tensor]]":
    """For each tensor, under its Hugging Face name, a function that joins it from the files of Meta's checkpoint.

    Meta splits most tensors over its files, one per device of tensor parallelism.
    """
    names = set(parts[0]) - {"rope.freqs"}
    if any(set(part) - {"rope.freqs"} != names for part in parts):
        raise CheckpointError("its files hold tensors of different names.")
    heads = {"attention.wq": params["n_heads"], "attention.wk": params.get("n_kv_heads") or params["n_heads"]}
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        pieces = [part[name] for part in parts]
        prefix, module = "", name.removesuffix(".weight")
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            prefix = f"model.layers.{number}."
        if module == "tok_embeddings":
            # [V, D], split along V since Llama 3 and along D before.
            target, axis = "model.embed_tokens", 0 if pieces[0].shape[1] == params["dim"] else 1
        elif module in _META_TENSORS:
            target, axis = _META_TENSORS[module]
        else:
            raise CheckpointError(f"`{name}` is not a tensor of a Llama.")
        tensors[f"{prefix}{target}.weight"] = partial(_joined, pieces, axis, heads.get(module))
    return tensors


def _joined(pieces: "list[Tensor]", axis: int | None, heads: int | None) -> "Tensor":
    """The concatenated shards; with heads, the rows of each head are reordered for Hugging Face's rope.

    Meta rotates neighbouring rows, Hugging Face rows of the two halves of a head. For a head of 6 rows:

        0 1 2 3 4 5    pairs (0, 1) (2, 3) (4, 5)    ->    0 2 4 1 3 5
    """
    import torch

    whole = pieces[0] if axis is None else torch.cat(pieces, dim=axis)
    if heads is None:
        return whole
    rows, columns = whole.shape
    return whole.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _meta_config(params: Json, shapes: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """A config.json. Values that params.json lacks are taken from Meta's models of the same sizes."""
    rows, _ = shapes["model.embed_tokens.weight"]
    llama3 = rows >= 128_000
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "hidden_size": params["dim"],
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "max_position_embeddings": 8192 if llama3 else 4096,
        "bos_token_id": 128000 if llama3 else 1,
        "eos_token_id": [128001, 128008, 128009] if llama3 else 2,
    }
    if params.get("use_scaled_rope"):
        small = params["n_layers"] in (16, 28)  # Llama 3.2 with 1B and 3B parameters
        config["max_position_embeddings"] = 131_072
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor") or (32.0 if small else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


if __name__ == "__main__":
    try:
        _unpickle(checkpoint_folder(sys.argv[1], "--follow-links" in sys.argv[3:]), Path(sys.argv[2]))
    except (CheckpointError, OSError, KeyError) as error:
        raise SystemExit(f"{error}" if isinstance(error, CheckpointError) else repr(error)) from None
