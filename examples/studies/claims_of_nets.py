"""The paper's claims about its three nets, each with its criterion."""

from __future__ import annotations

from studies.cases import ARCHITECTURES, Case
from studies.table import Table
from studies.verdicts import Claim, Condition, above, below, larger, opposite

SMOOTH, TURNS = 0.05, 2.0  # of the range, left beside a quartic; changes of slope
TINY = 1e-4  # the paper's own limit of normalized sharpness
_APART = 0.1  # relative spread of eigenvalues that do not cluster
_MUCH = 10.0  # what ">>" is taken to mean

NAMES = {"early": "at 10 %", "end": "at the end"}


def of_nets(table: Table) -> list[Claim]:
    """Return the claims of sections 4.1 to 4.3 and Table 1, judged."""
    mlp, resnet, transformer = (table.net(name) for name in ARCHITECTURES)
    return [
        Claim(
            "4.1",
            "The MLP reaches a smooth basin",
            f"a quartic leaves less than {SMOOTH:.0%} of the range of its slices, and the slope "
            f"changes less than {TURNS:.0f} times",
            tuple(
                below(f"{word} {NAMES[stage]}", table.mean(mlp, name, stage), limit)
                for stage in NAMES
                for name, word, limit in (
                    ("train_filter_rest", "rest", SMOOTH),
                    ("train_filter_turns", "turns", TURNS),
                )
            ),
        ),
        Claim(
            "4.1",
            "The MLP gets there quickly",
            "it reaches the target loss in fewer steps than the others",
            tuple(
                _more(table, c, mlp, "steps_to_target", "end", "steps")
                for c in (resnet, transformer)
            ),
        ),
        Claim(
            "4.1, 6.2",
            "The MLP has low curvature mass and low roughness: easy optimisation",
            "tr(H), R and steps to the target are all smaller than those of both others, tr and R "
            "at 10 %",
            tuple(
                _more(table, c, mlp, name, stage, word)
                for c in (resnet, transformer)
                for name, stage, word in (
                    ("trace", "early", "tr"),
                    ("train_filter_variance", "early", "R"),
                    ("steps_to_target", "end", "steps"),
                )
            ),
        ),
        _flat(table, mlp),
        Claim(
            "4.1",
            "The MLP's interpolation barrier is small but > 0",
            "the height is above 0, and below that of both others",
            (
                above("height", table.mean(mlp, "barrier_height"), 0.0),
                *(
                    _more(table, c, mlp, "barrier_height", "end", "height")
                    for c in (resnet, transformer)
                ),
            ),
        ),
        Claim(
            "4.2",
            "The ResNet's dominant eigenvalues cluster",
            f"the fifth is within {_APART:.0%} of the first",
            tuple(
                larger(
                    f"λ₅ of λ₁ {NAMES[stage]}",
                    table.mean(resnet, "eigenvalue_5", stage),
                    table.mean(resnet, "eigenvalue_1", stage),
                    least=1 - _APART,
                )
                for stage in NAMES
            ),
        ),
        Claim(
            "4.2, Table 1",
            "The ResNet is stiff: its λ_max is above the MLP's",
            "the ratio is above 1 at 10 % and at the end, in train and in eval mode",
            _both_modes(table, resnet, mlp, "lambda_max", 1.0),
        ),
        Claim(
            "4.2, 5",
            "Trace: ResNet >> MLP",
            f"the ratio is above {_MUCH:.0f} at 10 % and at the end, in train and in eval mode",
            _both_modes(table, resnet, mlp, "trace", _MUCH),
        ),
        Claim(
            "4.2",
            "The ResNet's barriers are larger than the MLP's",
            "the ratio of heights at the end, and of the largest losses, is above 1",
            tuple(
                _more(table, resnet, mlp, name, "end", word)
                for name, word in (("barrier_height", "height"), ("barrier_max", "B"))
            ),
        ),
        _nearly_flat(table, transformer, mlp),
        Claim(
            "4.3, Table 1",
            "The Transformer is rugged at micro-scale",
            "what a quartic leaves of its slices at the end, dropout off, is more than that of the "
            f"MLP, and the slope changes more than {TURNS:.0f} times",
            (
                *(
                    _more(table, transformer, mlp, f"eval_{scale}_rest", "end", f"rest, {scale}")
                    for scale in ("unit", "filter")
                ),
                above("turns", table.mean(transformer, "eval_filter_turns"), TURNS),
            ),
        ),
        Claim(
            "Table 1",
            "R is high for the Transformer, very low for the MLP",
            "the ratio at 10 % is above 1 along both kinds of directions",
            tuple(
                _more(table, transformer, mlp, f"train_{scale}_variance", "early", f"R, {scale}")
                for scale in ("unit", "filter")
            ),
        ),
        Claim(
            "6.2",
            "The Transformer is harder to optimise",
            "it takes more steps to the target than both others (by another optimizer)",
            tuple(
                _more(
                    table,
                    transformer,
                    c,
                    "steps_to_target",
                    "end",
                    f"steps, to the {c.architecture}",
                )
                for c in (mlp, resnet)
            ),
        ),
    ]


def _more(table: Table, a: Case, b: Case, quantity: str, stage: str, word: str) -> Condition:
    name = f"{word}, {a.architecture} to {b.architecture}" if "," not in word else word
    return larger(name, table.mean(a, quantity, stage), table.mean(b, quantity, stage))


def _both_modes(
    table: Table, a: Case, b: Case, quantity: str, least: float
) -> tuple[Condition, ...]:
    return tuple(
        larger(
            f"{mode or 'train'} mode {NAMES[stage]}",
            table.mean(a, f"{mode}_{quantity}".strip("_"), stage),
            table.mean(b, f"{mode}_{quantity}".strip("_"), stage),
            least=least,
        )
        for stage in NAMES
        for mode in ("", "eval")
    )


def _flat(table: Table, mlp: Case) -> Claim:
    small = table.mean(mlp, "normalized_sharpness_small")
    each, loss = table.mean(mlp, "normalized_sharpness_linf"), table.mean(mlp, "loss")
    share = larger("NS∞ at ε = 0.01, to the loss itself", each, loss, least=0.1)
    return Claim(
        "4.1",
        "The MLP's normalized sharpness is tiny: a strongly flat region",
        f"at ε = 0.001 NS is below {TINY:g} at the end, and moving each weight by 1 % raises the "
        "loss by less than a tenth of itself",
        (below("NS at ε = 0.001", small, TINY), opposite(share)),
    )


def _nearly_flat(table: Table, transformer: Case, mlp: Case) -> Claim:
    conditions = [
        _more(table, mlp, transformer, name, stage, f"{word} {NAMES[stage]}")
        for stage in NAMES
        for name, word in (("trace", "tr"), ("trace_per_param", "tr/D"))
    ]
    if table.text is not None:
        traces = table.mean(table.text, "trace", "early")
        conditions.append(below("tr on text at 10 %", traces, 1.0))
    return Claim(
        "4.3",
        "The Transformer is nearly flat on average",
        "tr(H) and tr(H)/D are below the MLP's on the same images, and tr(H) on text, briefly "
        "trained, is below 1",
        tuple(conditions),
    )
