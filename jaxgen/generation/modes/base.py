"""What `generate` asks of a decoding mode, and the answers of most of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxgen.base import Cache, LogitsProcessor, Strategy
from jaxgen.buckets import bucket
from jaxgen.generation.decode_config import DecodeConfig
from jaxgen.generation.inputs import Inputs
from jaxgen.generation.outputs import GenerateDecoderOnlyOutput, GenerateOutput
from jaxgen.processors.stopping_criteria import EosToken, MaxLength


@dataclass(frozen=True)
class Parts:
    """What `generate` has made of its arguments by the time that a strategy is built of it.

    Attributes:
        eos, max_length, processors, stopping_criteria: for the strategy as they are.
        longest: `max_length`, whatever criteria end a text before or after it.
        key: see `Sample.key`; None unless `do_sample`.
        vocab_size: V.
        recorded: what to record of every step, see `Mode.recorded`.
    """

    eos: EosToken
    max_length: MaxLength
    processors: tuple[LogitsProcessor, ...]
    stopping_criteria: tuple[Any, ...]
    longest: int
    key: Any
    vocab_size: int
    recorded: tuple[str, ...]


@dataclass(frozen=True)
class Mode:
    """The host half of a decoding mode: how it reads the configuration, and what its outputs are.

    The device half is the strategy of the same name in `decoding/`. Everything that depends on the mode is asked here;
    what is written below holds for one text per row, which no later step changes.

    Attributes:
        config: of the call.
    """

    config: DecodeConfig
    output: ClassVar[type[GenerateOutput]] = GenerateDecoderOnlyOutput
    streams: ClassVar[bool] = True  # whether tokens can be shown before the end

    # Of the configuration, before there is a mode

    @classmethod
    def applies(cls, fields: Any) -> bool:
        """Whether a GenerationConfig asks for this mode; the first of `MODES` that says so is it."""
        raise NotImplementedError

    @classmethod
    def check(cls, fields: Any) -> None:
        """Raises a ValueError if the mode's own fields are out of range or do not go together; asked of all modes."""

    @classmethod
    def unheeded(cls, fields: Any) -> dict[str, Any]:
        """The mode's own fields that transformers does not heed beside the others, with the values that mean off."""
        del fields
        return {}

    @classmethod
    def unchecked(cls, given: Callable[[str], Any]) -> set[str]:
        """Fields that the mode reads though transformers 5 knows no reader of them, and so would refuse them."""
        del given
        return set()

    # Of a call

    def check_inputs(self, inputs: Inputs) -> None:
        """Raises a ValueError if the mode cannot continue such a prompt."""

    def check_streamer(self) -> None:
        """Raises a ValueError if tokens cannot be shown to a `streamer` before the end."""

    def check_stream(self) -> None:
        """The same for `stream`."""

    @property
    def sequences_per_prompt(self) -> int:
        """The texts that are kept of each prompt while it is decoded."""
        return self.config.num_return_sequences

    @property
    def rows_per_processor(self) -> int:
        """The texts of each prompt that a processor sees at a time."""
        return self.sequences_per_prompt

    @property
    def rows_per_criterion(self) -> int:
        """The texts of each prompt that a stopping criterion sees at a time."""
        return self.sequences_per_prompt

    @property
    def min_tokens_to_keep(self) -> int:
        """How many tokens the rules of sampling leave at least."""
        return 1

    @property
    def whole_texts_per_step(self) -> bool:
        """Whether without a cache the outputs of a step are arrays of their own, since texts may change their past."""
        return False

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        """What the strategy is to record of every step: outputs, and what it takes to sort the intermediates.

        Raises:
            ValueError: if there are no log-probabilities in this mode.
        """
        del intermediates
        outputs = tuple(name for name in ("scores", "logits") if name in self.config.outputs)
        if logprobs:
            raise ValueError(
                "`output_logprobs` is for greedy decoding and sampling. Pass `output_scores=True`, and the outputs to "
                "`compute_transition_scores`."
            )
        return outputs

    def text_slots(self, prompt_slots: int, new_tokens: int) -> int:
        """S, the bucket of the token buffer."""
        return bucket(prompt_slots + new_tokens)

    def build(self, parts: Parts) -> Strategy:
        """The strategy of the call."""
        raise NotImplementedError

    # Of what the device returns

    def texts(self, fetched: Mapping[str, np.ndarray], rows: int, prompt_length: int) -> dict[str, np.ndarray]:
        """The fields of the output that there are with and without scores.

        Args:
            fetched: the outputs of the strategy.
            rows: B.
            prompt_length: of the caller's prompt.
        """
        del prompt_length
        return {"sequences": fetched["sequences"][: rows * self.sequences_per_prompt, : fetched["length"]].copy()}

    def cached_steps(self, cache: Cache, first: int, rows: int, steps: int) -> np.ndarray:
        """int [rows, C, steps]: the slots, counted from `first`, in which each text has its tokens of the first steps.

        Args:
            cache: at the end of the decode.
            first: the slot behind the prompt.
            rows: of the cache that count.
            steps: forward passes after the prompt's.
        """
        del cache, first
        return np.broadcast_to(np.arange(steps), (rows, 1, steps))

    def attended_steps(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        """Of each step, int [rows, C, t]: the slots, counted likewise, that the texts attend, their own tokens last."""
        del fetched
        return [np.broadcast_to(np.arange(step + 1), (rows, 1, step + 1)) for step in range(steps)]

    def branches_of_step(self, fetched: Mapping[str, np.ndarray], rows: int, step: int) -> np.ndarray | None:
        """int [rows, C]: which of the columns that the model read in a step are in the texts; None for all of them."""
        del fetched, rows, step
        return None

    def lineages(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        """For each step but the prompt's, int [t, M]: the rows, of all steps up to it, that its M rows descend from.

        Empty if every row descends from itself.
        """
        del fetched, rows, steps
        return []
