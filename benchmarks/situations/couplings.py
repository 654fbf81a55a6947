"""Losses that are no mean over items, or only by weights, or at random: right, or withheld."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from situations.items import classified, labels
from situations.reference import LR, double, gradient, measured, noise, reals, withheld
from situations.table import Found, situation

N = 32


def encoder(inputs: int = 6, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def info_nce(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    u, v = (F.normalize(model(x), dim=1) for x in batch)
    return F.cross_entropy(u @ v.T / 0.2, torch.arange(len(u)))


@situation("InfoNCE: each pair is told from all others of the batch")
def contrastive() -> Found:
    torch.manual_seed(0)
    batch = torch.randn(N, 6), torch.randn(N, 6)
    return withheld(encoder(), info_nce, batch, "pieces have fewer negatives")


@situation("InfoNCE with dropout")
def contrastive_dropout() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    batch = torch.randn(N, 6), torch.randn(N, 6)
    return withheld(model, info_nce, batch, "pieces have fewer negatives")


def simclr(model: nn.Module, batch: Tensor) -> Tensor:
    z = F.normalize(model(batch), dim=1)
    n = len(z) // 2
    scores = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, (torch.arange(2 * n) + n) % (2 * n))


@situation("SimCLR: two views of 32 in one tensor of 64 rows")
def two_views() -> Found:
    torch.manual_seed(0)
    return withheld(encoder(), simclr, torch.randn(2 * N, 6), "pieces have fewer negatives")


def triplet_hard(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = model(batch[0])
    apart = (z[:, None] - z[None]).square().sum(-1)
    same = batch[1][:, None] == batch[1][None]
    far = torch.where(same, apart, -1.0).max(1).values
    near = torch.where(same, 1e9, apart).min(1).values
    return F.softplus(far - near).mean()


@situation("triplets with the hardest negative of the batch")
def triplets() -> Found:
    torch.manual_seed(0)
    batch = torch.randn(N, 6), torch.arange(N) % 4
    return withheld(encoder(), triplet_hard, batch, "pieces have other negatives")


@situation("BatchNorm in train mode")
def batch_norm() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    return withheld(
        model, classified, (torch.randn(N, 6), labels()), "pieces have other statistics"
    )


class OwnNorm(nn.Module):
    """A normalisation over the batch that is no BatchNorm by type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return (x - x.mean(0)) / (x.var(0) + 1e-3).sqrt()


@situation("a normalisation over the batch that somebody wrote himself")
def own_norm() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), OwnNorm(), nn.Tanh(), nn.Linear(8, 2))
    return withheld(
        model, classified, (torch.randn(N, 6), labels()), "pieces have other statistics"
    )


