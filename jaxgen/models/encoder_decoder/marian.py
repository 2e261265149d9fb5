"""Marian: a BART with sinusoidal positions and no norm of embeddings. Same as transformers 5.24 `MarianMTModel`."""

from jaxgen.models.encoder_decoder.bart import COMMON_DEFAULTS, SINUSOIDAL, Dialect

MARIAN = Dialect(
    model_type="marian",
    architecture="MarianMTModel",
    defaults={**COMMON_DEFAULTS, "vocab_size": 58101, "pad_token_id": 58100},
    positions=SINUSOIDAL,
    norm_first=False,
    fixed={"share_encoder_decoder_embeddings": True},
)
