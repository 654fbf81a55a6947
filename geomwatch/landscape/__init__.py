"""The landscape of a loss: slices, planes, barriers and the spectrum of its Hessian, with pictures.

Its functions take a model, `loss_fn(model, batch)`, batches (a list or a DataLoader) and, where the
loss is evaluated or differentiated, `how` (a `geomwatch.Measurement`); the model is left as it was,
bit for bit. Computing needs nothing beyond geomwatch itself; drawing needs matplotlib and aligning
SciPy, `pip install 'geomwatch[landscape]'`.

May import quantities (for `Measurement`), curvature, rules, estimators, isolation, vectors,
parallel, records and errors; within it `results`, `direction`, `provenance` and `states` import
nothing of the others, `evaluator` and `scan` only those. A newcomer would change something here to
look at finished models in another way: a function that fills a result of `results`, and one in
`figures` that draws it.
"""

from geomwatch.landscape.barrier import barrier
from geomwatch.landscape.bezier import Bending, bezier
from geomwatch.landscape.density import density
from geomwatch.landscape.direction import Direction
from geomwatch.landscape.directions import (
    gradient_direction,
    hessian_directions,
    random_direction,
    update_direction,
)
from geomwatch.landscape.figures.comparison import plot_comparison
from geomwatch.landscape.figures.lines import plot_barrier, plot_density, plot_slice
from geomwatch.landscape.figures.surfaces import plot_plane, plot_surface
from geomwatch.landscape.fits import Fit, polynomial_fit
from geomwatch.landscape.isolated import judge_isolation
from geomwatch.landscape.permutations.alignment import Alignment, align
from geomwatch.landscape.permutations.units import permutable_units
from geomwatch.landscape.results import Barrier, Curve, Density, Plane, Slice, Trajectory
from geomwatch.landscape.slices import plane, slice_1d
from geomwatch.landscape.storage import load, save
from geomwatch.landscape.trajectory import grid_around, pca_directions, trajectory

__all__ = [
    "Alignment",
    "Barrier",
    "Bending",
    "Curve",
    "Density",
    "Direction",
    "Fit",
    "Plane",
    "Slice",
    "Trajectory",
    "align",
    "barrier",
    "bezier",
    "density",
    "gradient_direction",
    "grid_around",
    "hessian_directions",
    "judge_isolation",
    "load",
    "pca_directions",
    "permutable_units",
    "plane",
    "plot_barrier",
    "plot_comparison",
    "plot_density",
    "plot_plane",
    "plot_slice",
    "plot_surface",
    "polynomial_fit",
    "random_direction",
    "save",
    "slice_1d",
    "trajectory",
    "update_direction",
]
