"""The rungs of AdamW and of the first rounding of the parameters."""

from .. import adamw
from .rung import Rung

RUNGS = (
    Rung("adamw_update", 1, adamw.adamw_update1),
    Rung("adamw_update", 2, adamw.adamw_update2),
    Rung("adamw_update", 3, adamw.adamw_update3, production=True),
    Rung("init_from_master", 1, adamw.init_from_master1),
    Rung("init_from_master", 2, adamw.init_from_master2, production=True),
)
