"""A call of `generate` between its arguments and its programs."""

from dataclasses import dataclass

import numpy as np

from jaxgen.base import Call
from jaxgen.buckets import bucket
from jaxgen.generation.decode_config import DecodeConfig
from jaxgen.generation.host_callbacks import HostFunctions
from jaxgen.generation.inputs import Inputs
from jaxgen.generation.modes.base import Mode


@dataclass(frozen=True)
class PreparedCall:
    """A checked call, ready to run: what the two programs take, and what the host needs to trim their output.

    Attributes:
        call: what the programs take.
        inputs: the caller's prompt, checked.
        config: the configuration of the call.
        mode: its decoding mode.
        host: what runs on the host.
        prompt_slots: int [M]. The cache slots of the prompt's columns, with those of a continued cache first.
        forward_passes: after the prompt's, at the most.
        collect: of "attentions" and "hidden_states", the intermediates to return.
        reserved: slots that the cache has from the start; 0 to let it grow with the text.
    """

    call: Call
    inputs: Inputs
    config: DecodeConfig
    mode: Mode
    host: HostFunctions
    prompt_slots: np.ndarray
    forward_passes: int
    collect: tuple[str, ...]
    reserved: int = 0

    @property
    def rows(self) -> int:
        """B."""
        return self.inputs.input_ids.shape[0]

    @property
    def prompt_length(self) -> int:
        """P, as the caller counts it."""
        return self.inputs.input_ids.shape[1]

    @property
    def cache_slots(self) -> int:
        """The slots of a row that the cache may grow to."""
        if self.reserved:
            return max(self.reserved, 1 << int(self.prompt_slots[-1] + 1 + self.forward_passes).bit_length())
        call, strategy = self.call, self.call.strategy
        slots = strategy.cache_slots(call.prompt_slots, call.slots - call.prompt.input_ids.shape[1])
        return slots if strategy.branches > 1 else bucket(slots)
