"""Are curvlinops, hessian-eigenthings and PyHessian right, and cheaper, where geomwatch is?

The same model, loss and batch for all. First the error and the cost of lambda_max and the trace,
then cases of real training code: does the product H v come out right? Writes
docs/benchmarks/peers.md.

The peers must not bring a torch of their own, so install them without their dependencies,
next to the environment rather than into it (curvlinops is in the `dev` environment already):

    pip install --no-deps --target PEERS hessian-eigenthings==1.0.0a5 pyhessian==0.1
    PYTHONPATH=PEERS python benchmarks/peers.py            # about a minute on one core
    PYTHONPATH=PEERS python benchmarks/peers.py --quick    # one seed, writes nothing

A peer that is missing is reported as "not installed".
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import io
import itertools
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from harness.version import written_by
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import geomwatch
from geomwatch.curvature.objective import Objective

OUT = Path(__file__).parents[1] / "docs/benchmarks/peers.md"
RIGHT = 1e-3  # relative error of a float32 product that counts as right
TRACE_RIGHT = 0.2  # of a trace from about 99 products, at worst over the seeds


@dataclass
class Problem:
    """A model with its loss and the batches that make up the data."""

    model: nn.Module
    batches: list[Any]
    loss: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def dim(self) -> int:
        return sum(p.numel() for p in self.params)


def problem(model: nn.Module, batches: list[Any], loss: nn.Module | None = None) -> Problem:
    loss = loss or nn.CrossEntropyLoss()
    return Problem(model, batches, loss, geomwatch.supervised(loss))


def split(problem: Problem, v: Tensor) -> list[Tensor]:
    pieces = v.split([p.numel() for p in problem.params])
    return [piece.view_as(p) for piece, p in zip(pieces, problem.params, strict=True)]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


# --- The libraries: what a user calls for a product, for lambda_max and for the trace.


class Geomwatch:
    """`measure`, and for a product the Objective through which it computes everything."""

    name, distribution, module = "geomwatch", "geomwatch", "geomwatch"

    @staticmethod
    def counted() -> tuple[Any, str, Callable[[tuple[Any, ...]], float]]:
        return Objective, "hvp", lambda args: args[0].items / 512  # it starts on part of the batch

    def product(self, problem: Problem, v: Tensor, times: int = 1, **options: Any) -> list[Tensor]:
        with Objective(problem.model, problem.loss_fn, problem.batches, **options) as objective:
            return [objective.hvp(v) for _ in range(times)]

    def differences(self, problem: Problem, v: Tensor) -> Tensor:
        return self.product(problem, v, hvp="finite_difference")[0]

    def top(self, problem: Problem, seed: int) -> float:
        return self._measure(problem, "lambda_max", seed)

    def trace(self, problem: Problem, seed: int) -> float:
        return self._measure(problem, "trace", seed, samples=99)

    def calls(self) -> dict[str, Callable[[Problem, int], float]]:
        return {
            "lambda_max, `measure`": self.top,
            "trace, `measure`": lambda p, s: self._measure(p, "trace", s),
            "trace, `samples=99`": self.trace,
        }

    @staticmethod
    def _measure(problem: Problem, name: str, seed: int, **options: int) -> float:
        record = geomwatch.measure(
            problem.model,
            problem.loss_fn,
            problem.batches[0],
            how=geomwatch.Measurement(quantities=[name], seed=seed),
            **options,
        )
        if record[name].value is None:
            raise RuntimeError(record[name].reason)
        return record[name].value


class Curvlinops:
    """Linear operators, to be handed to scipy and to its own trace estimators."""

    name, distribution, module = "curvlinops", "curvlinops-for-pytorch", "curvlinops"

    def counted(self) -> tuple[Any, str, Callable[[tuple[Any, ...]], float]]:
        operator = importlib.import_module(self.module).HessianLinearOperator
        return operator, "_matmat", lambda args: args[1][0].shape[-1]

    def operator(self, problem: Problem) -> Any:
        items = len if torch.is_tensor(problem.batches[0][0]) else lambda x: len(x["pixels"])
        return importlib.import_module(self.module).HessianLinearOperator(
            problem.model,
            problem.loss,
            problem.params,
            problem.batches,
            batch_size_fn=None if items is len else items,
        )

    def product(self, problem: Problem, v: Tensor, times: int = 1) -> list[Tensor]:
        operator = self.operator(problem)
        return [operator @ v for _ in range(times)]

    def top(self, problem: Problem, seed: int) -> float:
        start = np.random.default_rng(seed).standard_normal(problem.dim).astype(np.float32)
        operator = self.operator(problem).to_scipy()
        found = eigsh(operator, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
        return float(found[0])

    def trace(self, problem: Problem, seed: int) -> float:
        return self._trace("hutchpp_trace", 99, problem, seed)

    def calls(self) -> dict[str, Callable[[Problem, int], float]]:
        return {
            "lambda_max, `eigsh(tol=1e-3)`": self.top,
            "trace, `xtrace(98)`": lambda p, s: self._trace("xtrace", 98, p, s),
            "trace, `hutchpp_trace(99)`": self.trace,
            "trace, `hutchinson_trace(99)`": lambda p, s: self._trace("hutchinson_trace", 99, p, s),
        }

    def _trace(self, estimator: str, hvps: int, problem: Problem, seed: int) -> float:
        torch.manual_seed(seed)
        library = importlib.import_module(self.module)
        return float(getattr(library, estimator)(self.operator(problem), hvps))


class Eigenthings:
    """Its operator, Lanczos, Hutch++ and Hutchinson."""

    name, distribution, module = (
        "hessian-eigenthings",
        "hessian-eigenthings",
        "hessian_eigenthings",
    )

    def counted(self) -> tuple[Any, str, Callable[[tuple[Any, ...]], float]]:
        return importlib.import_module(self.module).HessianOperator, "matvec", lambda args: 1

    def operator(self, problem: Problem, **options: Any) -> Any:
        library = importlib.import_module(self.module)
        return library.HessianOperator(problem.model, problem.batches, problem.loss_fn, **options)

    def product(self, problem: Problem, v: Tensor, times: int = 1, **options: Any) -> list[Tensor]:
        operator = self.operator(problem, **options)
        return [operator.matvec(v) for _ in range(times)]

    def differences(self, problem: Problem, v: Tensor) -> Tensor:
        return self.product(problem, v, method="finite_difference")[0]

    def top(self, problem: Problem, seed: int, **options: int) -> float:
        lanczos = importlib.import_module(self.module).lanczos
        options = options or {"max_iter": 20}
        return float(lanczos(self.operator(problem), seed=seed, **options).eigenvalues[0])

    def trace(self, problem: Problem, seed: int, method: str = "hutch++") -> float:
        trace = importlib.import_module(self.module).trace
        operator = self.operator(problem)
        return float(trace(operator, num_matvecs=99, method=method, seed=seed).estimate)

    def calls(self) -> dict[str, Callable[[Problem, int], float]]:
        return {
            "lambda_max, `lanczos(k=1)`": lambda p, s: self.top(p, s, k=1),
            "lambda_max, `lanczos(max_iter=20)`": self.top,
            "trace, Hutch++ with 99": self.trace,
            "trace, Hutchinson with 99": lambda p, s: self.trace(p, s, "hutchinson"),
        }


class PyHessian:
    """Power iteration and Hutchinson, with their own stopping rules."""

    name, distribution, module = "PyHessian", "pyhessian", "pyhessian"

    def counted(self) -> tuple[Any, str, Callable[[tuple[Any, ...]], float]]:
        importlib.import_module(self.module)  # its class `hessian` hides the module of that name
        return sys.modules["pyhessian.hessian"], "hessian_vector_product", lambda args: 1

    def hessian(self, problem: Problem) -> Any:
        several = len(problem.batches) > 1
        data = {"dataloader": problem.batches} if several else {"data": problem.batches[0]}
        library = importlib.import_module(self.module)
        return library.hessian(problem.model, problem.loss, cuda=False, **data)

    def product(self, problem: Problem, v: Tensor, times: int = 1) -> list[Tensor]:
        hessian, pieces = self.hessian(problem), split(problem, v)
        if len(problem.batches) > 1:
            return [flat(hessian.dataloader_hv_product(pieces)[1]) for _ in range(times)]
        product = importlib.import_module(self.module).hessian_vector_product
        return [flat(product(hessian.gradsH, hessian.params, pieces)) for _ in range(times)]

    def top(self, problem: Problem, seed: int) -> float:
        torch.manual_seed(seed)
        return float(self.hessian(problem).eigenvalues()[0][0])

    def trace(self, problem: Problem, seed: int) -> float:
        torch.manual_seed(seed)
        return float(np.mean(self.hessian(problem).trace()))

    def calls(self) -> dict[str, Callable[[Problem, int], float]]:
        return {"lambda_max, `eigenvalues()`": self.top, "trace, `trace()`": self.trace}


LIBRARIES = (Geomwatch(), Curvlinops(), Eigenthings(), PyHessian())


def installed(library: Any) -> bool:
    try:
        importlib.import_module(library.module)
    except ImportError:
        return False
    return True


def version(library: Any) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library.distribution)
    return "not installed" if not installed(library) else ""


@contextlib.contextmanager
def counting(library: Any) -> Iterator[list[float]]:
    """Collect the HVPs, in those of the whole batch."""
    owner, name, weigh = library.counted()
    original, spent = getattr(owner, name), []

    def wrapper(*args: Any, **options: Any) -> Any:
        spent.append(weigh(args))
        return original(*args, **options)

    with mock.patch.object(owner, name, wrapper):
        yield spent


# --- Data, models and float64 references.


def digits(count: int = 512) -> tuple[Tensor, Tensor]:
    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs[:count] / 16, dtype=torch.float32), torch.tensor(targets[:count])


def mlp(*widths: int, between: Callable[[int], list[nn.Module]] | None = None) -> nn.Sequential:
    """Build a ReLU MLP; `between` gives what follows each hidden layer instead of a ReLU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), *(between(fan_out) if between else [nn.ReLU()])]
    extra = len(between(1)) if between else 1
    return nn.Sequential(*layers[:-extra])


