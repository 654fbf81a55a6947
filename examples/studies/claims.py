"""All claims of the paper that numbers can be held against, judged."""

from __future__ import annotations

from studies.claims_of_artefacts import isolated_but_flat, made_by_changes, repeats
from studies.claims_of_nets import of_nets
from studies.claims_of_parts import of_parts
from studies.claims_of_prediction import of_prediction
from studies.ranking import Runs
from studies.table import Table
from studies.verdicts import Claim


def judged(table: Table, runs: Runs) -> list[Claim]:
    """Return every claim with its verdict: first of nets, then of parts, then of prediction."""
    return [
        repeats(table),
        *of_nets(table),
        *made_by_changes(table),
        *of_parts(table),
        *of_prediction(table, runs),
        isolated_but_flat(table),
    ]
