"""GGUF files as llama.cpp's converter writes them, of small random models and vocabularies."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from checkpoints import CONFIG, Tensors, random_tensors
from safetensors.numpy import load_file

from jaxgen.lazy import byte_characters

Metadata = Mapping[str, Any]

# Where a block of each type has its scales, which are half-precision floats.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *_SCALES)
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def stored(array: np.ndarray, kind: str) -> np.ndarray:
    """An array of this type: its values where Python can quantise them, random blocks elsewhere."""
    code = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return gguf.quants.quantize(array, code)
    rng, (block, size) = np.random.default_rng(array.size), gguf.GGML_QUANT_SIZES[code]
    blocks = rng.integers(0, 256, (array.size // block, size), np.uint8)
    for start in _SCALES[kind]:
        scales = rng.uniform(0.0001, 0.001, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(*array.shape[:-1], -1)


def sizes(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an architecture."""
    values = {f"{architecture}.{key}": config[name] for key, name in _SIZES.items()}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values |= {f"{architecture}.attention.{key}_length": head_dim for key in ("key", "value")}
    if architecture == "llama":
        values["llama.rope.dimension_count"] = head_dim
    return values | {f"{architecture}.rope.freq_base": float(config.get("rope_theta", 10000.0))}


def write_gguf(
    path: Path,
    config: Mapping[str, Any] = CONFIG,
    tensors: Tensors | None = None,
    *,
    kind: Callable[[str], str] = lambda name: "F32",
    metadata: Metadata | None = None,
    others: Tensors | None = None,
) -> Path:
    """Writes a file.

    Args:
        path: of the file.
        config: a config.json.
        tensors: by Hugging Face's names; random ones if left out.
        kind: the type of a matrix by its Hugging Face name; vectors are float32.
        metadata: more of it; None removes a key.
        others: tensors by llama.cpp's names.
    """
    architecture = config["model_type"]
    tensors = random_tensors(config) if tensors is None else tensors
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (sizes(architecture, config) | dict(metadata or {})).items():
        if value is not None:
            _add(writer, key, value)
    for name, array in tensors.items():
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            array = paired(array, heads[part])
        code = gguf.GGMLQuantizationType[kind(name) if array.ndim > 1 else "F32"]
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored(array, code.name), raw_dtype=code)
    for name, array in (others or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def paired(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in llama.cpp's order: those of its two halves by turns."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def _tokenizer(model: str, tokens: dict[str, int], **more: Any) -> dict[str, Any]:
    values = {"model": model, "tokens": [*tokens], "token_type": [*tokens.values()], **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": TEMPLATE}


def sentencepiece() -> dict[str, Any]:
    """A vocabulary of 320 tokens, as Llama 2's: bytes, pieces with scores, and no flag for bos."""
    pieces = ["▁", "e", "l", "o", "h", "t", "he", "el", "ll", "lo", "hel", "llo", "hello", "▁h", "▁hello", "▁t", "▁the"]
    tokens = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **{f"<0x{byte:02X}>": BYTE for byte in range(256)}}
    tokens |= dict.fromkeys(pieces, NORMAL) | {"<think>": USER}
    tokens |= {f"<extra{number}>": CONTROL for number in range(320 - len(tokens))}
    scores = [float(-number) for number in range(len(tokens))]
    return _tokenizer(
        "llama", tokens, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_space_prefix=True
    )


def byte_level() -> dict[str, Any]:
    """A vocabulary of 320 tokens, as Qwen's: characters for bytes, merges, and no bos."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ġ", "t"), ("Ġt", "he")]
    tokens = dict.fromkeys(byte_characters(), NORMAL) | {first + second: NORMAL for first, second in merges}
    tokens |= {"<|endoftext|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER}
    tokens |= {f"<extra{number}>": CONTROL for number in range(320 - len(tokens))}
    end = [*tokens].index("<|endoftext|>")
    return _tokenizer(
        "gpt2",
        tokens,
        pre="qwen2",
        merges=[" ".join(pair) for pair in merges],
        eos_token_id=end + 1,
        padding_token_id=end,
        add_bos_token=False,
    )


def write_stories(path: Path, folder: Path) -> Path:
    """The story model of a folder with its tokenizer and a chat template."""
    config, model = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json"))
    tokens = dict.fromkeys(sorted(model["model"]["vocab"], key=model["model"]["vocab"].get), NORMAL)
    tokens |= {each["content"]: CONTROL for each in model["added_tokens"]}
    more = _tokenizer(
        "gpt2",
        tokens,
        pre="gpt-2",
        merges=[" ".join(pair) for pair in model["model"]["merges"]],
        **{"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "add_bos_token": True},
    )
    return write_gguf(path, config, load_file(folder / "model.safetensors"), metadata=more)
