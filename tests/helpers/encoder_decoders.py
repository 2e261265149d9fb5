"""Small random encoder-decoder models of every family, the calls they answer, and transformers' answers.

Weights come from NumPy, as those of `architectures`. `python tests/helpers/encoder_decoders.py` records the answers of
transformers again, for machines without torch.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from random_calls import PROCESSORS
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
        # Where the head is not tied, transformers ties none of these either.
        if self.config.get("init_std") and not self.config["tie_word_embeddings"]:
            for stack in ("encoder", "decoder"):
                tensors[f"model.{stack}.embed_tokens.weight"] = tensors["model.shared.weight"].copy()
        if family.optional and self.seed % 2:  # files of some families lack it
            tensors["final_logits_bias"] = self._values(rng, "final_logits_bias", (1, VOCAB))
        save_file(tensors, folder / "model.safetensors")
        return folder

    def _values(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Spreads at which tokens differ from step to step, and sums are not so large that float32 decides."""
        values = rng.standard_normal(shape, np.float32)
        is_t5, matrix = "num_heads" in self.config, len(shape) > 1
        is_marian = self.config["model_type"] == "marian"
        if name.endswith("norm.weight"):
            before_head = "decoder" in name and name.endswith((".final_layer_norm.weight", "decoder.layer_norm.weight"))
            return (1 + 0.2 * values) * (0.6 / self._embedding_spread if before_head and not is_t5 else 1)
        if name in ("shared.weight", "model.shared.weight", "lm_head.weight"):
            return values if is_t5 else self._embedding_spread * values
        if name.endswith((".q.weight", "q_proj.weight", ".k.weight", "k_proj.weight")):
            return values * (0.2 if is_t5 else 0.4)  # a sharper attention multiplies what float32 rounds off
        if is_t5:
            return values * (0.4 if matrix else 0.3)
        if "fc2" in name and matrix:  # the units are mostly positive, and would add the same at every step
            return values - values.mean(axis=1, keepdims=True)
        return values * (0.5 if "embed_positions" in name else 0.1 if not matrix else 0.4 if is_marian else 0.6)

    @property
    def _embedding_spread(self) -> float:
        """Of a BART: small beside what layers add, so that a token is not its own likeliest successor."""
        if self.config["model_type"] != "marian":
            return 0.1
        return 0.2 if self.config["scale_embedding"] else 1  # else its sines and cosines, unscaled, are all that counts


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
        # In transformers 5.24 a T5 whose decoder has more layers than its encoder cannot generate with a cache.
        config |= {"num_layers": max(layers), "num_decoder_layers": layers[1], "decoder_start_token_id": 0}
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


def torch_generate(model: Any, input_ids: np.ndarray | None = None, **kwargs: Any) -> Any:
    """What transformers generates; arrays become tensors."""
    import torch

    def tensor(value: Any) -> Any:
        return torch.tensor(value) if isinstance(value, np.ndarray) else value

    return model.generate(tensor(input_ids), **{name: tensor(value) for name, value in kwargs.items()})


@jax.jit
def logits(model: Any, input_ids: Any, attention_mask: Any, decoder_input_ids: Any) -> jax.Array:
    """float32 [B, T, V], by one program: operation by operation takes four times as long."""
    return model(input_ids, attention_mask, decoder_input_ids)


def pair(seed: int, folder: Path) -> tuple[Any, Any]:
    """A model and its twin in torch."""
    encoder_decoder(seed).write(folder)
    return jaxgen.load(folder), torch_model(folder)


def random_call(rng: np.random.Generator, names: list[str], kind: str, special: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the source as `input_ids`; the names and the kind decide which program runs.

    Args:
        rng: draws all values.
        names: of `random_calls.PROCESSORS`.
        kind: "greedy" or "beams".
        special: a config with `pad_token_id` and `decoder_start_token_id`.
    """
    ids, mask = source(rng, special["pad_token_id"])
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    kwargs |= {name: _in_vocabulary(PROCESSORS[name](rng)) for name in names}
    forced = {kwargs.get("forced_bos_token_id"), *kwargs.get("forced_eos_token_id", [])}
    if "suppress_tokens" in names:  # forcing what is suppressed is an error
        kwargs["suppress_tokens"] = [token for token in kwargs["suppress_tokens"] if token not in forced]
    # An exact tie is nobody's business: several forced ids would all get a score of 0.
    kwargs["forced_eos_token_id"] = kwargs.get("forced_eos_token_id", [None])[0]
    eos = [each for each in rng.choice(np.arange(3, VOCAB - 1), 4, replace=False).tolist() if each not in forced][:3]
    kwargs |= {"eos_token_id": eos, "max_new_tokens": int(rng.integers(8, 13))}
    start = special["decoder_start_token_id"]
    if (begin := rng.random()) < 0.2:
        kwargs["decoder_start_token_id"] = rng.integers(3, VOCAB - 1, ROWS).tolist()
    elif begin < 0.6:
        columns = int(rng.integers(1, 4))
        tokens = rng.integers(3, VOCAB - 1, (ROWS, columns))
        if rng.random() < 0.5:
            tokens[:, 0] = start  # then it is not put before them
        kwargs["decoder_input_ids"] = tokens
        if columns > 1 and rng.random() < 0.5:
            of_tokens = np.ones((ROWS, columns), np.int64)
            of_tokens[rng.integers(ROWS), 1:columns] = 0
            kwargs["decoder_attention_mask"] = of_tokens
    if kind == "beams":
        kwargs |= {"num_beams": 3, "num_return_sequences": int(rng.integers(1, 4))}
        kwargs |= {"early_stopping": [True, False, "never"][int(rng.integers(3))]}
        kwargs |= {"length_penalty": float(rng.choice([0.0, rng.uniform(-1, 2)]))}
    return kwargs


def _in_vocabulary(value: Any) -> Any:
    """Token ids of a processor, as an integer or a list, within this vocabulary; other values as they are."""
    if isinstance(value, list) and all(type(each) is int for each in value):
        return sorted({3 + each % (VOCAB - 4) for each in value})
    return 3 + value % (VOCAB - 4) if type(value) is int and value >= VOCAB - 1 else value


RECORD = Path(__file__).parents[1] / "data" / "encoder_decoders.json"
RECORDED_SEEDS = range(len(FAMILY_NAMES))
RECORDED_CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 16},
    "beams": {"max_new_tokens": 12, "num_beams": 3},
}


def recorded_source(architecture: EncoderDecoder) -> dict[str, np.ndarray]:
    """The batch of the recorded answers."""
    ids, mask = source(np.random.default_rng(500 + architecture.seed), architecture.config.get("pad_token_id", 0))
    return {"input_ids": ids, "attention_mask": mask}


def _record() -> None:
    answers = {}
    for seed in RECORDED_SEEDS:
        architecture = encoder_decoder(seed)
        with tempfile.TemporaryDirectory() as folder:
            twin = torch_model(architecture.write(Path(folder)))
        for name, arguments in RECORDED_CALLS.items():
            batch = recorded_source(architecture)
            answers[f"{architecture.name}-{name}"] = torch_generate(twin, **batch, **arguments).tolist()
    lines = (f"{json.dumps(name)}: {json.dumps(rows, separators=(',', ':'))}" for name, rows in answers.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _record()
