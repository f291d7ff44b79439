"""The rungs of causal self-attention. All of them are in production somewhere, the naive one for heads of any size."""

from .. import attention
from .rung import SIXTEEN_BIT, Rung

HEADS = attention.SM90_HEAD_SIZES

RUNGS = (
    Rung("attention_forward", 1, attention.forward_naive, production=True),
    Rung("attention_forward", 2, attention.forward_ffma, production=True),
    Rung("attention_forward", 3, attention.forward_mma, SIXTEEN_BIT, production=True),
    Rung("attention_forward", 4, attention.forward_sm90, SIXTEEN_BIT, arch=90, head_sizes=HEADS, production=True),
    Rung("attention_backward", 1, attention.backward_naive, production=True),
    Rung("attention_backward", 2, attention.backward_ffma, production=True),
    Rung("attention_backward", 3, attention.backward_mma, SIXTEEN_BIT, production=True),
    Rung("attention_backward", 4, attention.backward_sm90, SIXTEEN_BIT, arch=90, head_sizes=HEADS, production=True),
)
