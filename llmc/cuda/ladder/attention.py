"""The rungs of causal self-attention."""

from .. import attention
from .rung import SIXTEEN_BIT, Rung

RUNGS = (
    Rung("attention_forward", 1, attention.attention_forward1, production=True),
    Rung("attention_forward", 2, attention.attention_forward2, production=True),
    Rung("attention_forward", 3, attention.attention_forward3, SIXTEEN_BIT, production=True),
    Rung(
        "attention_forward",
        4,
        attention.attention_forward4,
        SIXTEEN_BIT,
        arch=90,
        head_sizes=(64, 128),
        production=True,
    ),
    Rung("attention_backward", 1, attention.attention_backward1, production=True),
    Rung("attention_backward", 2, attention.attention_backward2, production=True),
    Rung("attention_backward", 3, attention.attention_backward3, SIXTEEN_BIT, production=True),
    Rung(
        "attention_backward",
        4,
        attention.attention_backward4,
        SIXTEEN_BIT,
        arch=90,
        head_sizes=(64, 128),
        production=True,
    ),
)
