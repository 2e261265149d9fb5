"""What the modes with beams have in common."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.base import Cache
from jaxgen.buckets import bucket
from jaxgen.generation.modes.base import Mode, Parts
from jaxgen.generation.outputs import GenerateBeamDecoderOnlyOutput
from jaxgen.generation.validators import number, positive


class BeamsMode(Mode):
    """Several texts per prompt that share a cache: a step reads a column for each, in C slots side by side."""

    output = GenerateBeamDecoderOnlyOutput
    streams = False  # beams change their tokens until the end

    @classmethod
    def check(cls, fields: Any) -> None:
        positive("num_beams", fields.num_beams)
        number("length_penalty", fields.length_penalty, 1.0)
        if type(early := fields.early_stopping) is int and not early:  # 0, as in some files
            return
        if not isinstance(early, (bool, np.bool_, type(None))) and early != "never":
            raise ValueError(f"`early_stopping` must be a boolean or 'never', but is {early!r}.")

    @property
    def num_beams(self) -> int:
        return positive("num_beams", self.config.merged.num_beams) or 1

    @property
    def length_penalty(self) -> float:
        return number("length_penalty", self.config.merged.length_penalty, 1.0)

    @property
    def stop_when_full(self) -> bool:
        return self.config.merged.early_stopping != "never" and bool(self.config.merged.early_stopping)

    @property
    def assume_longest(self) -> bool:
        return self.config.merged.early_stopping == "never" and self.length_penalty > 0

    @property
    def candidates_per_beam(self) -> int:
        """Enough for every beam to go on though the likeliest tokens end it."""
        return max(2, 1 + len(self.config.eos_token_id))

    def check_candidates(self, parts: Parts) -> None:
        if self.candidates_per_beam > parts.vocab_size:
            raise ValueError(
                f"`eos_token_id` holds {len(self.config.eos_token_id)} ids, but a model with {parts.vocab_size} ids "
                "needs one that is none of them to go on. Pass fewer."
            )

    def check_streamer(self) -> None:
        raise ValueError("`streamer` cannot be used with beam search (yet!). Make sure that `num_beams` is set to 1.")

    def check_stream(self) -> None:
        raise ValueError(
            f"`stream` cannot follow `num_beams`={self.num_beams}: beams change their tokens until the end. Use "
            "`generate`, or one beam."
        )

    @property
    def sequences_per_prompt(self) -> int:
        return self.num_beams

    @property
    def min_tokens_to_keep(self) -> int:
        return self.candidates_per_beam

    @property
    def whole_texts_per_step(self) -> bool:
        return True

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        sorted_by_beam = "attentions" in intermediates or (intermediates and not self.config.use_cache)
        return (*super().recorded(intermediates, logprobs), *(["parents"] if sorted_by_beam else []))

    def text_slots(self, prompt_slots: int, new_tokens: int) -> int:
        return prompt_slots + bucket(new_tokens)  # every further column costs a slot for each beam

    def texts(self, fetched: Mapping[str, np.ndarray], rows: int, prompt_length: int) -> dict[str, np.ndarray]:
        """The beams to return, as wide as the longest of them, with their scores and indices."""
        kept = (slice(rows), slice(self.config.num_return_sequences))
        beam_indices = fetched["beam_indices"][kept]
        new_tokens = (beam_indices >= 0).sum(axis=2).max()
        width = prompt_length + new_tokens
        fields = {
            "sequences": fetched["sequences"][kept].reshape(-1, fetched["sequences"].shape[2])[:, :width].copy(),
            "beam_indices": beam_indices.reshape(-1, beam_indices.shape[2])[:, :new_tokens].copy(),
        }
        if "scores" in fetched:
            fields["sequences_scores"] = fetched["sequences_scores"][kept].reshape(-1)
        return fields

    # Slots behind the prompt, for 3 beams: step 0 wrote 0 1 2, step 1 wrote 3 4 5, step 2 wrote 6 7 8. A beam attends
    # one of each three. If beam 0 comes from beam 2 of step 1, and that from beam 1 of step 0, then these are 1, 5, 6.

    def cached_steps(self, cache: Cache, first: int, rows: int, steps: int) -> np.ndarray:
        beams = self.num_beams
        attended = np.asarray(cache.valid)[:rows, :, first : first + beams * steps]
        return beams * np.arange(steps) + attended.reshape(rows, beams, steps, beams).argmax(axis=3)

    def attended_steps(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        lines = ancestors(fetched["parents"][:, :rows], steps)
        return [self.num_beams * np.arange(step + 1) + line for step, line in enumerate(lines)]

    def lineages(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        first_beams = self.num_beams * np.arange(rows)[:, None, None]
        lines = ancestors(fetched["parents"][:, :rows], steps)
        return [(first_beams + line).reshape(rows * self.num_beams, -1).T for line in lines]


def ancestors(parents: np.ndarray, steps: int) -> list[np.ndarray]:
    """Of each step after the prompt's, int [B, C, t]: the beam of each step so far that a beam descends from.

    Args:
        parents: int [T, B, C]. Which beam of the step before each one continues.
        steps: how many to give.
    """
    own = np.broadcast_to(np.arange(parents.shape[2])[:, None], (*parents.shape[1:], 1))
    lines = [own][:steps]
    for step in range(1, steps):
        continued = np.take_along_axis(lines[-1], parents[step][:, :, None], axis=1)
        lines.append(np.concatenate([continued, own], axis=2))
    return lines
