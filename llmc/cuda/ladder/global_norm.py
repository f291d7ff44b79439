"""The rungs of the sum of squares."""

from .. import global_norm
from .rung import Rung

RUNGS = (
    Rung("global_norm_squared", 1, global_norm.global_norm_squared1),
    Rung("global_norm_squared", 2, global_norm.global_norm_squared2),
    Rung("global_norm_squared", 3, global_norm.global_norm_squared3),
    Rung("global_norm_squared", 4, global_norm.global_norm_squared4, production=True),
)
