"""The rungs of the embeddings."""

from .. import encoder
from .rung import Rung

RUNGS = (
    Rung("encoder_forward", 1, encoder.encoder_forward1),
    Rung("encoder_forward", 2, encoder.encoder_forward2, production=True),
    Rung("encoder_backward", 1, encoder.encoder_backward1),
    Rung("encoder_backward", 2, encoder.encoder_backward2),
    Rung("encoder_backward", 3, encoder.encoder_backward3),
    Rung("encoder_backward", 4, encoder.encoder_backward4),
    Rung("encoder_backward", 5, encoder.encoder_backward5, production=True),
)
