"""M2M100 and NLLB: a BART with norms first and positions that do not count padding.

Same as transformers 5.24 `M2M100ForConditionalGeneration`.
"""

from jaxgen.models.encoder_decoder.bart import COMMON_DEFAULTS, SINUSOIDAL_OF_TOKENS, Dialect

M2M_100 = Dialect(
    model_type="m2m_100",
    architecture="M2M100ForConditionalGeneration",
    defaults={
        **COMMON_DEFAULTS,
        "vocab_size": 128112,
        "activation_function": "relu",
        "scale_embedding": True,
    },
    positions=SINUSOIDAL_OF_TOKENS,
    logits_bias=False,
)
