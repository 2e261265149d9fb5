"""Beam search and beam sampling."""

from typing import Any

from jaxgen.decoding.beam_search import BeamSearch
from jaxgen.generation.modes.base import Parts
from jaxgen.generation.modes.beams import BeamsMode
from jaxgen.generation.validators import positive


class BeamSearchMode(BeamsMode):
    @classmethod
    def applies(cls, fields: Any) -> bool:
        return (positive("num_beams", fields.num_beams) or 1) > 1

    @property
    def rows_per_criterion(self) -> int:
        return self.num_beams * self.candidates_per_beam  # beams are finished, or not, while they are candidates

    def build(self, parts: Parts) -> BeamSearch:
        self.check_candidates(parts)
        eos = self.config.eos_token_id
        return BeamSearch(
            eos=parts.eos,
            max_length=parts.max_length,
            # Same as transformers 5.24, which takes a `pad_token_id` of 0 for a missing one.
            fill=(self.config.pad_token_id or eos[0]) if eos else -1,
            length_penalty=self.length_penalty,
            stop_when_full=self.stop_when_full,
            assume_longest=self.assume_longest,
            longest=parts.longest,
            key=parts.key,
            processors=parts.processors,
            stopping_criteria=parts.stopping_criteria,
            num_beams=self.num_beams,
            num_candidates=self.candidates_per_beam * self.num_beams,
            outputs=parts.recorded,
        )
