"""Convolutions with BatchNorm on 8 x 8 digits."""

from torch import nn

from tasks import data
from tasks.sources import Items
from tasks.task import Classification


def net() -> nn.Module:
    def block(fan_in: int, fan_out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(fan_out), nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *block(1, 16, 1),
        *block(16, 32, 2),
        *block(32, 32, 2),
        nn.Flatten(),
        nn.Linear(32 * 4, 10),
    )


TASK = Classification("conv-digits", "classification", net, Items(data.digits), batch=32)
