"""The outputs of `generate` with `return_dict_in_generate`, and `compute_transition_scores`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgen import lazy
from jaxgen.generation.prompt.past_key_values import PastKeyValues
from jaxgen.generation.user_warnings import warn_once

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class _Output:
    """Gives access by key or index to the fields that are not None, as in transformers' outputs.

    The cache can be read under both of its names; `keys()` lists the name that the installed transformers uses.
    """

    cache: PastKeyValues | None

    @property
    def past_key_values(self) -> PastKeyValues | None:
        if lazy.cache_name() == "cache":
            warn_once("`past_key_values`/`cache_params` are deprecated. Use `cache` instead.")
        return self.cache

    def __getitem__(self, name: str | int) -> Any:
        if isinstance(name, int):
            return self[self.keys()[name]]
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys() or (name in ("cache", "past_key_values") and self.cache is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        present = [name for name, value in vars(self).items() if value is not None]
        return [lazy.cache_name() if name == "cache" else name for name in present]


@dataclass(frozen=True)
class GenerateDecoderOnlyOutput(_Output):
    """Same as transformers 5.24 `GenerateDecoderOnlyOutput`; fields that are not None by attribute, key or index.

    There are L - P steps and N = B * num_return_sequences rows. `scores` and `logits` are arrays with a first
    axis of steps, in place of transformers' tuple over steps. After the end of a row its scores and logits are not
    meaningful, and its logprobs are 0.

    Attributes:
        sequences: int32 [N, L]. The prompt and the new tokens.
        scores: float32 [steps, N, V]. After all processors.
        logits: float32 [steps, N, V]. Of the model, before all processors.
        attentions: for each step a tuple over layers, first [N, Q, P, P], then [N, Q, 1, P + step]; zeros at masked
            queries. With `use_cache=False` each step has the whole text, [N, Q, P + step, P + step], and is read-only.
        hidden_states: for each step a tuple over the embeddings and the layers, first [N, P, D], then [N, 1, D]. With
            `use_cache=False` each step has the whole text, [N, P + step, D], and is read-only.
        cache: the cache of all tokens but the last, which the model has not read; it includes a continued cache.
        logprobs: float32 [N, steps]. The log-probabilities of the chosen tokens under the model, at temperature 1.
        processed_logprobs: float32 [N, steps]. The same under the processed scores, from which the tokens were sampled.
        rounds: int32 [N], with assisted decoding. The number of forward passes that chose the row's new tokens.
        drafted: int32 [N], with assisted decoding. The number of tokens that the drafter proposed.
        accepted: int32 [N], with assisted decoding. The number of proposed tokens that were accepted.
    """

    sequences: np.ndarray
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: PastKeyValues | None = None
    logprobs: np.ndarray | None = None
    processed_logprobs: np.ndarray | None = None
    rounds: np.ndarray | None = None
    drafted: np.ndarray | None = None
    accepted: np.ndarray | None = None


@dataclass(frozen=True)
class GenerateBeamDecoderOnlyOutput(_Output):
    """Same as transformers 5.24 `GenerateBeamDecoderOnlyOutput`; fields that are not None by attribute, key or index.

    There are at least L - P steps, N = B * num_return_sequences returned rows, and C running beams per prompt. `scores`
    and `logits` are arrays with a first axis of steps, in place of transformers' tuple over steps; the rows of a step
    are the running beams before its tokens are chosen.

    Attributes:
        sequences: int32 [N, L]. The prompt and the new tokens, the best beam of each prompt first.
        sequences_scores: float32 [N], with `output_scores`. The sum of the tokens' scores, after the length penalty.
        scores: float32 [steps, B * C, V]. Log-probabilities after all processors.
        logits: float32 [steps, B * C, V]. Of the model, before all processors.
        beam_indices: int32 [N, L - P]. The row of `scores` that each new token was chosen from, -1 after the end.
        attentions: for each step a tuple over layers, first [B * C, Q, P, P], then [B * C, Q, 1, P + step]; with
            `use_cache=False` each step has the whole text of each beam, [B * C, Q, P + step, P + step].
        hidden_states: for each step a tuple over the embeddings and the layers, first [B * C, P, D], then
            [B * C, 1, D]; with `use_cache=False` [B * C, P + step, D].
        cache: the cache of the tokens that the model has read: all tokens of each running beam but the last.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray | None = None
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: PastKeyValues | None = None


