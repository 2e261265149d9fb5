"""The part that the modes with beams share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.base import Cache
from jaxgen.buckets import bucket
from jaxgen.exchange import fetch
from jaxgen.generation.config.validators import number, positive
from jaxgen.generation.modes.base import Mode, Parts
from jaxgen.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig


class BeamsMode(Mode):
    """Several beams per prompt that share a cache. A step reads one token per beam, in C neighbouring slots."""

    output = GenerateBeamDecoderOnlyOutput
    encoder_decoder_output = GenerateBeamEncoderDecoderOutput
    streams = False  # beams may change their tokens until the end

    @classmethod
    def check(cls, fields: "GenerationConfig", assistant_model: object = None) -> None:
        del assistant_model
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
        """Enough candidates for every beam to continue, even if all the others are end-of-sequence ids."""
        return max(2, 1 + len(self.config.eos_token_id))

    def check_candidates(self, parts: Parts) -> None:
        if self.candidates_per_beam > parts.vocab_size:
            raise ValueError(
                f"`eos_token_id` holds {len(self.config.eos_token_id)} ids, but the vocabulary has only "
                f"{parts.vocab_size} ids, and beams need other ids to continue. Pass fewer."
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

    def text_slots(self, columns: int, new_tokens: int) -> int:
        return columns + bucket(new_tokens)  # rounded up by themselves, since each new token takes a slot per beam

    def texts(self, fetched: Mapping[str, np.ndarray], rows: int, prompt_length: int) -> dict[str, np.ndarray]:
        """The beams to return, padded to the longest of them, with their scores and indices."""
        kept = (slice(rows), slice(self.config.num_return_sequences))  # of [N, C, ...], best beams first
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

    # Slots after the prompt with 3 beams. A beam attends to one slot of each step: its ancestor's.
    #
    #     step           0       1       2
    #     slots        0 1 2 | 3 4 5 | 6 7 8
    #     beam 0         1         5   6        it continues beam 2 of step 1, which continues beam 1 of step 0

    def cached_steps(self, cache: Cache, first: int, rows: int, steps: int) -> np.ndarray:
        beams = self.num_beams
        # `valid` [rows, C, S] is True at one slot of each step, so `argmax` over the last axis finds the ancestor.
        attended = fetch(cache.valid)[:rows, :, first : first + beams * steps]
        return beams * np.arange(steps) + attended.reshape(rows, beams, steps, beams).argmax(axis=3)

    def attended_steps(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        lines = ancestors(fetched["parents"][:, :rows], steps)
        return [self.num_beams * np.arange(step + 1) + line for step, line in enumerate(lines)]

    def lineages(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        first_beams = self.num_beams * np.arange(rows)[:, None, None]  # row 0 of each prompt, in the flat [B * C]
        lines = ancestors(fetched["parents"][:, :rows], steps)
        return [(first_beams + line).reshape(rows * self.num_beams, -1).T for line in lines]


def ancestors(parents: np.ndarray, steps: int) -> list[np.ndarray]:
    """For each step after the prompt, int [B, C, step]: the ancestor of each beam at each step so far.

    Args:
        parents: int [steps, B, C]. The beam of the previous step that each beam continues.
        steps: the number of steps to return.
    """
    # A beam has its parent's ancestors, followed by itself:
    #
    #     lines[0]          0, 1, 2              3 beams after step 0
    #     parents[1]        1, 1, 0
    #     lines[1]          1 0, 1 1, 0 2        their ancestors after step 1
    beams = np.broadcast_to(np.arange(parents.shape[2])[:, None], (*parents.shape[1:], 1))
    lines = [beams][:steps]
    for step in range(1, steps):
        continued = np.take_along_axis(lines[-1], parents[step][:, :, None], axis=1)  # [B, C, step]
        lines.append(np.concatenate([continued, beams], axis=2))
    return lines
