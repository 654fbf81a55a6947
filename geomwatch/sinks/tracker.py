"""Records and looks as scalars in a tracker, and alerts in the way that it has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomwatch.errors import UsageTypeError
from geomwatch.records import Alert
from geomwatch.sinks.lines import Line
from geomwatch.sinks.parsing import alert_of, look_of, record_of

_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}  # of wandb and trackio
_LONGEST = 500  # characters of a tag of MLflow


class Tracker:
    """A sink that writes to a tracker: `sinks=[Tracker(writer), "run.jsonl"]`.

    | tracker | scalars | alerts |
    |---|---|---|
    | a `SummaryWriter` of TensorBoard | `add_scalar` at the step | `add_text` |
    | a run of wandb, or `trackio` | `log`, with the step as `geom/step` | `alert` |
    | `mlflow`, in a run that is active | `log_metrics` at the step | `set_tag` |

    Args:
        tracker: one of these.
        prefix: in front of each name.

    Raises:
        UsageTypeError: it is none of them.
    """

    def __init__(self, tracker: Any, prefix: str = "geom/") -> None:
        if not any(hasattr(tracker, name) for name in ("add_scalar", "log_metrics", "log")):
            raise UsageTypeError(
                "tracker must be a SummaryWriter, a run of wandb, mlflow or trackio, got "
                f"{tracker!r:.60}.",
                write='Tracker(torch.utils.tensorboard.SummaryWriter("runs/first"))',
            )
        self._tracker, self._prefix = tracker, prefix

    def __call__(self, line: Line) -> None:
        """Write one line of a run."""
        prefix = f"{self._prefix}{line['monitor']}/" if "monitor" in line else self._prefix
        if line["kind"] == "record":
            self._log(record_of(line).scalars(prefix), line["step"])
        elif line["kind"] == "look":
            self._log(look_of(line).scalars(prefix), line["step"])
        elif line["kind"] == "alert":
            send_alert(self._tracker, alert_of(line), prefix)

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        if hasattr(self._tracker, "add_scalar"):
            for name, value in scalars.items():
                self._tracker.add_scalar(name, value, step)
        elif hasattr(self._tracker, "log_metrics"):
            self._tracker.log_metrics(dict(scalars), step=step)
        else:  # the steps of the user's own calls must not go backwards
            self._tracker.log({**scalars, f"{self._prefix}step": step})


def send_alert(tracker: Any, alert: Alert, prefix: str = "geom/") -> None:
    """Send an alert the way a tracker has them; to one that has no way, nothing."""
    if hasattr(tracker, "add_text"):
        said = f"**{alert.severity}** {alert.rule}: {alert.message}"
        tracker.add_text(f"{prefix}alert", said, alert.step)
    elif hasattr(tracker, "alert"):
        title = f"geomwatch: {alert.rule} at step {alert.step}"
        tracker.alert(title=title, text=alert.message, level=_LEVELS[alert.severity])
    elif hasattr(tracker, "set_tag"):
        name = f"{prefix}alert/{alert.rule}".replace("/", ".")
        tracker.set_tag(name, f"step {alert.step}, {alert.severity}: {alert.message}"[:_LONGEST])
