"""A character LSTM on the Python reference, with dropout on its way out."""

from torch import Tensor, nn

from tasks import data, nets
from tasks.sources import Text
from tasks.task import Classification


class DroppedOut(nets.Characters):
    """The recurrent net with a tenth of its outputs dropped."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM, 96, width=64)
        self.head = nn.Sequential(nn.Dropout(0.1), self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """(items, context) -> (items, context, 96) logits."""
        return super().forward(tokens)


TASK = Classification(
    "lstm-topics",
    "language model",
    DroppedOut,
    Text(data.topics, context=32),
    classes=96,
    batch=16,
)
