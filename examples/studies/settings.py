"""How large the study is: one place for every size that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

STAGES = ("init", "early", "end")  # step 0, 10 % of the steps, the last one
EARLY = 0.1  # of the steps


@dataclass(frozen=True)
class Settings:
    """Sizes of the study. The defaults are those of the full one, on one core."""

    images: str = "mnist"  # or "digits", which needs no data package
    text: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300  # of each training
    batch: int = 64  # of training
    items: int = 192  # that the geometry is measured on
    widths: tuple[int, int, int] = (128, 16, 64)  # MLP, ResNet-18, Transformer
    variants: bool = True
    eigenvalues: int = 5
    lanczos: int = 30  # HVPs for the eigenvalues of the plain nets
    samples: int = 16  # random vectors for their traces
    fewer: float = 0.6  # of both, for the variants
    directions: int = 3  # of slices
    points: int = 21  # of a slice and of a barrier
    plane: int = 21  # points on each axis
    density_vectors: int = 6
    density_steps: int = 25
    power_starts: int = 5
    power_steps: int = 20
    bootstrap: int = 4000

    @property
    def early(self) -> int:
        """The step that ends the first tenth of a run."""
        return max(1, round(EARLY * self.steps))

    @property
    def digest(self) -> str:
        """Eight hex digits that change when any size does."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def full() -> Settings:
    """What docs/studies/three-architectures/ is written with."""
    return Settings()


def quick() -> Settings:
    """The same questions at sizes that take some minutes: the numbers are coarse."""
    return Settings(
        seeds=(0, 1),
        steps=80,
        batch=32,
        items=48,
        widths=(64, 8, 32),
        lanczos=12,
        samples=6,
        directions=2,
        points=11,
        plane=11,
        density_vectors=3,
        density_steps=15,
        power_starts=3,
        power_steps=15,
        bootstrap=500,
    )


def tiny(*, text: bool = False, images: str = "digits") -> Settings:
    """Every part in seconds, for tests: the numbers mean nothing."""
    return Settings(
        images=images,
        text=text,
        seeds=(0, 1),
        steps=4,
        batch=16,
        items=16,
        widths=(8, 4, 16),
        lanczos=5,
        samples=3,
        directions=2,
        points=7,
        plane=5,
        density_vectors=2,
        density_steps=4,
        power_starts=2,
        power_steps=3,
        bootstrap=50,
    )
