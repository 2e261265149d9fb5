"""What `generate` returns with `return_dict_in_generate`, and what is computed from it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxgen import lazy
from jaxgen.decoding.loop import DecodeState, finalize
from jaxgen.generation.call import Call
from jaxgen.generation.config import warn_once
from jaxgen.generation.inputs import refuse_tracer
from jaxgen.generation.past_key_values import PastKeyValues

logger = logging.getLogger(__name__)


class _Output:
    """Fields that are not None by key or place, as of transformers' outputs.

    The cache has both of its names; among the keys it goes by the one of the installed transformers.
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
    """Same as transformers 5.24 `GenerateDecoderOnlyOutput`; fields that are not None by attribute, key or place.

    L are the columns of `sequences`, T the steps that ran (L less the prompt), N rows are B * R. Scores, logits and
    logprobs are arrays whose first axis stands for transformers' tuple over steps. In a step that a row spent finished,
    its numbers mean nothing and its logprobs are 0.

    Attributes:
        sequences: int32 [N, L]. The prompt and the new tokens.
        scores: float32 [T, N, V]. Processed, as tokens were chosen by them.
        logits: float32 [T, N, V]. As the model gave them.
        attentions: T tuples over layers, the first [N, Q, P, P], then [N, Q, 1, P + t]; zeros where the column itself
            is masked. With `use_cache=False` all are of the whole text, [N, Q, P + t, P + t], and read-only.
        hidden_states: T tuples over layers and one more, the first [N, P, D], then [N, 1, D]. With `use_cache=False`
            all are of the whole text, [N, P + t, D], and read-only.
        cache: the cache of the columns that the model has seen: all but the last, and those of a cache that
            was continued.
        logprobs: float32 [N, T]. The chosen tokens' log-probabilities by the model: temperature 1, whole vocabulary.
        processed_logprobs: float32 [N, T]. The same by the processed scores: of the draw that was made.
    """

    sequences: np.ndarray
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: PastKeyValues | None = None
    logprobs: np.ndarray | None = None
    processed_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class GenerateBeamDecoderOnlyOutput(_Output):
    """Same as transformers 5.24 `GenerateBeamDecoderOnlyOutput`; fields that are not None by attribute, key or place.

    L are the columns of `sequences`, T the steps that ran (at least L less the prompt), N returned rows are B * R, M
    running beams are B * num_beams. Scores and logits are arrays whose first axis stands for transformers' tuple over
    steps; a step's rows are the running beams before its tokens are chosen.

    Attributes:
        sequences: int32 [N, L]. The prompt and the new tokens, the best beam of each prompt first.
        sequences_scores: float32 [N], with `output_scores`. The sum of the tokens' scores, by the length penalty.
        scores: float32 [T, M, V]. Processed log-probabilities.
        logits: float32 [T, M, V]. As the model gave them.
        beam_indices: int32 [N, L - P]. The row of `scores` that each new token was chosen in, -1 after the end.
        attentions: T tuples over layers, the first [M, Q, P, P], then [M, Q, 1, P + t]; with `use_cache=False` of the
            whole text of each beam, [M, Q, P + t, P + t].
        hidden_states: T tuples over layers and one more, the first [M, P, D], then [M, 1, D]; with `use_cache=False`
            [M, P + t, D].
        cache: the cache of the columns that the model has seen, P + T - 1 of each running beam.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray | None = None
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: PastKeyValues | None = None


GenerateOutput = GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


def to_output(call: Call, state: DecodeState) -> np.ndarray | GenerateOutput:
    """What `generate` returns, from the state at the end of the decode; waits for the device."""
    outputs = finalize(call.strategy, state)
    refuse_tracer(outputs["length"])
    # `device_get` can be interrupted while the device works, `np.asarray` cannot.
    fetched = jax.device_get(dict(outputs))
    if fetched["invalid"].any():
        logger.warning(
            "The scores of rows %s held NaN or infinity: their tokens mean nothing. Check the weights, load as "
            "float32, or pass `remove_invalid_values=True`.",
            np.flatnonzero(fetched["invalid"]).tolist(),
        )
    output = _without_buckets(call, fetched, state)
    return output if call.config.return_dict_in_generate else output.sequences


def _without_buckets(call: Call, fetched: dict[str, Any], state: DecodeState) -> GenerateOutput:
    """The output of a call without its buckets; copies are writable and do not keep a bucket alive.

    Args:
        call: the call that ran.
        fetched: the outputs of its strategy, on the host.
        state: at the end of its decode.
    """
    config, steps = call.config, int(fetched["length"]) - call.columns
    rows = call.rows * call.strategy.copies * config.num_beams
    fields: dict[str, Any] = {}
    if config.num_beams == 1:
        fields["sequences"] = fetched["sequences"][:rows, : fetched["length"]].copy()
    else:
        fields |= _best_beams(call, fetched)
    if not config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(fields["sequences"])
    fields |= {name: fetched[name][:steps, :rows].copy() for name in ("scores", "logits") if name in fetched}
    fields |= {name: fetched[name][:rows, :steps].copy() for name in fetched if name.endswith("logprobs")}
    fields |= {name: _internals(name, call, fetched, state, steps) for name in call.collect}
    if config.use_cache:
        fields["cache"] = PastKeyValues(state.cache, _slots(call, state.cache, steps))
    return GenerateDecoderOnlyOutput(**fields) if config.num_beams == 1 else GenerateBeamDecoderOnlyOutput(**fields)


def _best_beams(call: Call, fetched: dict[str, Any]) -> dict[str, Any]:
    """The beams to return, as wide as the longest of them, with their scores and indices."""
    kept = (slice(call.rows), slice(call.config.num_return_sequences))
    beam_indices = fetched["beam_indices"][kept]
    new_tokens = (beam_indices >= 0).sum(axis=2).max()
    columns = call.columns + new_tokens
    fields = {
        "sequences": fetched["sequences"][kept].reshape(-1, fetched["sequences"].shape[2])[:, :columns].copy(),
        "beam_indices": beam_indices.reshape(-1, beam_indices.shape[2])[:, :new_tokens].copy(),
    }
    if "scores" in fetched:
        fields["sequences_scores"] = fetched["sequences_scores"][kept].reshape(-1)
    return fields


def _slots(call: Call, cache: Any, steps: int) -> np.ndarray:
    """int [rows, C, L]: where in the cache each continuation has its columns."""
    rows, beams, base = call.rows * call.strategy.copies, call.config.num_beams, call.seen[-1] + 1
    generated = base + np.broadcast_to(np.arange(steps - 1), (rows, 1, steps - 1))
    if beams > 1:
        # Of the C slots of each step, a beam attends one: its ancestor's.
        valid = np.asarray(cache.valid)[:rows, :, base : base + beams * (steps - 1)]
        own = valid.reshape(rows, beams, steps - 1, beams).argmax(axis=3)
        generated = base + beams * np.arange(steps - 1) + own
    return np.concatenate([np.broadcast_to(call.seen, (*generated.shape[:2], len(call.seen))), generated], axis=2)


def _internals(
    name: str, call: Call, fetched: dict[str, Any], state: DecodeState, steps: int
) -> tuple[tuple[np.ndarray, ...], ...]:
    """Transformers' tuple over steps of tuples over layers, from the buffers and their buckets.

    The first are of the prompt, a row for each of its sequences; of a prompt in chunks they are of the last one. Later
    ones are of one column per row, or per branch: each beam is a row of what is returned, and of the candidates of
    contrastive search the chosen one is. Of the slots that a column may attend, those of its past are left.
    """
    first, later = jax.device_get((state.prompt_internals[name], state.step_internals[name]))
    base, beams = call.seen[-1] + 1, call.config.num_beams
    rows = call.rows * call.strategy.copies
    fresh = call.fresh if call.prompt.chunk is None else (call.fresh - 1) % call.prompt.chunk + 1

    def prompt(array: np.ndarray) -> np.ndarray:
        repeated = np.repeat(array[: call.rows], call.strategy.copies * beams, axis=0)
        return repeated[:, :, -fresh:][..., call.seen] if name == "attentions" else repeated[:, -fresh:]

    def step(array: np.ndarray, place: int) -> np.ndarray:
        """[N, C, D] -> [N * beams, 1, D], or [N, Q, C, S] -> [N * beams, Q, 1, t]."""
        array = array[:rows]
        generated = base + np.broadcast_to(np.arange(place + 1), (rows, 1, place + 1))
        if "chosen" in fetched:
            branch = fetched["chosen"][place + 1][:rows]
            array = np.take_along_axis(array, branch.reshape(-1, *[1] * (array.ndim - 1)), axis=-2)
            generated = np.concatenate([generated[..., :-1], base + place + branch[:, None, None]], axis=2)
        elif "parents" in fetched:
            generated = base + ancestors[place][:rows] + beams * np.arange(place + 1)
        if name == "hidden_states":
            return array.reshape(-1, 1, array.shape[-1])
        seen = np.broadcast_to(call.seen, (*generated.shape[:2], len(call.seen)))
        taken = np.take_along_axis(array, np.concatenate([seen, generated], axis=2)[:, None], axis=3)
        return taken.swapaxes(1, 2).reshape(-1, taken.shape[1], 1, taken.shape[3])

    ancestors = _ancestors(fetched["parents"], steps) if "parents" in fetched else []
    own = (
        tuple(prompt(layer) for layer in first),
        *(tuple(step(layer[place], place) for layer in later) for place in range(steps - 1)),
    )
    if call.config.use_cache:
        return own
    first_beams = beams * np.arange(rows)[:, None, None]
    lineages = [(first_beams + each[:rows]).reshape(rows * beams, -1).T for each in ancestors[: steps - 1]]
    return _of_the_whole_text(own, lineages)


def _of_the_whole_text(
    own: tuple[tuple[np.ndarray, ...], ...], lineages: Sequence[np.ndarray]
) -> tuple[tuple[np.ndarray, ...], ...]:
    """What a forward pass over the whole text, as transformers makes without a cache, gives at every step.

    A column sees nothing after it, so its numbers are those of the step that first read it. Without beams the steps are
    read-only views of the last one, since each holds all that came before.

    Args:
        own: of each step its new columns, per layer [N, T, D] or [N, Q, T, S].
        lineages: with beams, of each step but the first, int [t, N]: the rows of all steps up to it that its rows
            descend from.
    """
    layers, steps = len(own[0]), len(own)

    def whole(layer: int, lineage: Iterable[Any]) -> np.ndarray:
        parts = [own[0][layer], *(own[step + 1][layer][rows] for step, rows in enumerate(lineage))]
        if parts[0].ndim == 3:
            return np.concatenate(parts, axis=1)
        width = parts[-1].shape[3]
        return np.concatenate([np.pad(each, (*[(0, 0)] * 3, (0, width - each.shape[3]))) for each in parts], axis=2)

    if lineages:
        return own[0], *(tuple(whole(layer, lineage) for layer in range(layers)) for lineage in lineages)
    last = [whole(layer, [slice(None)] * (steps - 1)) for layer in range(layers)]
    for array in last:
        array.flags.writeable = False
    widths = [last[0].shape[-2] - steps + 1 + step for step in range(steps)]
    return tuple(
        tuple(array[:, :width] if array.ndim == 3 else array[:, :, :width, :width] for array in last)
        for width in widths
    )


def _ancestors(parents: np.ndarray, steps: int) -> list[np.ndarray]:
    """Of each forward pass after the prompt's, int [B, C, t]: the branch of each step that a branch descends from."""
    own = np.broadcast_to(np.arange(parents.shape[2])[:, None], (*parents.shape[1:], 1))
    ancestors = [own]
    for step in range(1, steps - 1):
        continued = np.take_along_axis(ancestors[-1], parents[step][:, :, None], axis=1)
        ancestors.append(np.concatenate([continued, own], axis=2))
    return ancestors


def compute_transition_scores(
    sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
) -> np.ndarray:
    """The scores of the chosen tokens. Same as transformers 5.24 `GenerationMixin.compute_transition_scores`.

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
