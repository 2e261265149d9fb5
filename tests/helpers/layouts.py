"""The ways in which the weights of one model lie in folders of the Hugging Face kind."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import CONFIG, Tensors, random_tensors, write_checkpoint, write_json, write_safetensors

F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16
TIED = CONFIG | {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FREQUENCIES = (1 / 10000 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)


def random_bits(dtype: Any) -> Tensors:
    """Tensors of every bit pattern: NaN payloads, infinities, subnormals and negative zeros."""
    rng = np.random.default_rng(0)
    return {
        name: np.frombuffer(rng.bytes(tensor.size * np.dtype(dtype).itemsize), dtype).reshape(tensor.shape)
        for name, tensor in random_tensors().items()
    }


def mixed(dtypes: list[Any]) -> Tensors:
    return {name: array.astype(dtypes[i % len(dtypes)]) for i, (name, array) in enumerate(random_tensors().items())}


def of_config(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_checkpoint(folder, CONFIG | changes)


def of_tensors(tensors: Tensors, config: dict[str, Any] = CONFIG, shards: int = 1) -> Callable[[Path], Path]:
    return lambda folder: write_checkpoint(folder, config, tensors, shards=shards)


def _with_odd_header(folder: Path) -> Path:
    """Metadata, spaces within and behind, and an odd length."""
    write_checkpoint(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = {"__metadata__": {"format": "pt", "who": "äö"}} | json.loads(content[8 : 8 + length])
    text = json.dumps(header, indent=3, ensure_ascii=False).encode() + b" " * 5
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return folder


def _with_bare_index(folder: Path) -> Path:
    write_checkpoint(folder, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"]}, indent=4) + "\n\n"
    )
    return folder


def _in_a_folder_within(folder: Path) -> Path:
    write_checkpoint(folder, shards=2)
    (folder / "weights" / "late").mkdir(parents=True)
    file = "model-00002-of-00002.safetensors"
    (folder / file).rename(folder / "weights" / "late" / file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    moved = {name: f"weights/late/{owner}" if owner == file else owner for name, owner in index["weight_map"].items()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": moved})
    return folder


def _as_a_snapshot_of_the_hub(folder: Path) -> Path:
    """Links from `snapshots/<commit>` to `blobs`."""
    blobs = folder / "blobs"
    write_checkpoint(blobs, shards=2)
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def _with_other_weights_beside(folder: Path) -> Path:
    write_checkpoint(folder, shards=2)
    for name in ("consolidated.safetensors", "model.safetensors", "model-00009-of-00009.safetensors"):
        write_safetensors(folder / name, random_tensors(seed=1))
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    return folder


def _with_a_tokenizer(folder: Path) -> Path:
    write_checkpoint(folder, generation_config={"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text('{ "version":  "1.0" }\r\n')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / "chat_template.jinja").write_bytes("{{ 'ä' }}\r\n".encode())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ messages }}")
    return folder


_REVERSED = dict(reversed(random_tensors().items()))
_BASE_NAMES = {name.removeprefix("model."): tensor for name, tensor in random_tensors().items()}
_SOME_BASE_NAMES = {
    name if ".1." in name else name.removeprefix("model."): tensor for name, tensor in random_tensors().items()
}
_TIED_TENSORS = random_tensors(TIED)
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500000.0}
_LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "one file": of_config(),
    "float16": of_tensors(random_tensors(dtype=F16)),
    "bfloat16": of_tensors(random_tensors(dtype=BF16)),
    "any bits in float32": of_tensors(random_bits(F32)),
    "any bits in float16": of_tensors(random_bits(F16)),
    "any bits in bfloat16": of_tensors(random_bits(BF16), shards=2),
    "two files": of_tensors(random_tensors(), shards=2),
    "a file per tensor": of_tensors(random_tensors(), shards=len(random_tensors())),
    "dtypes mixed": of_tensors(mixed([BF16, F16, F32, F16, BF16])),
    "dtypes mixed over files": of_tensors(mixed([F32, F16]), shards=3),
    "tensors in another order": of_tensors(_REVERSED),
    "as many key heads as heads": of_config(num_key_value_heads=4),
    "as many key heads as heads, unsaid": of_config(num_key_value_heads=None),
    "one key head, wide": of_config(num_key_value_heads=1, head_dim=12),
    "biases in attention": of_config(attention_bias=True),
    "biases everywhere": of_config(attention_bias=True, mlp_bias=True),
    "tied": of_tensors(_TIED_TENSORS, TIED),
    "tied, with an equal head": of_tensors(_TIED_TENSORS | {HEAD: _TIED_TENSORS[EMBEDDING]}, TIED),
    "tied, with an equal head in a file of its own": of_tensors(
        {HEAD: _TIED_TENSORS[EMBEDDING]} | _TIED_TENSORS, TIED, shards=len(_TIED_TENSORS) + 1
    ),
    "frequencies": of_tensors(random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES}),
    "masked bias": of_tensors(random_tensors() | {"model.layers.1.attn.masked_bias": np.array(-1e4, F16)}),
    "rope of transformers 4": of_config(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0}),
    "rope of transformers 5": of_config(rope_parameters=_LLAMA3),
    "yarn": of_config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "longrope": of_config(rope_scaling=_LONG, original_max_position_embeddings=32),
    "odd header": _with_odd_header,
    "bare index": _with_bare_index,
    "a folder within": _in_a_folder_within,
    "float64": of_tensors(random_tensors(dtype=np.float64)),
    "names of the base model": of_tensors(_BASE_NAMES),
    "names of the base model in some files": of_tensors(_SOME_BASE_NAMES, shards=2),
    "snapshot of the hub": _as_a_snapshot_of_the_hub,
    "other weights beside": _with_other_weights_beside,
    "tokenizer and templates": _with_a_tokenizer,
    "another activation": of_config(hidden_act="gelu"),
    "Mistral": of_config(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4),
    "Qwen2": of_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
    "Qwen3": of_config(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8, attention_bias=True),
}
