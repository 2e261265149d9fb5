"""mBART and mBART-50: a BART with norms first. Same as transformers 5.24 `MBartForConditionalGeneration`."""

from jaxgen.models.bart import COMMON_DEFAULTS, Dialect

MBART = Dialect(
    model_type="mbart",
    architecture="MBartForConditionalGeneration",
    defaults=COMMON_DEFAULTS,
    generation_defaults={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2},
    embedding_norm=True,
)
