"""Diverse beam search: the sequences of transformers 4.41 `GenerationMixin._group_beam_search`.

The C beams of each prompt form groups of equal size. Within a step the groups search one after the other, and a token
that earlier groups have just chosen costs a penalty (Vijayakumar et al. 2016, arXiv 1610.02424). Each group has its own
finished beams and ends by itself. The prompt's forward pass runs once; see `kv_cache.BranchedCache`.

```
row of a prompt    0   1   2   3   4   5       C = 6, num_beam_groups = 3, group_size = 2
group              0   0   1   1   2   2
```
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.base import (
    EosCriterion,
    Intermediates,
    LengthCriterion,
    LogitsProcessor,
    Prompt,
    StoppingCriterion,
    Strategy,
    step_buffers,
    write_step,
)
from jaxgen.decoding.beams import NEVER, Beams, take
from jaxgen.processors.logits_process import process, reorder
from jaxgen.processors.stopping_criteria import any_of
from jaxgen.processors.top_k import blocked_top_k
from jaxgen.pytree import Bool, Float32, Int32, pytree

_LOWEST = float(np.finfo(np.float32).min)  # finite, for users of `jax_debug_infs`


@pytree
@dataclass(frozen=True)
class Group:
    """The beams of one group, for each prompt.

    Attributes:
        running: the unfinished beams, `group_size` per prompt.
        finished: the `group_size` best finished beams so far, filled up with placeholders whose `finished` is False.
        done: bool [B]. Prompts that need no more tokens from this group; rows of the bucket are done from the start.
        processors: the states of the processors.
    """

    running: Beams
    finished: Beams
    done: jax.Array
    processors: tuple[object, ...]


@pytree
@dataclass(frozen=True)
class GroupState:
    """The state of a group beam search.

    Attributes:
        groups: one per group of beams, `num_beam_groups` in all.
        cur_len: int32 []. Valid columns of the running beams.
        prompt_length: int32 []. Columns of the caller's prompt.
        rows: int32 []. Rows of the caller's prompt.
        tokens: int32 [B * C]. The last column of the running beams.
        parents: int32 [B, C]. The running beam that each running beam continues, 0 to C - 1.
        ended: bool []. Whether no prompt needs another token.
        invalid: bool [B]. Prompts whose scores held a NaN, an infinity, or no finite number.
        recorded: the outputs asked for, in buffers with a leading axis of steps.
    """

    groups: tuple[Group, ...]
    cur_len: jax.Array
    prompt_length: jax.Array
    rows: jax.Array
    tokens: jax.Array
    parents: jax.Array
    ended: jax.Array
    invalid: jax.Array
    recorded: dict[str, jax.Array]


@pytree
@dataclass(frozen=True)
class GroupBeamSearch(Strategy[GroupState]):
    """Keeps likely continuations of each prompt that differ from one another.

    Attributes:
        eos: finishes a beam; see `EosToken`.
        max_length: ends the decode; see `MaxLength`.
        pad_token_id: int32 []. The token after the end of a beam.
        last_token: int32 []. Written in place of whichever eos ended a beam: the first eos, as in transformers 4.41.
        diversity_penalty: float32 []. Subtracted from a token's score for each time that earlier groups chose it.
        length_penalty, stop_when_full, assume_longest, longest: as in `BeamSearch`.
        processors: applied to log-probabilities of one group at a time, in this order; see `logits_process`.
        stopping_criteria: the caller's own. The decode ends when they finish all running beams at once.
        num_beams: C, static.
        num_beam_groups: static; divides C.
        num_candidates: W, static: the candidates of a group, which finish or keep running.
        outputs: the arrays to record at every step, static: "scores", "logits", "parents".
        vocab_shards: static. The number of devices that the vocabulary is sharded over; see `blocked_top_k`.
    """

    eos: EosCriterion
    max_length: LengthCriterion
    pad_token_id: Int32
    last_token: Int32
    diversity_penalty: Float32
    length_penalty: Float32
    stop_when_full: Bool
    assume_longest: Bool
    longest: Int32
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    num_beams: int = field(default=4, metadata={"static": True})
    num_beam_groups: int = field(default=2, metadata={"static": True})
    num_candidates: int = field(default=4, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})
    vocab_shards: int = field(default=1, metadata={"static": True})

    @property
    def branches(self) -> int:
        return self.num_beams

    @property
    def group_size(self) -> int:
        """The number of beams in a group."""
        return self.num_beams // self.num_beam_groups

    def cache_slots(self, columns: int, new_tokens: int) -> int:
        return columns + self.num_beams * new_tokens

    @property
    def log_probabilities(self) -> bool:
        return True

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> GroupState:
        rows, columns = prompt.input_ids.shape
        beams = Beams.of_prompts(prompt, slots, self.pad_token_id, self.group_size)
        repeated = prompt.repeated(self.group_size)
        group = Group(
            # All beams start as copies of the prompt. Only the first one may win, or all would choose the same tokens.
            running=replace(beams, scores=beams.scores.at[:, 1:].set(NEVER)),
            # transformers 4.41 starts without finished beams, so these placeholders lose against any score.
            finished=replace(beams, scores=jnp.full_like(beams.scores, _LOWEST)),
            done=jnp.arange(rows) >= prompt.rows,
            processors=tuple(processor.init(repeated, vocab_size) for processor in self.processors),
        )
        per_token = jax.ShapeDtypeStruct((rows * self.num_beams, vocab_size), jnp.float32)
        per_beam = jax.ShapeDtypeStruct((rows, self.num_beams), jnp.int32)
        shapes = {"scores": per_token, "logits": per_token, "parents": per_beam}
        return GroupState(
            groups=(group,) * self.num_beam_groups,
            cur_len=prompt.length,
            prompt_length=prompt.length,
            rows=prompt.rows,
            tokens=jnp.repeat(prompt.input_ids[:, -1], self.num_beams),
            parents=jnp.zeros((len(prompt.input_ids), self.num_beams), jnp.int32),
            ended=jnp.bool_(False),
            invalid=jnp.zeros(rows, bool),
            recorded=step_buffers(self.outputs, slots - columns, shapes),
        )

    def step(self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: GroupState) -> GroupState:
        # [B * C, V] -> [B, num_beam_groups, group_size, V]: the beams of a group are neighbours.
        by_group = scores.reshape(-1, self.num_beam_groups, self.group_size, scores.shape[1])
        counts = jnp.zeros((len(by_group), scores.shape[1]), jnp.float32)  # of each token, chosen by earlier groups
        steps: list[_GroupStep] = []
        for index in range(self.num_beam_groups):
            penalised = by_group[:, index] - self.diversity_penalty * counts[:, None]
            steps.append(self._search(index, penalised, state))
            counts = counts.at[jnp.arange(len(counts))[:, None], steps[-1].tokens].add(1)

        tokens = jnp.concatenate([step.tokens for step in steps], axis=1)
        parents = jnp.concatenate([step.parents for step in steps], axis=1)
        processed = jnp.concatenate([step.scores for step in steps], axis=1).reshape(scores.shape)
        groups = tuple(step.group for step in steps)
        sequences = jnp.concatenate([group.running.sequences for group in groups], axis=1)
        sequences = sequences.reshape(len(scores), -1)
        unused = jnp.repeat(jnp.arange(len(by_group)) >= state.rows, self.num_beams)
        criteria = self.eos, self.max_length, *self.stopping_criteria
        # Criteria see the running beams of all groups as one batch.
        hits = unused | any_of(criteria, sequences, processed, state.cur_len + 1)
        values = {"scores": processed, "logits": logits, "parents": parents}
        return GroupState(
            groups=groups,
            cur_len=state.cur_len + 1,
            prompt_length=state.prompt_length,
            rows=state.rows,
            tokens=tokens.reshape(-1),
            parents=parents,
            ended=jnp.stack([group.done for group in groups]).all() | hits.all(),
            invalid=state.invalid | jnp.stack([step.invalid for step in steps]).any(axis=0),
            recorded=write_step(state.recorded, values, state.cur_len - state.prompt_length),
        )

    def _search(self, index: int, scores: jax.Array, state: GroupState) -> "_GroupStep":
        """One step of one group, from its float32 [B, group_size, V] penalised log-probabilities."""
        group, size, first = state.groups[index], self.group_size, index * self.group_size
        running, vocab_size = group.running, scores.shape[2]
        sequences = running.sequences.reshape(-1, running.sequences.shape[2])
        scores, states = process(
            self.processors, sequences, scores.reshape(-1, vocab_size), state.cur_len, group.processors
        )
        scores = scores.reshape(-1, size, vocab_size)
        # Of [B, group_size, V], index i of a row is token i % V after beam i // V of the group.
        totals = scores + running.scores[:, :, None]
        values, indices, invalid = blocked_top_k(totals, self.num_candidates, self.vocab_shards)
        sources, tokens = indices // vocab_size, indices % vocab_size
        ends = (tokens[:, :, None] == self.eos.eos_token_id[None, None]).any(axis=2)
        tokens = jnp.where(ends, self.last_token, tokens)
        # Beam `first + c` of prompt p is row p * C + first + c of the step's scores.
        rows = jnp.arange(len(scores))[:, None] * self.num_beams + first + sources
        step = state.cur_len - state.prompt_length
        candidates = running.extend(sources, tokens, values, rows, state.cur_len, step)

        # The first candidates without an eos keep running: ends [0, 1, 0, 0] -> argsort [0, 2, 3, 1] -> 0 and 2 for two
        # beams. In a prompt that is done, every beam continues itself with padding instead.
        going_on = jnp.argsort(ends, axis=1, stable=True)[:, :size]
        done = group.done[:, None]
        same_beam = jnp.broadcast_to(jnp.arange(size), going_on.shape)
        next_tokens = jnp.where(done, self.pad_token_id, take(tokens, going_on))
        parents = jnp.where(done, same_beam, take(sources, going_on))
        rows = jnp.arange(len(scores))[:, None] * self.num_beams + first + parents
        # Beams of a prompt that is done get the score 0, as in transformers.
        continued = running.extend(
            parents, next_tokens, jnp.where(done, 0, take(values, going_on)), rows, state.cur_len, step
        )

        # As in beam search, only the first `group_size` candidates may finish.
        finishes = ends & (jnp.arange(self.num_candidates) < size)[None] & ~done
        finished = group.finished.beside(self._scored(candidates, finishes, step + 1)).best(size)
        # Both are sorted, so this compares the best candidate with the worst finished beam.
        best = values[:, 0] / self._new_tokens(state).astype(jnp.float32) ** self.length_penalty
        hopeless = finished.scores[:, -1] >= best
        is_done = group.done | (finished.finished.all(axis=1) & (self.stop_when_full | hopeless))
        # The processors see one group at a time, so their rows are [B * group_size].
        processor_rows = jnp.arange(len(scores))[:, None] * size + parents
        states = reorder(self.processors, states, processor_rows.reshape(-1))
        following = Group(running=continued, finished=finished, done=is_done, processors=states)
        return _GroupStep(following, next_tokens, first + parents, scores, invalid & ~group.done)

    def _scored(self, beams: Beams, finished: jax.Array, new_tokens: jax.Array) -> Beams:
        """The beams with their scores as finished beams, or `_LOWEST` where they are not `finished`."""
        scores = beams.scores / new_tokens.astype(jnp.float32) ** self.length_penalty
        return replace(beams, scores=jnp.where(finished, scores, _LOWEST), finished=finished)

    def _new_tokens(self, state: GroupState) -> jax.Array:
        """int32 []: the number of tokens at which a running beam is compared with the finished ones."""
        return jnp.where(self.assume_longest, self.longest, state.cur_len + 1) - state.prompt_length

    def parents(self, state: GroupState) -> jax.Array:
        return state.parents

    def unfinished(self, state: GroupState) -> jax.Array:
        return ~state.ended

    def finalize(self, state: GroupState) -> Mapping[str, jax.Array]:
        """As `BeamSearch.finalize`: all C beams of each prompt, best first, groups mixed."""
        final = []
        for group in state.groups:
            # At the maximum length, running beams of prompts that are not done compete with the finished ones.
            not_done = jnp.broadcast_to(~group.done[:, None], group.running.scores.shape)
            running = self._scored(group.running, not_done, state.cur_len - state.prompt_length)
            final.append(group.finished.beside(running).best(self.group_size))
        beams = final[0]
        for others in final[1:]:
            beams = beams.beside(others)
        beams = beams.best(self.num_beams)
        return {
            "sequences": beams.sequences,
            "length": state.cur_len,
            "invalid": state.invalid,
            "sequences_scores": beams.scores,
            "beam_indices": beams.beam_indices,
            **state.recorded,
        }


class _GroupStep(NamedTuple):
    """A step of one group.

    Attributes:
        group: its new state.
        tokens, parents: int32 [B, group_size]; as in `GroupState`, for this group.
        scores: float32 [B, group_size, V]. After the processors.
        invalid: bool [B].
    """

    group: Group
    tokens: jax.Array
    parents: jax.Array
    scores: jax.Array
    invalid: jax.Array
