"""What the paper may have been deceived by, and its rule of flat but isolated minima."""

from __future__ import annotations

from studies.claims_of_nets import SMOOTH, TINY
from studies.inference import number
from studies.table import Table
from studies.verdicts import FAILS, HOLDS, OPEN, Claim, Condition, known

_ALIKE = 0.1  # of the spread of the true ones: estimates that repeat
_FEW = 2  # nets on either side of a rule that it takes to judge it
_NOISE = 0.1  # of the range, left beside a quartic by noise (white noise leaves .2 to .3)


def repeats(table: Table) -> Claim:
    """Judge the demonstration that power iteration finds one eigenvalue again and again."""
    conditions = []
    for case in table.plain:
        found = table.artefact(case, "power")
        repeated, exact = found["without_deflation"], found["lanczos"]
        spreads = [max(values) - min(values) for values in (repeated, exact)]
        conditions.append(
            Condition(
                HOLDS if spreads[0] < _ALIKE * spreads[1] else FAILS,
                f"{case.architecture} on {case.kind}, power iteration {_listed(repeated)} where "
                f"Lanczos has {_listed(exact)}",
            )
        )
    return Claim(
        "4.1, 4.2",
        "The top-eigen estimate repeats due to lack of deflation",
        f"estimates from several starts without deflation spread over less than {_ALIKE:.0%} of "
        "what as many of the largest eigenvalues spread over by Lanczos, in each net",
        tuple(conditions),
    )


def _listed(values: list[float]) -> str:
    return ", ".join(number(v) for v in values)


def made_by_changes(table: Table) -> list[Claim]:
    """Judge the demonstration that a loss that changes looks rugged."""
    redrawn, other_batches = [], []
    for case in table.plain:
        found = table.artefact(case, "rugged")
        if case.architecture == "Transformer":
            redrawn += _smooth_and_rough(f"Transformer on {case.kind}", found, "redrawn")
        else:
            other_batches += _smooth_and_rough(case.architecture, found, "batches")
    return [
        Claim(
            "4.3",
            "(What may have been seen: dropout left on makes smooth slices look rugged)",
            f"along unit directions a quartic leaves less than {SMOOTH:.0%} of the range with "
            f"dropout off, more than {_NOISE:.0%} with masks drawn anew at each point",
            tuple(redrawn),
        ),
        Claim(
            "4.3",
            "(Another mini-batch at each point does the same to any net)",
            f"as above, more than {_NOISE:.0%} with another mini-batch at each point",
            tuple(other_batches),
        ),
    ]


def _smooth_and_rough(name: str, found: dict[str, dict[str, float]], way: str) -> list[Condition]:
    off, on = found["off_unit"], found[f"{way}_unit"]
    steady = known(
        f"{name}, rest and turns as it is", [off["rest"], off["turns"]], holds=off["rest"] < SMOOTH
    )
    return [steady, known(way, [on["rest"], on["turns"]], holds=on["rest"] > _NOISE)]


def isolated_but_flat(table: Table) -> Claim:
    """Judge the rule of section 6.3 on nets that are flat and far apart."""
    on, off, listed = [], [], []
    for case in table.plain:
        small = table.mean(case, "normalized_sharpness_small").mean
        height = table.mean(case, "barrier_height").mean
        if small is None or height is None:
            continue
        (on if small <= TINY and height >= 1 else off).append(case)
        spread = table.mean(case, "test_loss").error
        listed.append(
            f"{case.architecture} on {case.kind} NS {small:.2g}, height {height:.2g}, test loss "
            f"± {spread or float('nan'):.2g}"
        )
    enough = min(len(on), len(off)) >= _FEW
    spreads = [[table.mean(c, "test_loss").error or 0.0 for c in side] for side in (on, off)]
    verdict = OPEN
    if enough:
        verdict = HOLDS if min(spreads[0]) > max(spreads[1]) else FAILS
    return Claim(
        "6.3",
        "NS <= 1e-4 but barriers >= 1: flat but isolated, hence seed-sensitive",
        f"nets for which it holds (NS at ε = 0.001) differ more between seeds in test loss than "
        f"those for which it does not; undecided with fewer than {_FEW} nets on either side",
        (Condition(verdict, "; ".join(listed)),),
    )
