"""What is trained: a task with its optimizer, at a rate relative to the tuned one, on a course."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tasks import TASKS, Task
from tasks.optimizers import FAMILIES
from tasks.rates import Rates, rates
from tasks.sets import PART, Part
from tasks.training import Recipe


@dataclass(frozen=True)
class Setting:
    """A task with its optimizer, its batch, and how long it is trained; fewer runs if `costly`."""

    task_name: str
    optimizer: str
    batch: int | None
    steps: int
    costly: bool = field(default=False, compare=False)

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def part(self) -> Part:
        return PART[self.task_name]

    @property
    def rates(self) -> Rates:
        return rates(self.task, self.optimizer, self.batch)

    @property
    def label(self) -> str:
        return f"{self.task_name} {self.optimizer}"

    def run(self, shape: Shape, seed: int) -> Run:
        """Return one training at this setting."""
        recipe = Recipe(
            self.optimizer,
            shape.rate(self.rates),
            self.batch,
            seed,
            self.steps,
            shape.schedule,
            shape.jump,
            shape.hidden,
            shape.clip,
        )
        return Run(self.task_name, shape.label, recipe)


@dataclass(frozen=True)
class Shape:
    """A way to choose the rate: a multiple of the tuned or the breaking one, and its course."""

    schedule: str
    unit: Literal["tuned", "breaks", "middle"]
    multiple: float
    jump: float = 1.0
    hidden: bool = False
    clip: float | None = None

    @property
    def label(self) -> str:
        jump = f"-jump{self.jump:g}" if self.jump != 1 else ""
        clip = f"-clip{self.clip:g}" if self.clip is not None else ""
        hidden = "-hidden" if self.hidden else ""
        return f"{self.schedule}-{self.multiple:g}{self.unit}{jump}{hidden}{clip}"

    def rate(self, known: Rates) -> float:
        units = {
            "tuned": known.tuned,
            "breaks": known.breaks,
            "middle": (known.tuned * known.breaks) ** 0.5,
        }
        return self.multiple * units[self.unit]


@dataclass(frozen=True)
class Run:
    """One training, whatever stands beside it."""

    task_name: str
    shape: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """What files of this run are called."""
        r = self.recipe
        batch = "full" if r.batch is None else r.batch
        what = f"{self.task_name}-{r.optimizer}-b{batch}-t{r.steps}"
        return f"{what}-{self.shape}-s{r.seed}"

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def setting(self) -> Setting:
        r = self.recipe
        return Setting(self.task_name, r.optimizer, r.batch, r.steps)

    @property
    def part(self) -> Part:
        return PART[self.task_name]

    @property
    def rates(self) -> Rates:
        return self.setting.rates

    @property
    def scenario(self) -> str:
        """What is tried: "start" (too large from step 0), "ramp", "jump", "edge" or "steady"."""
        recipe = self.recipe
        if recipe.optimizer == "gd":
            return "edge"
        if recipe.schedule == "constant" and recipe.rate > 2 * self.rates.tuned:
            return "start"
        named = {"ramp": "ramp", "warmup": "ramp", "jump": "jump"}
        return named.get(recipe.schedule, "steady")

    @property
    def multiple(self) -> float:
        """The largest rate of the run in units of the tuned one."""
        return round(self.recipe.rate * max(self.recipe.jump, 1.0) / self.rates.tuned, 9)

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer scales each weight's step by its gradients."""
        return self.recipe.optimizer in FAMILIES["adaptive"]
