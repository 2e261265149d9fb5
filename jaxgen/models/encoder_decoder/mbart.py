"""mBART and mBART-50: a BART with norms first. Same as transformers 5.24 `MBartForConditionalGeneration`."""

from jaxgen.models.encoder_decoder.bart import COMMON_DEFAULTS, Dialect

MBART = Dialect(
    model_type="mbart",
    architecture="MBartForConditionalGeneration",
    defaults=COMMON_DEFAULTS,
    embedding_norm=True,
)
