"""A call of `generate` between its arguments and its programs."""

from dataclasses import dataclass

import numpy as np

from jaxgen.base import Prompt, Strategy
from jaxgen.buckets import bucket
from jaxgen.generation.config import Resolved
from jaxgen.generation.host_callbacks import HostFunctions
from jaxgen.generation.inputs import Inputs


@dataclass(frozen=True)
class Call:
    """A checked call, ready to run: what the two programs take, and what the host needs to trim their output.

    Attributes:
        slots: S, the bucket of the token buffer.
        collect: the internals to collect.
        forward_passes: after the prompt's, at the most.
        rows: of the caller's prompt, B.
        columns: of the caller's prompt, as text.
        seen: int [M]. The cache slots of its columns, with the slots of a continued cache first.
        fresh: T of these, which the prompt's forward pass reads.
        inputs: the caller's prompt, checked.
        host: what runs on the host.
        reserved: slots that the cache has from the start; 0 to let it grow with the text.
    """

    prompt: Prompt
    strategy: Strategy
    slots: int
    collect: tuple[str, ...]
    forward_passes: int
    rows: int
    columns: int
    seen: np.ndarray
    fresh: int
    inputs: Inputs
    config: Resolved
    host: HostFunctions
    reserved: int = 0

    @property
    def cache_slots(self) -> int:
        """The slots of a row that the cache may grow to."""
        if self.reserved:
            return max(self.reserved, 1 << int(self.seen[-1] + 1 + self.forward_passes).bit_length())
        slots = self.strategy.cache_slots(self.prompt.cache_slots, self.slots - self.prompt.input_ids.shape[1])
        return slots if self.strategy.branches > 1 else bucket(slots)
