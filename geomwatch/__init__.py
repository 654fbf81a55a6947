"""Watch the loss geometry of a PyTorch training run, and be warned before it diverges."""

from geomwatch import records
from geomwatch.doctor import Diagnosis, doctor
from geomwatch.errors import UsageError
from geomwatch.isolation.isolation import is_probing
from geomwatch.losses import model_loss, supervised
from geomwatch.measure import measure
from geomwatch.monitoring.group import Group
from geomwatch.monitoring.monitor import Monitor
from geomwatch.quantities.measurement import Measurement
from geomwatch.records import Adjustment, Alert, Estimate, Look, Record
from geomwatch.sinks.json_lines import JsonLines
from geomwatch.sinks.reading import Run, read
from geomwatch.sinks.tracker import Tracker
from geomwatch.stability.registry import register_optimizer

__all__ = [
    "Adjustment",
    "Alert",
    "Diagnosis",
    "Estimate",
    "Group",
    "JsonLines",
    "Look",
    "Measurement",
    "Monitor",
    "Record",
    "Run",
    "Tracker",
    "UsageError",
    "doctor",
    "is_probing",
    "measure",
    "model_loss",
    "read",
    "register_optimizer",
    "supervised",
]
__version__ = records.VERSION
