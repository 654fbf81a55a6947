"""The operations of a forward that treat each channel alike, as `units` knows them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PER_CHANNEL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)

_ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU),
    *(nn.CELU, nn.Mish, nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Softsign),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample),
)
EACH_FOR_ITSELF = (*_ACTIVATIONS, *_DROPOUTS, *_POOLS, nn.Identity)

_NAMES = """
relu relu_ leaky_relu relu6 gelu silu tanh sigmoid elu selu celu mish softplus hardswish hardtanh
hardsigmoid dropout dropout1d dropout2d dropout3d max_pool1d max_pool2d max_pool3d avg_pool1d
avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d interpolate clamp abs exp square contiguous clone float
"""
# As functions of torch and as methods of a tensor, which a graph has by their names.
ELEMENTWISE: set[Any] = {
    found
    for name in _NAMES.split()
    for found in (name, getattr(F, name, None), getattr(torch, name, None))
    if found is not None
}
SUMS: set[Any] = {
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
    *("add", "add_", "sub", "mul", "mul_", "div"),
}
FLATTENING: set[Any] = {torch.flatten, torch.squeeze, "flatten", "squeeze"}
RESHAPES: set[Any] = {torch.reshape, "view", "reshape"}
MEANS: set[Any] = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
SIZES: set[Any] = {getattr, len, "size", "dim", "numel"}
