"""Op set 1: every op of the model as hand-written CUDA kernels, launched through CuPy. Same names as llmc.cpu."""

from . import device
from .adamw import adamw_update, init_from_master
from .attention import attention_backward, attention_forward, attention_scratch_size
from .encoder import encoder_backward, encoder_forward, encoder_scratch_size
from .fused_classifier import fused_classifier
from .gelu import gelu_backward_inplace, gelu_forward
from .global_norm import global_norm_scratch_size, global_norm_squared
from .layernorm import (
    fused_residual_forward,
    layernorm_backward,
    layernorm_forward,
    layernorm_scratch_size,
    residual_forward,
)
from .matmul import matmul_backward, matmul_forward, matmul_scratch_size

__all__ = [
    "device",
    "encoder_forward",
    "encoder_backward",
    "encoder_scratch_size",
    "layernorm_forward",
    "residual_forward",
    "fused_residual_forward",
    "layernorm_backward",
    "layernorm_scratch_size",
    "matmul_forward",
    "matmul_backward",
    "matmul_scratch_size",
    "attention_forward",
    "attention_backward",
    "attention_scratch_size",
    "gelu_forward",
    "gelu_backward_inplace",
    "fused_classifier",
    "adamw_update",
    "init_from_master",
    "global_norm_squared",
    "global_norm_scratch_size",
]