def train(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(5)
    for _ in range(steps):
        pick = torch.randint(0, len(batch[0]), (64,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0][pick]), batch[1][pick]).backward()
        optimizer.step()
    optimizer.zero_grad()


def doubled(batch: Any) -> Any:
    if torch.is_tensor(batch):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: doubled(value) for key, value in batch.items()}
    return tuple(doubled(part) for part in batch)


def items(batch: Any) -> int:
    if torch.is_tensor(batch):
        return len(batch)
    return items(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


def exact_product(problem: Problem) -> Callable[[Tensor], Tensor]:
    """H v in float64 by plain double backward, each item of the data weighing the same."""
    model = copy.deepcopy(problem.model).double()
    params, total = list(model.parameters()), sum(items(b) for b in problem.batches)
    with sdpa_kernel(SDPBackend.MATH):
        losses = [problem.loss_fn(model, doubled(b)) * items(b) for b in problem.batches]
        loss = torch.stack(losses).sum() / total
        grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    used = [g for g in grads if g.requires_grad]
    shapes = [p.numel() for p in params]

    def product(v: Tensor) -> Tensor:
        pieces = [x.view_as(p) for x, p in zip(v.double().split(shapes), params, strict=True)]
        weights = [x for x, g in zip(pieces, grads, strict=True) if g.requires_grad]
        options = {"retain_graph": True, "materialize_grads": True}
        return flat(torch.autograd.grad(used, params, weights, **options))

    return product


def exact_top(problem: Problem) -> float:
    product = exact_product(problem)

    def matvec(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(v.ravel().copy())).numpy()

    operator = LinearOperator((problem.dim, problem.dim), matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(problem.dim)
    return float(eigsh(operator, k=1, which="LA", tol=1e-10, v0=start)[0][0])


def exact_trace(problem: Problem) -> float:
    """Trace of the GGN of a cross-entropy, mean over items of sum_c p_c |grad log p_c|^2.

    It is that of the Hessian too where the logits are linear in every single weight, as in an MLP
    of ReLUs.
    """
    model = copy.deepcopy(problem.model).double()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def log_p(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x[None],))[0].log_softmax(0)

    inputs, total = problem.batches[0][0].double(), 0.0
    for x in inputs.split(32):
        jacobians = vmap(jacrev(log_p), (None, 0))(params, x)
        squares = sum(j.flatten(2).square().sum(2) for j in jacobians.values())
        total += float((vmap(log_p, (None, 0))(params, x).exp() * squares).sum())
    return total / len(inputs)


# --- First table.


def accuracy(problem: Problem, seeds: int) -> str:
    rows = [
        "| library | quantity | value | relative error, median (worst) | HVPs | seconds |",
        "|---|---|---|---|---|---|",
    ]
    truths = {"lambda_max": exact_top(problem), "trace": exact_trace(problem)}
    rows += [f"| float64 | {name} | {truth:.6f} | exact | | |" for name, truth in truths.items()]
    for library in LIBRARIES:
        if not installed(library):
            rows.append(f"| {library.name} | | not installed | | | |")
            continue
        for label, call in library.calls().items():
            cells = attempt(lambda c=call, lib=library: timed(lib, c, problem, seeds))
            if isinstance(cells, str):
                rows.append(f"| {library.name} | {label} | {cells} | | | |")
                continue
            values, hvps, seconds = cells
            truth = truths[label.split(",")[0]]
            errors = sorted(abs(value / truth - 1) for value in values)
            middle = statistics.median(values)
            rows.append(
                f"| {library.name} | {label} | {middle:.4f} "
                f"| {percent(statistics.median(errors))} ({percent(errors[-1])}) "
                f"| {statistics.median(hvps):.0f} | {statistics.median(seconds[:3]):.2f} |"
            )
    return "\n".join(rows)


def timed(
    library: Any, call: Callable[[Problem, int], float], problem: Problem, seeds: int
) -> tuple[list[float], list[float], list[float]]:
    values, hvps, seconds = [], [], []
    call(fresh(problem), 0)  # warms up
    for seed in range(seeds):
        with counting(library) as spent:
            given = fresh(problem)
            start = time.perf_counter()
            values.append(call(given, seed))
            seconds.append(time.perf_counter() - start)
        hvps.append(sum(spent))
    return values, hvps, seconds


def fresh(problem: Problem) -> Problem:
    return Problem(copy.deepcopy(problem.model), problem.batches, problem.loss, problem.loss_fn)


def percent(error: float) -> str:
    if error < 1e-4:
        return "< 0.01 %"
    return f"{100 * error:.2g} %" if error < 0.995 else f"{100 * error:.0f} %"


def gradient_ms(problem: Problem) -> float:
    model, seconds = copy.deepcopy(problem.model), []
    for _ in range(20):
        start = time.perf_counter()
        problem.loss_fn(model, problem.batches[0]).backward()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


# --- Second table: cases.


class Unused(nn.Module):
    """An MLP with a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 16, 10)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """One attention over the eight rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 1, 8, 8)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class FromDict(nn.Module):
    """An MLP that takes its inputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 16, 10)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(inputs["pixels"])


class Concave(nn.MSELoss):
    """A loss whose Hessian has a negative trace."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -super().forward(outputs, targets)


