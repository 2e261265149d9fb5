"""Greedy decoding and sampling: one token per row and step."""

from typing import TYPE_CHECKING

from jaxgen.base import Strategy
from jaxgen.decoding.sampling import Sample
from jaxgen.generation.modes.base import Mode, Parts

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig


class SamplingMode(Mode):
    @classmethod
    def applies(cls, fields: "GenerationConfig", assistant_model: object = None) -> bool:
        del fields, assistant_model
        return True

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        return (*super().recorded(intermediates, False), *(["logprobs"] if logprobs else []))

    def build(self, parts: Parts) -> Strategy:
        return Sample(
            eos=parts.eos,
            max_length=parts.max_length,
            pad_token_id=self.pad_token_id(parts),
            key=parts.key,
            processors=parts.processors,
            stopping_criteria=parts.stopping_criteria,
            num_return_sequences=self.config.num_return_sequences,
            outputs=parts.recorded,
            vocab_shards=parts.vocab_shards,
        )
