"""What `generate` returns with `return_dict_in_generate`, and what is computed from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class GenerateDecoderOnlyOutput:
    """Same as transformers 5.23 `GenerateDecoderOnlyOutput`; fields that are not None by attribute, key or place.

    L are the columns of `sequences`, T the steps that ran (L less the prompt), N rows are B * R. Scores, logits and
    logprobs are arrays whose first axis stands for transformers' tuple over steps. In a step that a row spent finished,
    its numbers mean nothing and its logprobs are 0.

    Attributes:
        sequences: int32 [N, L]. The prompt and the new tokens.
        scores: float32 [T, N, V]. Processed, as tokens were chosen by them.
        logits: float32 [T, N, V]. As the model gave them.
        attentions: T tuples over layers, the first [N, Q, P, P], then [N, Q, 1, P + t]; zeros where the column itself
            is masked.
        hidden_states: T tuples over layers and one more, the first [N, P, D], then [N, 1, D].
        past_key_values: the cache of the L - 1 columns that the model has seen.
        logprobs: float32 [N, T]. The chosen tokens' log-probabilities by the model: temperature 1, whole vocabulary.
        processed_logprobs: float32 [N, T]. The same by the processed scores: of the draw that was made.
    """

    sequences: np.ndarray
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    past_key_values: "PastKeyValues | None" = None
    logprobs: np.ndarray | None = None
    processed_logprobs: np.ndarray | None = None

    def __getitem__(self, name: str | int) -> Any:
        present = {key: value for key, value in vars(self).items() if value is not None}
        return list(present.values())[name] if isinstance(name, int) else present[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        return [name for name, value in vars(self).items() if value is not None]


class PastKeyValues(Sequence):
    """The cache of a call without its padding: `past[layer]` is (keys, values), each [N, K, L - 1, H] on the device."""

    def __init__(self, cache: Any, rows: int, start: int, length: int):
        self._cache, self._rows, self._columns = cache, rows, slice(start, start + length)

    def __len__(self) -> int:
        return len(self._cache.layers)

    def __getitem__(self, layer: Any) -> Any:
        keys, values = self._cache.layer(range(len(self))[layer])
        return keys[: self._rows, :, self._columns], values[: self._rows, :, self._columns]

    def get_seq_length(self) -> int:
        """L - 1."""
        return self._columns.stop - self._columns.start


def compute_transition_scores(
    sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
) -> np.ndarray:
    """The scores of the chosen tokens. Same as transformers 5.23 `GenerationMixin.compute_transition_scores`.

    Args:
        sequences: int [N, L], from `generate`.
        scores: float [T, rows, V], from `generate(..., output_scores=True, return_dict_in_generate=True)`.
        beam_indices: int [N, T], the row each token was chosen in, negative after the end; each its own by default.
        normalize_logits: whether to make the scores log-probabilities first.

    Returns:
        float32 [N, T], 0 after the end of a beam.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    sequences, scores = np.asarray(sequences), np.asarray(scores)
    if scores.ndim != 3 or sequences.ndim != 2:
        raise ValueError(
            f"`scores` has shape {scores.shape} and `sequences` {sequences.shape}, but they must be [steps, rows, "
            "vocabulary] and [rows, columns]. Pass those of one call of `generate`."
        )
    if beam_indices is None:
        beam_indices = np.broadcast_to(np.arange(scores.shape[1])[:, None], (scores.shape[1], len(scores)))
    beam_indices = np.asarray(beam_indices)
    ended = beam_indices < 0
    steps = int((~ended).sum(axis=1).max(initial=0))
    beam_indices, ended = np.where(ended, 0, beam_indices)[:, :steps], ended[:, :steps]
    if len(beam_indices) != len(sequences) or steps > min(len(scores), sequences.shape[1]):
        raise ValueError(
            f"{len(sequences)} sequences of {sequences.shape[1]} columns do not belong to scores of {len(scores)} "
            f"steps and {len(beam_indices)} rows. Pass `sequences`, `scores` and `beam_indices` of one call."
        )
    tokens = sequences[:, sequences.shape[1] - steps :]
    chosen = scores[np.arange(steps), beam_indices, tokens]
    if normalize_logits:
        chosen = chosen - np.asarray(jax.nn.logsumexp(scores[:steps], axis=2)).T[beam_indices, np.arange(steps)]
    return np.where(ended, 0, chosen)
