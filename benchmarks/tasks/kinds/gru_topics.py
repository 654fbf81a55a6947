"""A character GRU on the Python reference."""

from torch import nn

from tasks import data, nets
from tasks.sources import Text
from tasks.task import Classification

TASK = Classification(
    "gru-topics",
    "language model",
    lambda: nets.Characters(nn.GRU, 96, width=64),
    Text(data.topics, context=32),
    classes=96,
    batch=16,
)
