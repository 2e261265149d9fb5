"""What the `Family`s of encoder-decoder models share: what is read once for a source, and their size."""

from typing import Any

from jaxgen.models.family import ForwardPass
from jaxgen.models.layers import columns_at_once


def of_source(path: str) -> bool:
    """See `Family.of_source`: the encoder, and the keys and values that each layer of the decoder keeps of it."""
    return path.startswith("encoder.") or ".kv_proj." in path


def activation_bytes(config: Any, forward: ForwardPass) -> int:
    """See `Family.activation_bytes`: scores, projections and units of the largest layer, and the residual stream."""
    rows, columns, item = forward.rows, forward.columns, forward.itemsize
    scores = 2 * 4 * rows * max(config.heads) // forward.shards * columns_at_once(columns) * forward.slots
    if columns < forward.slots:  # a step, in which all but the scores is negligible
        return scores
    heads = item * rows * columns * 3 * config.heads[1] * config.head_dim // forward.shards
    units = 3 * item * rows * columns * max(config.units) // forward.shards
    return max(scores + heads, units) + 2 * item * rows * columns * config.hidden_size
