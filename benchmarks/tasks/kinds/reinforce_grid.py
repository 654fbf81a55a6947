"""A policy gradient: find the corner of a 5 x 5 grid (REINFORCE, Williams 1992).

The loss has the gradient of the return and no meaning of its own. The score is the share of the
best policy's expected return that is missed, exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import nets
from tasks.sources import Batch, Drawn
from tasks.task import Task

SIDE, HORIZON, GOAL = 5, 12, 24
CELLS = SIDE * SIDE


def moves() -> Tensor:
    """(cells, 4): where up, down, left and right lead to; the goal keeps who is there."""
    rows, columns = torch.arange(CELLS) // SIDE, torch.arange(CELLS) % SIDE
    to = [
        (rows + dr).clamp(0, SIDE - 1) * SIDE + (columns + dc).clamp(0, SIDE - 1)
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1))
    ]
    found = torch.stack(to, dim=1)
    found[GOAL] = GOAL
    return found


MOVES, SEEN = moves(), torch.eye(CELLS)


def draw(rng: torch.Generator, size: int) -> Batch:
    return torch.randint(0, GOAL, (size,), generator=rng)  # where episodes start


@torch.no_grad()
def roll_out(model: nn.Module, starts: Tensor) -> Batch:
    """States and actions of an episode each, and how much better than others its rest was."""
    at, states, actions, rewards = starts, [], [], []
    for _ in range(HORIZON):
        action = torch.multinomial(model(SEEN[at]).softmax(1), 1).squeeze(1)
        states.append(at)
        actions.append(action)
        at = MOVES[at, action]
        rewards.append((at == GOAL).float())
    to_go = torch.stack(rewards, dim=1).flip(1).cumsum(1).flip(1) / HORIZON
    return torch.stack(states, dim=1), torch.stack(actions, dim=1), to_go - to_go.mean(0)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    states, actions, advantage = batch
    said = F.log_softmax(model(SEEN[states.flatten()]), dim=1)
    chosen = said.gather(1, actions.flatten()[:, None]).view_as(advantage)
    return -(chosen * advantage).sum(1).mean()


@torch.no_grad()
def score(model: nn.Module) -> float:
    policy, returns = model(SEEN).softmax(1), []
    for chosen in (policy, None):
        value = torch.zeros(CELLS)
        for _ in range(HORIZON):
            ahead = (MOVES == GOAL).float() + value[MOVES]
            value = (chosen * ahead).sum(1) if chosen is not None else ahead.max(1).values
        returns.append(value[:GOAL].mean())
    return float(1 - returns[0] / returns[1])


TASK = Task(
    "reinforce-grid",
    "policy gradient",
    lambda: nets.mlp((CELLS, 32, 4), nn.Tanh),
    Drawn(draw),
    loss,
    score=score,
    collect=roll_out,
)
