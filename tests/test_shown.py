"""What records, estimates, alerts and monitors look like where they are printed or shown."""

from __future__ import annotations

from loops import small, train
from problems import cross_entropy
from run_lines import alert, record

from geomwatch import Estimate, Measurement, Monitor


def test_a_record_is_a_table_with_errors_and_reasons():
    assert str(record()).splitlines() == [
        "step 40, loss 0.5, 10 products, 0.01 s",
        "  lambda_max        12.3 ± 0.4",
        "  stability_margin  0.33 ± 0.01",
        "  trace             68 ± 21 (15 steps ago)",
        "  grad_norm         - (not finite)",
    ]
    assert record()._ipython_key_completions_() == list(record())


def test_what_a_notebook_shows_is_escaped():
    hostile = {"<script>": Estimate(None, reason="<b>&")}
    shown = record(estimates=hostile)._repr_html_()
    assert "<td>&lt;script&gt;</td><td>- (&lt;b&gt;&amp;)</td>" in shown
    assert alert(message="<i>\nmore")._repr_html_().endswith("&lt;i&gt;<br>more")
    assert Estimate(12.34, 0.41, "residual")._repr_html_() == "12.3 ± 0.4"


def test_an_alert_and_a_monitor_are_a_line():
    assert str(alert()) == "step 41, warning, stability_margin: the margin is 0.7"
    model, optimizer = small()
    how = Measurement(quantities="stability_margin")
    monitor = Monitor(model, cross_entropy, optimizer, how)
    assert repr(monitor) == "<Monitor at step 0: 0 probes, 0 looks, 0 alerts>"
    train(model, optimizer, monitor, 1)
    assert repr(monitor).startswith("<Monitor at step 1: 1 probes, 1 looks, 0 alerts, stability m")
