"""The rungs of GELU and its gradient."""

from .. import gelu
from .rung import Rung

RUNGS = (
    Rung("gelu_forward", 1, gelu.gelu_forward1),
    Rung("gelu_forward", 2, gelu.gelu_forward2, production=True),
    Rung("gelu_backward_inplace", 1, gelu.gelu_backward_inplace1),
    Rung("gelu_backward_inplace", 2, gelu.gelu_backward_inplace2, production=True),
)
