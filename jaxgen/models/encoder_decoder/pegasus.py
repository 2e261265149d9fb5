"""Pegasus: a BART with norms first and sinusoidal positions. Same as transformers `PegasusForConditionalGeneration`."""

from jaxgen.models.encoder_decoder.bart import COMMON_DEFAULTS, SINUSOIDAL, Dialect

PEGASUS = Dialect(
    model_type="pegasus",
    architecture="PegasusForConditionalGeneration",
    defaults={**COMMON_DEFAULTS, "pad_token_id": 0},
    positions=SINUSOIDAL,
)
