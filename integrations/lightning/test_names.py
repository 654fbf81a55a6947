"""One class for both of Lightning's names, and what of it can be copied."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

from geomwatch.integrations.lightning import GeomwatchCallback

BOTH = pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)


@BOTH
def test_the_callback_is_one_of_the_lightning_in_use(host):
    callback = GeomwatchCallback()
    assert isinstance(callback, host.Callback)
    assert isinstance(callback, GeomwatchCallback)
    assert callback.state_key == "GeomwatchCallback"


@pytest.mark.parametrize("used", ["lightning.pytorch", "pytorch_lightning"])
def test_a_lightning_that_nobody_uses_is_not_imported(used):
    # the import order is that of a sorted import block
    program = (
        f"from geomwatch.integrations.lightning import GeomwatchCallback\nimport {used}, sys\n"
        f"assert isinstance(GeomwatchCallback(), {used}.Callback)\n"
        "assert len({'lightning.pytorch', 'pytorch_lightning'} & set(sys.modules)) == 1"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


class Named(GeomwatchCallback):
    """A user's own."""


@pytest.mark.parametrize("kind", [GeomwatchCallback, Named])
def test_a_callback_can_be_pickled_for_processes_that_are_spawned(Net, fit, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, ModuleType(__name__)))
    monkeypatch.setattr(sys.modules[__name__], "Named", Named, raising=False)
    callback = kind(every=3)
    fit(Net(), [callback])
    copied = pickle.loads(pickle.dumps(callback))
    assert type(copied) is type(callback)
    assert copied.monitor is None
    copied.load_state_dict({})
    fit(Net(), [copied])
    assert len(copied.monitor.history) == 3


def test_a_module_can_be_copied_and_pickled_while_it_is_watched(Net, fit):
    class Copying(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer, self.trainer = self.trainer, None
                self.copied = copy.deepcopy(self)
                self.trainer = trainer

    module = Copying()
    fit(module, [GeomwatchCallback(every=1)])
    assert module.copied.training_step.__self__ is module.copied


def test_a_missing_lightning_is_named_with_what_to_install(monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "geomwatch.integrations._lightning.names")
    words = r"needs lightning or pytorch-lightning.*pip install 'geomwatch\[lightning\]'"
    with pytest.raises(ImportError, match=words):
        importlib.import_module("geomwatch.integrations._lightning.names")
