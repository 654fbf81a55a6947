"""Sequence to sequence: reverse eight symbols, by two GRUs with attention between them."""

import torch
from torch import Tensor, nn

from tasks.sources import Batch, Drawn
from tasks.task import Classification

LENGTH, SYMBOLS = 8, 12


class Seq2Seq(nn.Module):
    """The decoder is shown the right symbols so far (teacher forcing)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, width)  # the last one starts an answer
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(2 * width, SYMBOLS)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Symbols, and the answer one place late, (items, 8) each -> (items, 8, 12) logits."""
        source, shifted = inputs
        memory, last = self.encoder(self.embed(source))
        hidden, _ = self.decoder(self.embed(shifted), last)
        weights = (hidden @ memory.transpose(1, 2) / memory.shape[-1] ** 0.5).softmax(-1)
        return self.head(torch.cat([hidden, weights @ memory], dim=-1))


def draw(rng: torch.Generator, size: int) -> Batch:
    source = torch.randint(0, SYMBOLS, (size, LENGTH), generator=rng)
    target = source.flip(1)
    shifted = torch.cat([torch.full((size, 1), SYMBOLS), target[:, :-1]], dim=1)
    return (source, shifted), target


TASK = Classification(
    "seq2seq-reverse",
    "sequence to sequence",
    Seq2Seq,
    Drawn(draw),
    classes=SYMBOLS,
)