def direction(problem: Problem) -> Tensor:
    v = torch.randn(problem.dim, generator=torch.Generator().manual_seed(1))
    return v / v.norm()


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def verdict(error: float, right: float = RIGHT) -> str:
    return "right" if error < right else f"**wrong by {percent(error)}**"


def attempt(call: Callable[[], Any]) -> Any:
    """Return what the call returns, or the first words of its exception."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return call()
    except Exception as error:  # what a library fails with is the result
        words = re.sub(r"(?<!\w)/\S+", "...", str(error)).replace("|", "/").split()
        said = " ".join(words[:9]) + (" ..." if len(words) > 9 else "")
        return f"{type(error).__name__}: {said}".replace("`", "").replace("<", "\\<")


def against_exact(make: Callable[[], Problem]) -> Callable[[Any], str]:
    """Compare one product with float64."""

    def case(library: Any) -> str:
        given = make()
        truth = exact_product(given)(direction(given))
        return verdict(relative(library.product(given, direction(given))[0], truth))

    return case


def in_train_mode(make: Callable[[], Problem], *, random: bool) -> Callable[[Any], str]:
    """As against_exact, but tell who measured in eval mode; if random, compare two products."""

    def case(library: Any) -> str:
        given, evaluated = make(), make()
        evaluated.model.eval()
        v = direction(given)
        truth, other = exact_product(given)(v), exact_product(evaluated)(v)
        first, second = library.product(given, v, times=2)
        if relative(first, other) < RIGHT:
            error = relative(other, truth)
            return "in eval mode" + ("" if random else f", **wrong by {percent(error)}**")
        return verdict(relative(second, first.double()) if random else relative(first, truth))

    return case


def differences(library: Any) -> str:
    if not hasattr(library, "differences"):
        return "has none"
    given = plain()
    truth = exact_product(given)(direction(given))
    return verdict(relative(library.differences(given, direction(given)), truth))


def compiled(library: Any) -> str:
    given = plain()
    truth = exact_product(given)(direction(given))
    torch._dynamo.reset()
    given.model = torch.compile(given.model, backend="aot_eager")
    return verdict(relative(library.product(given, direction(given))[0], truth))


def negative_trace(library: Any) -> str:
    """Say the worst error of five seeds, and the fewest HVPs."""
    inputs, labels = digits()
    given = problem(mlp(64, 10), [(inputs, F.one_hot(labels, 10).float())], Concave())
    product = exact_product(given)
    truth = sum(float(product(e) @ e.double()) for e in torch.eye(given.dim))
    errors, spent = [], math.inf
    for seed in range(5):
        with counting(library) as hvps:
            errors.append(abs(library.trace(fresh(given), seed) / truth - 1))
        spent = min(spent, sum(hvps))
    return f"{verdict(max(errors), TRACE_RIGHT)}, from {spent:.0f} HVPs"


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "mode": [m.training for m in model.modules()],
        "`.grad`": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "running statistics": [b.clone() for b in model.buffers()],
    }


def same(old: Any, new: Any) -> bool:
    if torch.is_tensor(old) and torch.is_tensor(new):
        return torch.equal(old, new)
    return type(old) is type(new) and old == new


def side_effects(make: Callable[[], Problem]) -> Callable[[Any], str]:
    """Ask for lambda_max in the middle of a training step and see what has changed."""

    def case(library: Any) -> str:
        given = make()
        for p in given.model.parameters():
            p.grad = torch.ones_like(p)
        before = state(given.model)
        found = attempt(lambda: library.top(given, 0))
        after = state(given.model)
        changed = [
            name
            for name, old in before.items()
            if not all(same(a, b) for a, b in zip(old, after[name], strict=True))
        ]
        text = f"**changes {', '.join(changed)}**" if changed else "none"
        return f"{text} (raises)" if isinstance(found, str) else text

    return case


def plain() -> Problem:
    return problem(mlp(64, 16, 10), [digits(130)])


def uneven() -> Problem:
    inputs, labels = digits(130)
    return problem(plain().model, [(inputs[:128], labels[:128]), (inputs[128:], labels[128:])])


def one_dict() -> Problem:
    inputs, labels = digits(130)
    made = problem(FromDict(), [{"pixels": inputs, "labels": labels}])
    made.loss_fn = lambda model, batch: F.cross_entropy(model(batch), batch["labels"])
    return made


def dict_inputs() -> Problem:
    inputs, labels = digits(130)
    return problem(FromDict(), [({"pixels": inputs}, labels)])


def dropout() -> Problem:
    layers = mlp(64, 32, 10, between=lambda width: [nn.ReLU(), nn.Dropout(0.2)])
    return problem(layers, [digits(130)])


def batch_norm() -> Problem:
    layers = mlp(64, 32, 10, between=lambda width: [nn.BatchNorm1d(width), nn.ReLU()])
    return problem(layers, [digits(130)])


CASES: dict[str, Callable[[Any], str]] = {
    "plain MLP (control)": against_exact(plain),
    "batches of 128 and 2 items": against_exact(uneven),
    "finite differences in float32, ReLU": differences,
    "dropout in train mode, two products": in_train_mode(dropout, random=True),
    "BatchNorm in train mode": in_train_mode(batch_norm, random=False),
    "a parameter outside the graph": against_exact(lambda: problem(Unused(), [digits(130)])),
    "`scaled_dot_product_attention`": against_exact(lambda: problem(Attention(), [digits(130)])),
    '`torch.compile(backend="aot_eager")`': compiled,
    "inputs in a dict, (dict, targets)": against_exact(dict_inputs),
    "inputs and targets in one dict": against_exact(one_dict),
    "negative trace": negative_trace,
    "side effects": side_effects(plain),
    "side effects with BatchNorm": side_effects(batch_norm),
}


def cases() -> str:
    names = " | ".join(library.name for library in LIBRARIES)
    rows = [f"| case | {names} |", "|---" * (len(LIBRARIES) + 1) + "|"]
    for label, case in CASES.items():
        cells = [
            attempt(lambda c=case, lib=library: c(lib)) if installed(library) else "not installed"
            for library in LIBRARIES
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = 1 if quick else 5
    batch = digits()
    start, trained = (problem(mlp(64, 128, 128, 10), [batch]) for _ in range(2))
    train(trained.model, batch, 100)
    versions = ", ".join(f"{lib.name} {version(lib)}".strip() for lib in LIBRARIES)
    text = f"""# Beside other libraries

