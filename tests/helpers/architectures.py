"""Small random models of every architecture, and the prompts they continue.

Weights come from NumPy, so that the same models exist with and without torch. Their spread is 0.2 to 0.5: at the usual
0.02 a random model repeats one token whatever it is asked, and no test can tell right from wrong.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 97
PROMPT_COLUMNS = 13
NEW_TOKENS = 64

_HEADS = [  # query heads, key-value heads, head_dim
    (4, 4, None),
    (4, 2, None),
    (4, 1, None),
    (6, 2, 16),
    (4, 2, 12),
    (8, 2, 8),
]
_ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500000.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    {"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "beta_fast": 16.0,
            "truncate": False,
        }
    },
    {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope"}},
]


@dataclass(frozen=True)
class Architecture:
    """A `config.json` and the seed of its weights and prompts."""

    seed: int
    config: dict[str, Any]

    @property
    def name(self) -> str:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        heads = f"{self.config['num_attention_heads']}q{self.config['num_key_value_heads']}kv"
        name = f"{self.seed}-{heads}-{rope.get('rope_type', rope.get('type', 'default'))}"
        return name if self.config["model_type"] == "llama" else f"{self.config['model_type']}-{name}"

    def write(self, folder: Path) -> Path:
        """Writes the Hugging Face folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        rng = np.random.default_rng(self.seed)
        spread = self.config["initializer_range"]
        tensors = {}
        for name, shape in tensor_shapes(self.config).items():
            values = rng.standard_normal(shape, np.float32) * spread
            tensors[name] = 1 + values * 0.2 if name.endswith("norm.weight") else values
        save_file(tensors, folder / "model.safetensors")
        return folder

    @property
    def new_tokens(self) -> int:
        """How many are on record."""
        return NEW_TOKENS

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """A ragged, left-padded batch of four prompts and its attention mask."""
        rng = np.random.default_rng(1000 + self.seed)
        ids = rng.integers(3, VOCAB, (4, PROMPT_COLUMNS))
        mask = np.arange(PROMPT_COLUMNS) >= np.array([0, 4, 12, int(rng.integers(0, 12))])[:, None]
        return np.where(mask, ids, 0), mask.astype(np.int64)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Hugging Face checkpoint."""
    family = config["model_type"]
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    query, key = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    linear = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        if family == "qwen3":
            shapes |= {f"{prefix}self_attn.{norm}.weight": (head_dim,) for norm in ("q_norm", "k_norm")}
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            has_bias = config.get("mlp_bias" if name.startswith("mlp") else "attention_bias")
            if has_bias if family != "qwen2" else name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def architecture(seed: int) -> Architecture:
    """The seed-th architecture: heads and rope in turn, everything else drawn."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, head_dim = _HEADS[seed % len(_HEADS)]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 48 if heads == 6 else 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6, 1e-3])),
        "hidden_act": str(rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "initializer_range": float(rng.choice([0.2, 0.3, 0.4, 0.5])),
        "bos_token_id": 1,
        "eos_token_id": 2 if rng.integers(2) else [2, 5],
        "pad_token_id": 0,
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    config |= json.loads(json.dumps(_ROPES[seed % len(_ROPES)]))
    if config.get("rope_scaling", {}).get("type") == "longrope":
        half = (head_dim or config["hidden_size"] // heads) // 2
        config["rope_scaling"]["short_factor"] = [1.0 + 0.1 * i for i in range(half)]
        config["rope_scaling"]["long_factor"] = [2.0 + 0.5 * i for i in range(half)]
    return Architecture(seed, config)


ARCHITECTURES = [architecture(seed) for seed in range(66)]


# ---- Other families ----

FAMILY_CLASSES = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WINDOWS = [2, 3, 5, 8, 12, 30, 50]  # less than the prompt, or than the text


def family_member(model_type: str, seed: int) -> Architecture:
    """The seed-th architecture with what another family has of its own: which layers slide, and where biases are."""
    config = architecture(seed).config
    biases = {key: config.pop(key) for key in ("attention_bias", "mlp_bias")}
    config |= {"model_type": model_type, "architectures": [FAMILY_CLASSES[model_type]]}
    window = WINDOWS[seed % len(WINDOWS)]
    if model_type == "mistral":
        return Architecture(seed, config | {"sliding_window": None if seed % 9 == 8 else window})
    if model_type == "qwen3":
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config["attention_bias"] = biases["attention_bias"]
    config |= [
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"], "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": False},
    ][seed % 4]
    return Architecture(seed, config | {"sliding_window": window})


FAMILY_MEMBERS = [family_member(model_type, seed) for model_type in FAMILY_CLASSES for seed in range(44)]
USUAL_MEMBERS = 2  # of each family; the others are for sweeps


# ---- Real sizes ----


@dataclass(frozen=True)
class RealSize(Architecture):
    """One whose prompts and vocabulary are as long as in real use."""

    columns: int
    decoded: int

    @property
    def name(self) -> str:
        return f"{self.config['vocab_size']} ids, {self.columns} columns"

    @property
    def new_tokens(self) -> int:
        return self.decoded

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """A ragged, left-padded batch of three prompts and its attention mask."""
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(3, self.config["vocab_size"], (3, self.columns))
        mask = np.arange(self.columns) >= np.array([[0], [self.columns // 3], [self.columns - 20]])
        return np.where(mask, ids, 0), mask.astype(np.int64)


def _real_size(seed: int, columns: int, new_tokens: int, **changes: Any) -> RealSize:
    config = architecture(0).config | {"max_position_embeddings": 2048, "eos_token_id": None, "rms_norm_eps": 1e-5}
    return RealSize(seed, config | {"hidden_act": "silu", **changes}, columns, new_tokens)


# Two query heads per key-value head, and six, which is more rows than XLA:CPU multiplies one by one.
SMALL = _real_size(
    1, 300, 160, vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.5, tie_word_embeddings=False,
)  # fmt: skip
LARGE = _real_size(
    2, 700, 64, vocab_size=50_000, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=1,
    initializer_range=0.4, tie_word_embeddings=True,
)  # fmt: skip
REAL_SIZES = [SMALL, LARGE]
