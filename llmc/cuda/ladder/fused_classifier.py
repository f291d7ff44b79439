"""The rungs of the classifier."""

from ..fused_classifier import (
    fused_classifier1,
    fused_classifier2,
    fused_classifier3,
    fused_classifier4,
    fused_classifier5,
)
from .rung import Rung

RUNGS = (
    Rung("fused_classifier", 1, fused_classifier1),
    Rung("fused_classifier", 2, fused_classifier2),
    Rung("fused_classifier", 3, fused_classifier3),
    Rung("fused_classifier", 4, fused_classifier4, production=True),
    Rung("fused_classifier", 5, fused_classifier5, production=True),
)
