"""The interface between `generate` and a decoding mode, with defaults that suit most modes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from jaxgen.base import Cache, LogitsProcessor, Model, Strategy, tensor_shards
from jaxgen.buckets import bucket
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.outputs import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput, GenerateOutput
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.request import Request
from jaxgen.processors.stopping_criteria import EosToken, MaxLength

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig


@dataclass(frozen=True)
class Parts:
    """The parts from which a mode builds its strategy, made from the arguments of `generate`.

    Attributes:
        eos, max_length, processors, stopping_criteria: fields of the strategy.
        longest: the configuration's `max_length`. In `max_length` above, a criterion of the caller may set another one.
        key: see `Sample.key`; None unless `do_sample`.
        vocab_size: V.
        recorded: names of the arrays to record at every step, see `Mode.recorded`.
        model, request, inputs: those of the call, for modes that need more than the prompt's tokens.
        has_eos: whether any token id ends a text, by the configuration or by the caller's criteria.
    """

    eos: EosToken
    max_length: MaxLength
    processors: tuple[LogitsProcessor, ...]
    stopping_criteria: tuple[Callable[..., jax.Array], ...]
    longest: int
    key: Any
    vocab_size: int
    recorded: tuple[str, ...]
    model: Model
    request: Request
    inputs: Inputs
    has_eos: bool

    @property
    def vocab_shards(self) -> int:
        """The number of devices that V is sharded over: 1 if they do not divide it, as each then has all of it."""
        shards = tensor_shards(self.model.mesh)
        return 1 if self.vocab_size % shards else shards


@dataclass(frozen=True)
class Mode:
    """The host half of a decoding mode: it reads the configuration and arranges the outputs.

    The device half is the strategy of the same name in `decoding/`. Everything on the host that depends on the mode is
    a method here. The defaults below suit modes with one text per row, whose tokens do not change in later steps.

    Attributes:
        config: the call's configuration.
    """

    config: DecodeConfig
    output: ClassVar[type[GenerateOutput]] = GenerateDecoderOnlyOutput
    encoder_decoder_output: ClassVar[type[GenerateOutput]] = GenerateEncoderDecoderOutput
    streams: ClassVar[bool] = True  # whether tokens can be shown before the end

    # Called before a mode is chosen, so these read the merged GenerationConfig. transformers 5 still declares
    # `num_beam_groups`, `diversity_penalty` and `penalty_alpha` there, though only its code on the Hub reads them.

    @classmethod
    def applies(cls, fields: "GenerationConfig", assistant_model: object = None) -> bool:
        """Whether a call asks for this mode. The first mode in `MODES` that applies is chosen."""
        raise NotImplementedError

    @classmethod
    def check(cls, fields: "GenerationConfig", assistant_model: object = None) -> None:
        """Raises a ValueError if the mode's own fields are out of range or conflict. Called for every mode."""

    @classmethod
    def unheeded(cls, fields: "GenerationConfig") -> dict[str, object]:
        """The mode's fields that transformers ignores because of other fields -> the values that switch them off."""
        del fields
        return {}

    @classmethod
    def unchecked(cls, given: Callable[[str], object]) -> set[str]:
        """Fields that the mode reads, but that transformers 5 would refuse since it lacks the mode."""
        del given
        return set()

    # Before the call runs

    def check_inputs(self, inputs: Inputs) -> None:
        """Raises a ValueError if the mode cannot continue such a prompt."""

    def check_encoder_decoder(self) -> None:
        """Raises a ValueError if the mode does not go with a model that has an encoder."""

    def check_streamer(self) -> None:
        """Raises a ValueError if tokens cannot be shown to a `streamer` before the end."""

    def check_stream(self) -> None:
        """Raises a ValueError if tokens cannot be shown to the reader of a `stream` before the end."""

    @property
    def sequences_per_prompt(self) -> int:
        """The number of texts per prompt during the decode."""
        return self.config.num_return_sequences

    @property
    def rows_per_processor(self) -> int:
        """The number of texts per prompt that a processor sees in one call."""
        return self.sequences_per_prompt

    @property
    def rows_per_criterion(self) -> int:
        """The number of texts per prompt that a stopping criterion sees in one call."""
        return self.sequences_per_prompt

    @property
    def min_tokens_to_keep(self) -> int:
        """The minimum number of tokens that each sampling warper keeps."""
        return 1

    @property
    def whole_texts_per_step(self) -> bool:
        """Whether each step with `use_cache=False` has its own arrays, because earlier tokens of a text may change."""
        return False

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        """The arrays that the strategy records at every step: outputs, and arrays for arranging the intermediates.

        Raises:
            ValueError: if this mode does not have log-probabilities.
        """
        del intermediates
        outputs = tuple(name for name in ("scores", "logits") if name in self.config.outputs)
        if logprobs:
            raise ValueError(
                "`output_logprobs` is for greedy decoding and sampling. Pass `output_scores=True`, and pass the "
                "outputs to `compute_transition_scores`."
            )
        return outputs

    def text_slots(self, columns: int, new_tokens: int) -> int:
        """S, the columns of the token buffer: the prompt in its bucket, and room for the new tokens."""
        return bucket(columns + new_tokens)

    def pad_token_id(self, parts: Parts) -> Any:
        """The token id that fills finished rows; None if they continue until all rows are finished.

        As in transformers, they continue if there is no eos and only a criterion finishes them.
        """
        return self.config.fill_token_id if parts.has_eos or not parts.stopping_criteria else None

    def build(self, parts: Parts) -> Strategy:
        """The strategy of the call."""
        raise NotImplementedError

    # After the decode

    def texts(self, fetched: Mapping[str, np.ndarray], rows: int, prompt_length: int) -> dict[str, np.ndarray]:
        """The fields of the output that do not depend on `return_dict_in_generate`.

        Args:
            fetched: the outputs of the strategy.
            rows: B.
            prompt_length: the length of the caller's prompt.
        """
        del prompt_length
        return {"sequences": fetched["sequences"][: rows * self.sequences_per_prompt, : fetched["length"]].copy()}

    def note(self, state: Any) -> str:
        """A remark for the user about the first text of a call, from the strategy's final state; empty for none."""
        del state
        return ""

    def cached_steps(self, cache: Cache, first: int, rows: int, steps: int) -> np.ndarray:
        """int [rows, C, steps]: the slots of the new tokens of each text, counted from `first`.

        Args:
            cache: the cache at the end of the decode.
            first: the slot after the prompt.
            rows: the number of rows of the cache that belong to the caller.
            steps: the number of forward passes after the prompt's; each has read one of these tokens.
        """
        del cache, first
        return np.broadcast_to(np.arange(steps), (rows, 1, steps))

    def attended_steps(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        """For each step, int [rows, C, step + 1]: the slots that texts attend to, counted as in `cached_steps`."""
        del fetched
        return [np.broadcast_to(np.arange(step + 1), (rows, 1, step + 1)) for step in range(steps)]

    def branches_of_step(self, fetched: Mapping[str, np.ndarray], rows: int, step: int) -> np.ndarray | None:
        """int [rows, C]: which of the tokens that the model read in a step belong to the texts; None for all."""
        del fetched, rows, step
        return None

    def lineages(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        """The ancestors of every text, for models that return intermediates of the whole text at each step.

        Returns:
            One array per step after the prompt. That of a step, from 0, is int [step + 1, texts]: the row that each
            text descends from, at the steps so far. With beams a text is a beam, in the flat [N * C]. The list is empty
            if every text descends from its own row.
        """
        del fetched, rows, steps
        return []
