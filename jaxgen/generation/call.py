"""A prepared call of `generate`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxgen.base import Call, Model, empty_cache
from jaxgen.buckets import bucket
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.modes.base import Mode
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.running.host_callbacks import HostFunctions

if TYPE_CHECKING:
    from jaxgen.generation.running.processes import Processes


@dataclass(frozen=True)
class PreparedCall:
    """A checked call that is ready to run: the input of the two programs, and the data for trimming their output.

    Attributes:
        model: the model, on the devices that have these rows.
        call: the input of the programs.
        inputs: the caller's prompt, checked.
        config: the configuration of the call.
        mode: its decoding mode.
        host: the Python functions that run on the host.
        token_slots: int [L]. The cache slot of each prompt token; those of a continued cache come first.
        forward_passes: maximum number of decode steps after prefill.
        reserved: cache slots per row from the start; 0 to let the cache grow with the text.
        processes: those that run the call together; None if this one runs it alone.
    """

    model: Model
    call: Call
    inputs: Inputs
    config: DecodeConfig
    mode: Mode
    host: HostFunctions
    token_slots: np.ndarray
    forward_passes: int
    reserved: int = 0
    processes: "Processes | None" = None

    @property
    def intermediates(self) -> tuple[str, ...]:
        """The names of the intermediates that the programs return; see `DecodeConfig.intermediates`.

        With an encoder, these are the decoder's, and there are three more.
        """
        names = self.config.intermediates
        if self.inputs.source is None:
            return names
        if "attentions" in names:
            names = (*names, "cross_attentions")
        if self.call.source is None or self.call.source.encoded:
            return names
        return (*names, *(f"encoder_{name}" for name in self.config.intermediates))

    @property
    def rows(self) -> int:
        """The number of prompts, B."""
        return self.inputs.input_ids.shape[0]

    @property
    def prompt_length(self) -> int:
        """The number of columns of the caller's prompt, P."""
        return self.inputs.input_ids.shape[1]

    @property
    def cache_bytes_per_token(self) -> int:
        """The bytes of a cache slot of one row, over all layers."""
        past = None if self.call.prefill is None else self.call.prefill.past
        backend = self.call.cache_backend if past is None else past.backend
        if backend is None:
            return self.model.cache_bytes_per_token

        def size(slots: int) -> int:
            cache = jax.eval_shape(lambda: empty_cache(self.model, 1, slots, backend))
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

        return size(2) - size(1)

    @property
    def cache_slots(self) -> int:
        """The maximum number of cache slots per row."""
        if self.reserved:
            return max(self.reserved, 1 << int(self.token_slots[-1] + 1 + self.forward_passes).bit_length())
        call, strategy = self.call, self.call.strategy
        slots = strategy.cache_slots(call.prompt_slots, call.slots - call.prompt.input_ids.shape[1])
        return slots if strategy.branches > 1 else bucket(slots)
