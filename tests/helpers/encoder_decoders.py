"""Small random encoder-decoder models of every family, the calls they answer, and transformers' answers.

Weights come from NumPy, as those of `architectures`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import jaxgen
from jaxgen.checkpoint.load import abstract
from jaxgen.checkpoint.source import named_leaves
from jaxgen.models import FAMILIES

VOCAB = 71
ROWS, COLUMNS = 3, 12  # of a source
FAMILY_NAMES = ("t5", "bart", "mt5", "mbart", "umt5", "pegasus", "t5", "marian", "t5", "m2m_100")
COUNT = 40


@dataclass(frozen=True)
class EncoderDecoder:
    """A `config.json` and the seed of its weights."""

    seed: int
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.config['model_type']}-{self.seed}"

    def write(self, folder: Path) -> Path:
        """Writes the Hugging Face folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        family, tied = FAMILIES[self.config["model_type"]], self.seed % 3 > 0
        model = abstract(self.config)
        config = model.config if tied else _untied(model.config)
        shapes = {path: leaf.shape for path, leaf in named_leaves(model)} | {family.head: (VOCAB, config.hidden_size)}
        if family.optional:
            shapes["final_logits_bias"] = (1, VOCAB)
        rng, tensors = np.random.default_rng(self.seed), {}
        for path, sources in family.weight_map(config).items():
            for name, rows in sources.items():
                tensors[name] = self._values(rng, name, (rows, *shapes[path][1:]))
        if self.config.get("init_std") and not self.config["tie_word_embeddings"]:  # then transformers ties none of these either
            for stack in ("encoder", "decoder"):
                tensors[f"model.{stack}.embed_tokens.weight"] = tensors["model.shared.weight"].copy()
        if family.optional and self.seed % 2:  # files of some families lack it
            tensors["final_logits_bias"] = self._values(rng, "final_logits_bias", (1, VOCAB))
        save_file(tensors, folder / "model.safetensors")
        return folder

    def _values(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Spreads at which tokens differ from step to step, and sums are not so large that float32 decides."""
        values = rng.standard_normal(shape, np.float32)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.2 * values
        if name in ("shared.weight", "model.shared.weight", "lm_head.weight"):
            return values if "num_heads" in self.config else 0.3 * values
        return values * (0.4 if len(shape) > 1 else 0.3)


def _untied(config: Any) -> Any:
    import dataclasses

    return dataclasses.replace(config, tie_word_embeddings=False)


def encoder_decoder(seed: int) -> EncoderDecoder:
    """The seed-th model: the family in turn, everything else drawn."""
    rng = np.random.default_rng(seed)
    model_type = FAMILY_NAMES[seed % len(FAMILY_NAMES)]
    config: dict[str, Any] = {"model_type": model_type, "vocab_size": VOCAB, "is_encoder_decoder": True}
    layers, heads = rng.integers(1, 4, 2).tolist(), int(rng.choice([1, 2, 4]))
    if "t5" in model_type:
        config |= {
            "d_model": 32,
            "d_kv": int(rng.choice([8, 12])),
            "num_heads": heads,
            "d_ff": int(rng.choice([24, 48])),
        }
        config |= {"num_layers": layers[0], "num_decoder_layers": layers[1], "decoder_start_token_id": 0}
        config["feed_forward_proj"] = str(rng.choice(["relu", "gated-gelu", "gated-silu"]))
        config |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
        # Three kinds of files: of the original T5, of later ones, and of transformers 5.
        config |= [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True, "scale_decoder_outputs": False}][
            int(rng.integers(3))
        ]
        return EncoderDecoder(seed, config)
    config |= {"d_model": 32, "encoder_layers": layers[0], "decoder_layers": layers[1], "init_std": 0.3}
    config |= {"encoder_attention_heads": heads, "decoder_attention_heads": int(rng.choice([2, 4]))}
    config |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": int(rng.choice([24, 48])), "max_position_embeddings": 64}
    config |= {"activation_function": str(rng.choice(["gelu", "relu", "swish"])), "tie_word_embeddings": seed % 3 > 0}
    config["scale_embedding"] = bool(rng.integers(2))
    special = {"bart": (1, 0, 2, 2), "mbart": (1, 0, 2, 3), "pegasus": (0, None, 1, 0), "marian": (70, None, 0, 70)}
    pad, bos, eos, start = special.get(model_type, (1, 0, 2, 2))
    config |= {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos, "decoder_start_token_id": start}
    return EncoderDecoder(seed, config)


def source(rng: np.random.Generator, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """A ragged batch of sources, padded on either side, and its attention mask."""
    ids, lengths = rng.integers(3, VOCAB - 1, (ROWS, COLUMNS)), rng.integers(2, COLUMNS + 1, ROWS)
    columns = np.arange(COLUMNS) if rng.random() < 0.7 else np.arange(COLUMNS)[::-1]
    mask = columns[None] < lengths[:, None]
    return np.where(mask, ids, pad), mask.astype(np.int64)


def torch_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    torch.set_num_threads(1)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = {name for name in info["missing_keys"] if "embed_positions" not in name and "logits_bias" not in name}
    assert not missing and not info["unexpected_keys"], info
    return model.eval()


def torch_generate(model: Any, input_ids: np.ndarray | None, **kwargs: Any) -> Any:
    """What transformers generates; arrays become tensors."""
    import torch

    def tensor(value: Any) -> Any:
        return torch.tensor(value) if isinstance(value, np.ndarray) else value

    return model.generate(tensor(input_ids), **{name: tensor(value) for name, value in kwargs.items()})


def pair(seed: int, folder: Path) -> tuple[Any, Any]:
    """A model and its twin in torch."""
    encoder_decoder(seed).write(folder)
    return jaxgen.load(folder), torch_model(folder)
