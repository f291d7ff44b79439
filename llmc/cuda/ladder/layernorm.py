"""The rungs of LayerNorm, of the residual add, and of the two fused."""

from .. import layernorm
from .rung import Rung

RUNGS = (
    Rung("layernorm_forward", 1, layernorm.layernorm_forward1),
    Rung("layernorm_forward", 2, layernorm.layernorm_forward2),
    Rung("layernorm_forward", 3, layernorm.layernorm_forward3),
    Rung("layernorm_forward", 4, layernorm.layernorm_forward4, production=True),
    Rung("layernorm_forward", 5, layernorm.layernorm_forward5, production=True),
    Rung("residual_forward", 1, layernorm.residual_forward1),
    Rung("residual_forward", 2, layernorm.residual_forward2, production=True),
    Rung("fused_residual_forward", 1, layernorm.fused_residual_forward1),
    Rung("fused_residual_forward", 2, layernorm.fused_residual_forward2),
    Rung("fused_residual_forward", 3, layernorm.fused_residual_forward3),
    Rung("fused_residual_forward", 4, layernorm.fused_residual_forward4, production=True),
    Rung("fused_residual_forward", 5, layernorm.fused_residual_forward5, production=True),
    Rung("layernorm_backward", 1, layernorm.layernorm_backward1),
    Rung("layernorm_backward", 2, layernorm.layernorm_backward2),
    Rung("layernorm_backward", 3, layernorm.layernorm_backward3, production=True),
    Rung("layernorm_backward", 4, layernorm.layernorm_backward4),
    Rung("layernorm_backward", 6, layernorm.layernorm_backward6, production=True),
)
