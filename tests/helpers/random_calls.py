"""Random calls of `generate`: which fields are set decides the program, so each set of fields is tried many times."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from architectures import VOCAB, architecture

ROWS, COLUMNS = 3, 11


def small_model(folder: Path) -> Path:
    """Writes a Llama of one layer, whose programs build quickly."""
    whole = architecture(1)
    return replace(whole, config={**whole.config, "num_hidden_layers": 1}).write(folder)


def _ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.choice(np.arange(3, VOCAB), count, replace=False).tolist()


def _sequences(rng: np.random.Generator) -> list[list[int]]:
    """Four sequences, likely to match: few different ids, and the longest has four."""
    return [rng.integers(3, 20, length).tolist() for length in (1, 2, 3, 4)]


def _bias(rng: np.random.Generator) -> list[list[Any]]:
    return [[sequence, float(rng.normal() * 4)] for sequence in _sequences(rng)]


PROCESSORS: dict[str, Any] = {
    "guidance_scale": lambda rng: float(rng.uniform(0.5, 3)),
    "sequence_bias": _bias,
    "encoder_repetition_penalty": lambda rng: float(rng.uniform(0.5, 2)),
    "repetition_penalty": lambda rng: float(rng.uniform(0.6, 2)),
    "no_repeat_ngram_size": lambda rng: 2,
    "encoder_no_repeat_ngram_size": lambda rng: 2,
    "bad_words_ids": _sequences,
    "min_length": lambda rng: int(rng.integers(1, 22)),
    "min_new_tokens": lambda rng: int(rng.integers(1, 12)),
    "forced_bos_token_id": lambda rng: int(rng.integers(3, VOCAB)),
    "forced_eos_token_id": lambda rng: _ids(rng, int(rng.integers(1, 3))),
    "remove_invalid_values": lambda rng: True,
    "exponential_decay_length_penalty": lambda rng: (int(rng.integers(0, 6)), float(rng.uniform(0.9, 1.6))),
    "suppress_tokens": lambda rng: _ids(rng, int(rng.integers(1, 40))),
    "begin_suppress_tokens": lambda rng: _ids(rng, int(rng.integers(1, 40))),
    "renormalize_logits": lambda rng: True,
}
WARPERS: dict[str, Any] = {
    "temperature": lambda rng: float(rng.uniform(0.3, 3)),
    "top_k": lambda rng: int(rng.choice([0, 1, 3, 10, 50, 96, 200])),
    "top_p": lambda rng: float(rng.choice([0.0, rng.uniform(0.05, 0.99), 1.0])),
    "min_p": lambda rng: float(rng.uniform(0, 0.3)),
    "top_h": lambda rng: float(rng.uniform(0.1, 1)),
    "typical_p": lambda rng: float(rng.uniform(0.1, 0.95)),
    "epsilon_cutoff": lambda rng: float(rng.uniform(0.001, 0.1)),
    "eta_cutoff": lambda rng: float(rng.uniform(0.001, 0.1)),
}


def some(rng: np.random.Generator, fields: dict[str, Any], low: int, high: int) -> list[str]:
    """From `low` to `high` names."""
    return sorted(rng.choice(sorted(fields), int(rng.integers(low, high + 1)), replace=False).tolist())


def call(rng: np.random.Generator, names: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """A ragged batch and the arguments to continue it with; only the names decide which program runs."""
    values = PROCESSORS | WARPERS
    kwargs: dict[str, Any] = {name: values[name](rng) for name in names}
    forced = {kwargs.get("forced_bos_token_id"), *kwargs.get("forced_eos_token_id", [])}
    if "suppress_tokens" in kwargs:  # forcing what is suppressed is an error
        kwargs["suppress_tokens"] = [token for token in kwargs["suppress_tokens"] if token not in forced]
    eos: Any = [None, int(rng.integers(3, VOCAB)), _ids(rng, 5)][int(rng.integers(3))]
    if "exponential_decay_length_penalty" in names and eos is None:
        eos = _ids(rng, 3)
    kwargs |= {"eos_token_id": eos, "pad_token_id": 0 if rng.random() < 0.5 else None}
    kwargs["max_new_tokens"] = int(rng.integers(9, 15))
    columns = int(rng.integers(1, COLUMNS))
    ids = rng.integers(3, 20, (ROWS, columns))
    padding = rng.integers(0, columns, ROWS) if rng.random() < 0.7 else np.zeros(ROWS, int)
    mask = (np.arange(columns) >= padding[:, None]).astype(int)
    kwargs["attention_mask"] = mask
    return np.where(mask, ids, 0), kwargs
