"""The paper's study of three architectures again, with error bars: what of it holds?

Trains an MLP, a ResNet-18 and a small Transformer encoder on one set of real images, the last one
on text too, and variants of each without skip connections or normalisation, at other widths and
learning rates; measures the geometry of each at the start, after a tenth of its training and at the
end; and writes a report in which every claim of the paper is held against the numbers.

    python examples/three_architectures.py            # into docs/studies/three-architectures/
    python examples/three_architectures.py --quick    # some minutes, into runs/
    python examples/three_architectures.py --images digits  # without `make data`, and without text

Pieces are kept under runs/ as they are computed: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]  # its parts, and the data

import torch  # noqa: E402  # after the paths that the parts below are found on
from studies.running import compute  # noqa: E402
from studies.schedule import pieces  # noqa: E402
from studies.settings import full, quick  # noqa: E402
from studies.store import Store  # noqa: E402
from tasks.data import DataMissingError  # noqa: E402

RUNS = ROOT / "runs" / "three-architectures"
DOCS = ROOT / "docs" / "studies" / "three-architectures"

logger = logging.getLogger("study")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute what is missing and write the report."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("geomwatch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    settings = quick() if options.quick else full()
    if options.images == "digits":
        settings = dataclasses.replace(settings, images="digits", text=False)
    store = Store(options.runs, settings)
    is_whole = settings == full()
    out = options.out or (DOCS if is_whole else store.folder / "report")
    try:
        compute(store, pieces(store, settings))
    except DataMissingError as error:
        logger.error("%s Or pass --images digits.", error)
        return 2
    from studies.report import write

    write(store, settings, out)
    logger.info("the report: %s", out / "README.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller nets, fewer steps and seeds")
    parser.add_argument("--images", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where pieces are kept")
    parser.add_argument("--out", type=Path, help="where the report goes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
