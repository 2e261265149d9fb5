"""The decoding modes. The host half of each mode is here. Its strategy is in `decoding/` under the same name."""

from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.modes.assisted import AssistedMode
from jaxgen.generation.modes.base import Mode
from jaxgen.generation.modes.beam_search import BeamSearchMode
from jaxgen.generation.modes.contrastive_search import ContrastiveSearchMode
from jaxgen.generation.modes.group_beam_search import GroupBeamSearchMode
from jaxgen.generation.modes.sampling import SamplingMode

# The mode of a call is the first one that applies. Sampling, which includes greedy decoding, always does.
MODES: tuple[type[Mode], ...] = (GroupBeamSearchMode, BeamSearchMode, ContrastiveSearchMode, AssistedMode, SamplingMode)


def mode_for(config: DecodeConfig, assistant_model: object = None) -> Mode:
    """The mode that a call asks for.

    Args:
        config: the call's configuration.
        assistant_model: the argument of `generate`.

    Raises:
        ValueError: naming a field of any mode, its value and the range.
    """
    for mode in MODES:
        mode.check(config.merged, assistant_model)
    return next(mode for mode in MODES if mode.applies(config.merged, assistant_model))(config)