{written_by("peers.py")} Every cell measured in one run with these versions:
{versions}, torch {torch.__version__}.

## Error and cost

MLP 64-128-128-10 with ReLU, cross-entropy, 512 real digits, float32. Reference in float64:
lambda_max by eigsh (tol 1e-10), the exact trace from the GGN, whose diagonal is that of the
Hessian in an MLP of ReLUs. Value and HVPs are medians over {seeds} seeds, one call each. HVPs are
counted as the library makes them, in those of the whole batch, checks included. Seconds: the median
of three calls after one to warm up, one torch thread, on a machine shared with other work: compare
ratios only. Calls without options take the library's defaults.

### At initialisation (a gradient takes {gradient_ms(start):.1f} ms)

{accuracy(start, seeds)}

### After 100 steps of SGD with momentum (a gradient takes {gradient_ms(trained):.1f} ms)

{accuracy(trained, seeds)}

## Training code as it is

Each cell is one product H v along one random unit vector in float32 against plain double backward
in float64, on small models and 130 digits: "right" is an error below {percent(RIGHT)}; where the
library raises, the first words of the exception. The product of geomwatch is that of the
`Objective` behind `measure` and the monitor. Finite differences take the library's own step.
Dropout: how far two products differ. Negative trace: the worst of five seeds with 99 products
(PyHessian: its default), "right" below {percent(TRACE_RIGHT)}. Side effects: what has changed after
asking for lambda_max in the middle of a training step.

{cases()}
"""
    print(text)
    if not quick:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
