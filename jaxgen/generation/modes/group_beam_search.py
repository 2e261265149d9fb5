"""Diverse beam search, with the fields and checks of transformers 4.41."""

from typing import TYPE_CHECKING

from jaxgen.decoding.group_beam_search import GroupBeamSearch
from jaxgen.generation.config.validators import number, positive
from jaxgen.generation.modes.base import Parts
from jaxgen.generation.modes.beams import BeamsMode

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig


class GroupBeamSearchMode(BeamsMode):
    @classmethod
    def applies(cls, fields: "GenerationConfig", assistant_model: object = None) -> bool:
        del assistant_model
        return (positive("num_beam_groups", fields.num_beam_groups) or 1) > 1

    @classmethod
    def check(cls, fields: "GenerationConfig", assistant_model: object = None) -> None:
        del assistant_model
        super().check(fields)
        groups, beams = positive("num_beam_groups", fields.num_beam_groups) or 1, fields.num_beams or 1
        penalty = number("diversity_penalty", fields.diversity_penalty, 0.0)
        if groups == 1:
            if penalty:
                raise ValueError(
                    f"`diversity_penalty`={penalty} acts between groups of beams. Pass `num_beam_groups` too."
                )
            return
        if beams % groups:
            raise ValueError(
                f"`num_beams`={beams} must be a multiple of `num_beam_groups`={groups}: all groups have the same size."
            )
        if not penalty > 0:
            raise ValueError(
                f"`diversity_penalty`={penalty} must be above 0: otherwise all {groups} groups find the same beams."
            )
        if fields.do_sample:
            raise ValueError(
                "`do_sample`=True cannot be combined with `num_beam_groups`: diverse beam search does not sample."
            )

    @classmethod
    def unheeded(cls, fields: "GenerationConfig") -> dict[str, object]:
        grouped = (fields.num_beams or 1) != 1 and (fields.num_beam_groups or 1) != 1
        return {} if grouped else {"num_beam_groups": 1, "diversity_penalty": 0.0}

    @property
    def num_beam_groups(self) -> int:
        return positive("num_beam_groups", self.config.merged.num_beam_groups) or 1

    @property
    def rows_per_processor(self) -> int:
        return self.num_beams // self.num_beam_groups

    def build(self, parts: Parts) -> GroupBeamSearch:
        self.check_candidates(parts)
        eos, pad = self.config.eos_token_id, self.config.fill_token_id
        return GroupBeamSearch(
            eos=parts.eos,
            max_length=parts.max_length,
            pad_token_id=pad,
            last_token=eos[0] if eos else pad,
            diversity_penalty=number("diversity_penalty", self.config.merged.diversity_penalty, 0.0),
            length_penalty=self.length_penalty,
            stop_when_full=self.stop_when_full,
            assume_longest=self.assume_longest,
            longest=parts.longest,
            processors=parts.processors,
            stopping_criteria=parts.stopping_criteria,
            num_beams=self.num_beams,
            num_beam_groups=self.num_beam_groups,
            num_candidates=self.candidates_per_beam * self.rows_per_processor,
            outputs=parts.recorded,
            vocab_shards=parts.vocab_shards,
        )
