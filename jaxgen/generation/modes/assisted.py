"""Assisted decoding, with drafts from prompt lookup."""

from typing import TYPE_CHECKING

from jaxgen.decoding.assisted import Assisted
from jaxgen.decoding.drafters import PromptLookup
from jaxgen.generation.config.validators import integer, positive
from jaxgen.generation.modes.base import Parts
from jaxgen.generation.modes.sampling import SamplingMode

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

_MOST_DRAFTED = 64  # a longer draft is hardly ever right to its end, and each of its tokens costs time
_COMPARED = 4  # sizes of n-grams that share a program


class AssistedMode(SamplingMode):
    @classmethod
    def applies(cls, fields: "GenerationConfig") -> bool:
        return fields.prompt_lookup_num_tokens is not None

    @classmethod
    def check(cls, fields: "GenerationConfig") -> None:
        if (drafted := positive("prompt_lookup_num_tokens", fields.prompt_lookup_num_tokens)) is None:
            return
        if drafted > _MOST_DRAFTED:
            raise ValueError(f"`prompt_lookup_num_tokens`={drafted} must be from 1 to {_MOST_DRAFTED}.")
        compared = integer("max_matching_ngram_size", fields.max_matching_ngram_size)
        if compared is not None and not 0 <= compared <= _MOST_DRAFTED:
            raise ValueError(f"`max_matching_ngram_size`={compared} must be from 0 to {_MOST_DRAFTED}.")
        for name, off in (("num_beams", 1), ("penalty_alpha", 0)):
            if (value := getattr(fields, name, None)) not in (None, off):
                raise ValueError(
                    f"`prompt_lookup_num_tokens`={drafted} is for greedy decoding and sampling, and does not go with "
                    f"`{name}`={value}. Leave out one of them."
                )
        if fields.use_cache is False:
            raise ValueError(
                f"`prompt_lookup_num_tokens`={drafted} needs a cache. Leave out `use_cache`=False, as in transformers."
            )

    @property
    def _drafter(self) -> PromptLookup:
        fields = self.config.merged
        drafted, compared = int(fields.prompt_lookup_num_tokens), int(fields.max_matching_ngram_size or 2)
        # A pass reads one token more than the draft: widths of 2, 4, 8, 12, 16, ... share a program.
        width = drafted + 1 if drafted < 4 else -(-(drafted + 1) // 4) * 4
        return PromptLookup(drafted, compared, width - 1, -(-compared // _COMPARED) * _COMPARED)

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        if intermediates:
            raise ValueError(
                f"`output_{intermediates[0]}`=True does not go with `prompt_lookup_num_tokens`, which reads several "
                "tokens per step. Leave out one of them."
            )
        return super().recorded(intermediates, logprobs)

    def build(self, parts: Parts) -> Assisted:
        if parts.on_host:
            raise ValueError(
                "`prompt_lookup_num_tokens` does not go with a processor or criterion that runs on the host. Write it "
                "as a JAX function of (input_ids, scores, cur_len), or leave out one of them."
            )
        return Assisted(
            eos=parts.eos,
            max_length=parts.max_length,
            pad_token_id=self.pad_token_id(parts),
            drafter=self._drafter,
            key=parts.key,
            processors=parts.processors,
            stopping_criteria=parts.stopping_criteria,
            num_return_sequences=self.config.num_return_sequences,
            outputs=parts.recorded,
            whole_cache=self.config.return_dict_in_generate and self.config.use_cache,
        )