@dataclass(frozen=True)
class GenerateEncoderDecoderOutput(_Output):
    """Same as transformers 5.24 `GenerateEncoderDecoderOutput`; fields that are not None by attribute, key or index.

    Fields that a `GenerateDecoderOnlyOutput` has too are as there, with the text of the decoder as the prompt and the
    new tokens. The source has X columns.

    Attributes:
        encoder_attentions: a tuple over the layers of the encoder, [B, Q, X, X].
        encoder_hidden_states: a tuple over the embeddings and the layers of the encoder, [B, X, D].
        decoder_attentions: as `attentions` there.
        cross_attentions: for each step a tuple over layers, first [N, Q, P, X], then [N, Q, 1, X]; with
            `use_cache=False` [N, Q, P + step, X].
        decoder_hidden_states: as `hidden_states` there.
        cache: it also holds what the decoder needs of the source.
    """

    sequences: np.ndarray
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    encoder_attentions: tuple[np.ndarray, ...] | None = None
    encoder_hidden_states: tuple[np.ndarray, ...] | None = None
    decoder_attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    cross_attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: PastKeyValues | None = None
    logprobs: np.ndarray | None = None
    processed_logprobs: np.ndarray | None = None
    rounds: np.ndarray | None = None
    drafted: np.ndarray | None = None
    accepted: np.ndarray | None = None


@dataclass(frozen=True)
class GenerateBeamEncoderDecoderOutput(_Output):
    """Same as transformers 5.24 `GenerateBeamEncoderDecoderOutput`, by attribute, key or index.

    Fields are those of a `GenerateBeamDecoderOnlyOutput` and of a `GenerateEncoderDecoderOutput`, with a row per beam
    in the arrays of the decoder and a row per prompt in those of the encoder.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray | None = None
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    encoder_attentions: tuple[np.ndarray, ...] | None = None
    encoder_hidden_states: tuple[np.ndarray, ...] | None = None
    decoder_attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    cross_attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: PastKeyValues | None = None


GenerateOutput = (
    GenerateDecoderOnlyOutput
    | GenerateBeamDecoderOnlyOutput
    | GenerateEncoderDecoderOutput
    | GenerateBeamEncoderDecoderOutput
)


def compute_transition_scores(
    sequences: "ArrayLike",
    scores: "ArrayLike",
    beam_indices: "ArrayLike | None" = None,
    normalize_logits: bool = False,
) -> np.ndarray:
    """The scores of the chosen tokens. Same as transformers 5.24 `GenerationMixin.compute_transition_scores`.

    Args:
        sequences: int [N, L], from `generate`.
        scores: float [steps, rows, V], from `generate(..., output_scores=True, return_dict_in_generate=True)`.
        beam_indices: int [N, steps]. The row of `scores` of each token, negative after the end; by default text n has
            row n.
        normalize_logits: whether to apply log-softmax to the scores first.

    Returns:
        float32 [N, steps], 0 after the end of a beam.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    sequences, scores = np.asarray(sequences), np.asarray(scores)
    if scores.ndim != 3 or sequences.ndim != 2:
        raise ValueError(
            f"`scores` has shape {scores.shape} and `sequences` {sequences.shape}, but they must be [steps, rows, "
            "vocabulary] and [rows, columns]. Pass the arrays of one call of `generate`."
        )
    # Without beams every token of text n was chosen from row n.
    if beam_indices is None:
        beam_indices = np.broadcast_to(np.arange(scores.shape[1])[:, None], (scores.shape[1], len(scores)))
    beam_indices = np.asarray(beam_indices)
    ended = beam_indices < 0
    steps = int((~ended).sum(axis=1).max(initial=0))  # up to the end of the longest beam; later columns are padding
    beam_indices, ended = np.where(ended, 0, beam_indices)[:, :steps], ended[:, :steps]
    if len(beam_indices) != len(sequences) or steps > min(len(scores), sequences.shape[1]):
        raise ValueError(
            f"{len(sequences)} sequences of {sequences.shape[1]} columns do not belong to scores of {len(scores)} "
            f"steps and {len(beam_indices)} rows. Pass `sequences`, `scores` and `beam_indices` of one call."
        )
    # For text n and step t: scores[t, beam_indices[n, t], tokens[n, t]].
    tokens = sequences[:, sequences.shape[1] - steps :]
    chosen = scores[np.arange(steps), beam_indices, tokens]
    if normalize_logits:
        chosen = chosen - np.asarray(jax.nn.logsumexp(scores[:steps], axis=2)).T[beam_indices, np.arange(steps)]
    return np.where(ended, 0, chosen)
