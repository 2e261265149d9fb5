"""Beam search and beam sampling."""

from typing import TYPE_CHECKING

from jaxgen.decoding.beam_search import BeamSearch
from jaxgen.generation.config.validators import positive
from jaxgen.generation.modes.base import Parts
from jaxgen.generation.modes.beams import BeamsMode

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig


class BeamSearchMode(BeamsMode):
    @classmethod
    def applies(cls, fields: "GenerationConfig", assistant_model: object = None) -> bool:
        del assistant_model
        return (positive("num_beams", fields.num_beams) or 1) > 1

    @property
    def rows_per_criterion(self) -> int:
        return self.num_beams * self.candidates_per_beam  # criteria are asked about candidates

    def build(self, parts: Parts) -> BeamSearch:
        self.check_candidates(parts)
        eos = self.config.eos_token_id
        return BeamSearch(
            eos=parts.eos,
            max_length=parts.max_length,
            # Same as transformers 5.24, which treats a `pad_token_id` of 0 as not set.
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
            vocab_shards=parts.vocab_shards,
        )
