"""Value learning: Q-learning on a chain of twelve places, with a target net (Mnih et al. 2015).

The loss is the error against targets that move. The score is the error against the true values, of
which all are known here.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import nets
from tasks.sources import Batch, Drawn
from tasks.task import Task

PLACES, DISCOUNT, SYNC = 12, 0.9, 20
_places = torch.arange(PLACES)
NEXT = torch.stack([(_places - 1).clamp_min(0), (_places + 1).clamp_max(PLACES - 1)], dim=1)
REWARD = torch.zeros(PLACES, 2)
REWARD[0, 0], REWARD[-1, 1] = 0.2, 1.0  # a little at the near end, much at the far one
_waves = torch.arange(1, 9) * torch.pi * (_places[:, None] + 0.5) / PLACES
SEEN = torch.cat([_waves.cos(), _waves.sin()], dim=1)  # (places, 16)


def true_values() -> Tensor:
    values = torch.zeros(PLACES, 2)
    for _ in range(300):
        values = REWARD + DISCOUNT * values.max(1).values[NEXT]
    return values


TRUE = true_values()


class Values(nn.Module):
    """The value of both actions; `target` is a copy of some steps ago."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nets.mlp((16, 64, 64, 2))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))


def draw(rng: torch.Generator, size: int) -> Batch:
    place = torch.randint(0, PLACES, (size,), generator=rng)
    return place, torch.randint(0, 2, (size,), generator=rng)


@torch.no_grad()
def bootstrap(model: Values, batch: Batch) -> Batch:
    """States, actions and targets; the target net is brought up to date now and then."""
    if model.updates % SYNC == 0:
        model.target.load_state_dict(model.online.state_dict())
    model.updates += 1
    place, action = batch
    best = model.target(SEEN[NEXT[place, action]]).max(1).values
    return place, action, REWARD[place, action] + DISCOUNT * best


def loss(model: Values, batch: Batch) -> Tensor:
    place, action, target = batch
    return F.mse_loss(model.online(SEEN[place]).gather(1, action[:, None]).squeeze(1), target)


@torch.no_grad()
def score(model: Values) -> float:
    return float(F.mse_loss(model.online(SEEN), TRUE) / (TRUE**2).mean())


TASK = Task(
    "qlearning-chain",
    "value learning",
    Values,
    Drawn(draw),
    loss,
    steps=600,
    nothing=1.0,
    score=score,
    collect=bootstrap,
    trained=lambda model: model.online,
)