def ppo(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """PPO at ratio 1, with advantages normalised over the minibatch: its value is 0."""
    logp = model(batch["x"]).log_softmax(-1).gather(1, batch["action"][:, None])[:, 0]
    advantage = batch["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return -((logp - logp.detach()).exp() * advantage).mean()


@situation("PPO with advantages normalised over the minibatch")
def policy() -> Found:
    torch.manual_seed(0)
    batch = {
        "x": torch.randn(N, 6),
        "action": torch.randint(0, 4, (N,)),
        "advantage": torch.randn(N).exp(),
    }
    return withheld(encoder(), ppo, batch, "pieces are normalised by themselves")


def by_itself(model: nn.Module, batch: Any) -> Tensor:
    loss = classified(model, batch)
    return loss / loss.detach()


@situation("a loss divided by its own value, as multi-task weighting has it")
def divided() -> Found:
    torch.manual_seed(0)
    batch = torch.randn(N, 6), labels()
    return withheld(encoder(), by_itself, batch, "pieces are divided by their own values")


def hard_examples(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.topk(len(losses) // 4).values.mean()


@situation("hard example mining: the mean of the largest quarter of losses")
def mining() -> Found:
    torch.manual_seed(0)
    batch = torch.randn(64, 6), labels(64)
    return withheld(encoder(), hard_examples, batch, "pieces have other largest losses")


def kto(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    reward = model(batch["x"])[:, 0]
    baseline = reward.detach().mean().clamp(min=0)
    sign = batch["label"].float() * 2 - 1
    return (1 - torch.sigmoid(sign * (reward - baseline))).mean()


@situation("KTO: each reward over the mean reward of the batch")
def batch_baseline() -> Found:
    torch.manual_seed(0)
    model = encoder()
    model[2].bias.data += 1
    batch = {"x": torch.randn(N, 6), "label": labels()}
    return withheld(model, kto, batch, "pieces have other means")


def barlow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    a, b = ((z - z.mean(0)) / z.std(0) for z in map(model, batch))
    return (a.T @ b / len(a) - torch.eye(a.shape[1])).square().sum()


@situation("Barlow Twins: correlations over the batch")
def correlations() -> Found:
    torch.manual_seed(0)
    batch = torch.randn(N, 6), torch.randn(N, 6)
    return withheld(encoder(), barlow, batch, "pieces have other correlations")


class Convolved(nn.Module):
    """Two graph convolutions of one graph with its adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Classify nodes."""
        return adjacency @ self.two(torch.tanh(adjacency @ self.one(x)))


def of_nodes(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


@situation("nodes of one graph, (64, 6) with a dense adjacency (64, 64)")
def one_graph() -> Found:
    torch.manual_seed(0)
    adjacency = (torch.rand(64, 64) < 0.1).float() + torch.eye(64)
    batch = torch.randn(64, 6), adjacency / adjacency.sum(1, keepdim=True), labels(64)
    return withheld(Convolved(), of_nodes, batch, "nodes without their neighbours")


@situation("dropout, a mean over 64 rows")
def dropout() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 2))
    x, y = torch.randn(64, 10), labels(64)
    each = [(x[i : i + 1], y[i : i + 1]) for i in range(64)]
    return noise(model, classified, (x, y), each)


class Autoencoder(nn.Module):
    """A variational one, which draws its code."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative evidence bound of each row."""
        mean, log_var = self.encode(x).chunk(2, 1)
        code = mean + (0.5 * log_var).exp() * torch.randn_like(mean) * 0.3
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        return (self.decode(code) - x).square().sum(1) + divergence


def evidence(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


@situation("a VAE, which draws noise for each item")
def variational() -> Found:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    return noise(Autoencoder(), evidence, x, [x[i : i + 1] for i in range(64)])


def denoised(model: nn.Module, x: Tensor) -> Tensor:
    time = torch.randint(1, 10, (len(x), 1)) / 20
    noise_ = torch.randn_like(x)
    seen = torch.cat([(1 - time).sqrt() * x + 0.3 * time.sqrt() * noise_, time], 1)
    return F.mse_loss(model(seen), x)


@situation("diffusion: a random time and noise for each item")
def diffusion() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))
    x = 2 * torch.randn(128, 6)
    return noise(model, denoised, x, [x[i : i + 1] for i in range(128)])


def weighted(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], torch.tensor([1.0, 4.0]).to(batch[0]))


def masked_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def masked_by_mask(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"], reduction="none")
    return (losses * batch["mask"]).sum() / batch["mask"].sum()


def ratio(model: nn.Module, loss_fn: Any, batch: Any, items: list[Any], weights: Tensor) -> Found:
    """Hold the temperature against that of a mean whose items have weights."""
    own = torch.stack([gradient(double(model), loss_fn, item) for item in items])
    share = weights.double() / weights.sum()
    off = own - share @ own
    exact = LR * float((share[:, None] * off).square().sum()) / (2 * own.shape[1])
    values = []
    for seed in range(12):
        record = measured(model, loss_fn, batch, ["temperature"], seed=seed)
        values.append(record["temperature"].value or float("nan"))
    mean = sum(values) / len(values)
    said = f"temperature {mean:.3g}, {record.provenance.get('loss_is', 'a mean over items')}"
    return Found(said, f"{exact:.3g}", abs(mean / exact - 1) < 0.35)


@situation("class weights in the loss: a mean by the weights of the labels")
def class_weights() -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), labels(64)
    each = [(x[i : i + 1].double(), y[i : i + 1]) for i in range(64)]
    return ratio(encoder(6, 2), weighted, (x, y), each, torch.tensor([1.0, 4.0])[y])


@situation("labels of which half are ignored (-100), unequally many in each sequence")
def ignored() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Tanh(), nn.Linear(5, 9))
    x = torch.randint(0, 9, (64, 6))
    y = x.roll(1, 1)
    y[torch.arange(6) >= torch.randint(1, 7, (64, 1))] = -100
    each = [(x[i : i + 1], y[i : i + 1]) for i in range(64)]
    return ratio(model, masked_tokens, (x, y), each, (y != -100).sum(1))


@situation("a mask that the loss divides by, unequally many in each sequence")
def by_mask() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Tanh(), nn.Linear(5, 9))
    x = torch.randint(0, 9, (64, 6))
    mask = (torch.arange(6) < torch.randint(1, 7, (64, 1))).long()
    batch = {"x": x, "y": x.roll(1, 1), "mask": mask}
    each = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(64)]
    return ratio(model, masked_by_mask, batch, each, mask.sum(1))


