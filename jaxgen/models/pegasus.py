"""Pegasus: a BART with norms first and sinusoidal positions. Same as transformers `PegasusForConditionalGeneration`."""

from jaxgen.models.bart import COMMON_DEFAULTS, SINUSOIDAL, Dialect

PEGASUS = Dialect(
    model_type="pegasus",
    architecture="PegasusForConditionalGeneration",
    defaults={**COMMON_DEFAULTS, "pad_token_id": 0},
    generation_defaults={
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": 1,
    },
    positions=SINUSOIDAL,
)
