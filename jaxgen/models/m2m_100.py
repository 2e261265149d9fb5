"""M2M100 and NLLB: a BART with norms first and positions that do not count padding.

Same as transformers 5.24 `M2M100ForConditionalGeneration`.
"""

from jaxgen.models.bart import COMMON_DEFAULTS, SINUSOIDAL_OF_TOKENS, Dialect

M2M_100 = Dialect(
    model_type="m2m_100",
    architecture="M2M100ForConditionalGeneration",
    defaults={
        **COMMON_DEFAULTS,
        "vocab_size": 128112,
        "activation_function": "relu",
        "scale_embedding": True,
    },
    generation_defaults={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
    positions=SINUSOIDAL_OF_TOKENS,
)