def dice(model: nn.Module, batch: Any) -> Tensor:
    p = model(batch[0]).softmax(1)[:, 1]
    return 1 - 2 * (p * batch[1]).sum() / (p.sum() + batch[1].sum())


@situation("a dice loss over the batch")
def ratio_of_sums() -> Found:
    torch.manual_seed(0)
    return withheld(encoder(6, 2), dice, (torch.randn(N, 6), labels()), "a ratio of sums")


def cox(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    risk = model(batch[0])[:, 0][batch[1].argsort(descending=True)]
    return (risk.logcumsumexp(0) - risk).mean()


@situation("Cox regression: each against all who are still at risk")
def survival() -> Found:
    torch.manual_seed(0)
    return withheld(encoder(), cox, (torch.randn(N, 6), torch.rand(N)), "other risk sets")


def concatenated(model: nn.Module, batch: Any) -> Tensor:
    x, targets, steps, lengths = batch
    return F.ctc_loss(model(x).log_softmax(-1).transpose(0, 1), targets, steps, lengths)


@situation("CTC with the targets of all items in one row")
def ctc() -> Found:
    torch.manual_seed(0)
    lengths = torch.randint(1, 4, (N,))
    targets = torch.randint(1, 5, (int(lengths.sum()),))
    batch = torch.randn(N, 8, 6), targets, torch.full((N,), 8), lengths
    return withheld(encoder(6, 5), concatenated, batch, "targets can't be cut")


def per_positive(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.sum() / batch[1].sum()


@situation("detection heads: a sum over the number of positives")
def positives() -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), labels(64)
    model, own = double(encoder(6, 2)), []
    for i in range(64):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        own.append(reals(torch.autograd.grad(loss, list(model.parameters()))))
    # of a ratio of sums, each over its expectation (delta method)
    count, g = float(y.sum()), torch.stack(own)
    total = g.sum(0) / count
    off = (g - total * y[:, None]) / count
    exact = LR * float(off.square().sum()) / (2 * g.shape[1])
    values = []
    for seed in range(12):
        record = measured(model.float(), per_positive, (x, y), ["temperature"], seed=seed)
        values.append(record["temperature"].value or float("nan"))
    mean = sum(values) / len(values)
    return Found(f"temperature {mean:.3g}", f"{exact:.3g}", abs(mean / exact - 1) < 0.35)


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    made = torch.randn_like(x)
    share = torch.rand(len(x), 1)
    between = (share * x + (1 - share) * made).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return model(made).mean() - model(x).mean() + (slope.norm(dim=1) - 1).square().mean()


@situation("WGAN-GP: generated rows and a gradient penalty between")
def gradient_penalty() -> Found:
    torch.manual_seed(0)
    x = 3 * torch.randn(64, 6)
    return noise(encoder(6, 1), penalised, x, [x[i : i + 1] for i in range(64)])
