"""What is trained: the three nets, and each with one part taken away, added or scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from studies import data
from studies.data import Data
from studies.nets import MLP, Encoder, ResNet18
from studies.settings import Settings

ARCHITECTURES = ("MLP", "ResNet-18", "Transformer")
_RATES = {"MLP": 0.05, "ResNet-18": 0.02, "Transformer": 1e-3}
_TARGETS = {"images": 0.5, "text": 0.5}  # of the training loss


@dataclass(frozen=True)
class Case:
    """A net, its data and how it is trained; `variant` "" is the net as the paper has it."""

    architecture: str
    kind: str  # "images" or "text"
    variant: str = ""
    width: int = 64
    skip: bool = True
    norm: bool = True
    slower: int = 1  # by which the learning rate is divided

    @property
    def name(self) -> str:
        """The name that results are kept under, also a file's."""
        parts = [self.architecture, "text" * (self.kind == "text"), self.variant]
        return " ".join(p for p in parts if p).replace("/", "by").replace(" ", "-")

    @property
    def lr(self) -> float:
        """The learning rate."""
        return _RATES[self.architecture] / self.slower

    @property
    def target(self) -> float:
        """The training loss that `steps_to_target` waits for."""
        return _TARGETS[self.kind]

    def data(self, settings: Settings) -> Data:
        """Return its data set."""
        return data.verses() if self.kind == "text" else data.images(settings.images)

    def build(self, seed: int, settings: Settings) -> nn.Module:
        """Return a new net; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._net(self.data(settings))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum 0.9, for the Transformer AdamW."""
        if self.architecture == "Transformer":
            return torch.optim.AdamW(model.parameters(), lr=self.lr)
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)

    def _net(self, source: Data) -> nn.Module:
        shape, parts = source.train[0].shape, {"skip": self.skip, "norm": self.norm}
        if self.architecture == "MLP":
            return MLP(shape[1:].numel(), source.classes, self.width, **parts)
        if self.architecture == "ResNet-18":
            return ResNet18(source.classes, self.width, **parts)
        reads: dict[str, Any] = (
            {"tokens": shape[1], "vocabulary": data.VOCABULARY}
            if self.kind == "text"
            else {"tokens": shape[2], "size": shape[3]}
        )
        return Encoder(source.classes, self.width, **reads, **parts)


def plain(settings: Settings) -> list[Case]:
    """The paper's nets on one set of images, and its Transformer on text."""
    mlp, resnet, transformer = settings.widths
    found = [
        Case("MLP", "images", width=mlp, skip=False, norm=False),
        Case("ResNet-18", "images", width=resnet),
        Case("Transformer", "images", width=transformer),
    ]
    if settings.text:
        found.append(Case("Transformer", "text", width=transformer))
    return found


def variants(settings: Settings) -> list[Case]:
    """Each net on images with one thing changed."""
    if not settings.variants:
        return []
    found = []
    for base in plain(settings)[:3]:
        own = {"skip": base.skip, "norm": base.norm}
        for part, word in (("skip", "skip"), ("norm", "norm")):
            sign = "without" if own[part] else "with"
            found.append(_changed(base, f"{sign} {word}", **{part: not own[part]}))
        found.append(_changed(base, "width/4", width=base.width // 4))
        found.append(_changed(base, "lr/4", slower=4))
    return found


def _changed(base: Case, variant: str, **changes: Any) -> Case:
    return replace(base, variant=variant, **changes)
