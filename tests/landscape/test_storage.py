"""Results on disk: all of them come back as they were, and half a result does not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from landscapes import every_kind

from geomwatch import landscape
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.landscape.results import Slice


@pytest.mark.parametrize("kind", ["slice", "plane", "trajectory", "barrier", "density"])
def test_a_result_comes_back_as_it_was(kind, tmp_path):
    result = every_kind()[kind]
    written = landscape.save(result, tmp_path / "runs" / "some.thing")
    assert written == tmp_path / "runs" / "some.thing.json"
    assert sorted(p.name for p in written.parent.iterdir()) == ["some.thing.json", "some.thing.npz"]
    for name in ("some.thing", "some.thing.npz", "some.thing.json"):
        again = landscape.load(tmp_path / "runs" / name)
        assert type(again) is type(result)
        for field in dataclasses.fields(result):
            a, b = getattr(result, field.name), getattr(again, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
                assert np.array_equal(a, b, equal_nan=True)
            else:
                assert json.dumps(a, default=dict) == json.dumps(b, default=dict)


def test_the_json_says_what_was_evaluated_and_is_strict(tmp_path):
    losses = np.array([1.0, np.nan, np.inf])
    result = Slice(
        np.arange(3.0), losses, float("nan"), "v", 2, {"repeat_difference": float("inf")}
    )
    path = landscape.save(result, tmp_path / "slice")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    header = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert header["kind"] == "Slice"
    assert header["arrays"] == {"alphas": [3], "losses": [3]}
    again = landscape.load(path)
    assert np.array_equal(again.losses, losses, equal_nan=True)
    assert np.isnan(again.loss)
    assert again.provenance == {"repeat_difference": float("inf")}
    how = every_kind()["plane"].provenance
    wanted = {"geomwatch", "torch", "date", "weights", "model", "loss_fn", "mode", "dtype", "items"}
    assert wanted | {"directions", "passes", "seconds", "deterministic", "cosine"} <= set(how)


def test_halves_that_do_not_belong_together_are_refused(tmp_path):
    found = every_kind()
    landscape.save(found["slice"], tmp_path / "one")
    landscape.save(found["plane"], tmp_path / "two")
    (tmp_path / "two.npz").replace(tmp_path / "one.npz")
    with pytest.raises(UsageError, match=r"one\.npz must be the file that one\.json was written"):
        landscape.load(tmp_path / "one")
    with pytest.raises(UsageError, match=r"two\.npz is missing"):
        landscape.load(tmp_path / "two")
    with pytest.raises(UsageError, match=r"three\.npz is missing"):
        landscape.load(tmp_path / "three.json")


def test_other_files_and_things_are_refused(tmp_path):
    path = landscape.save(every_kind()["slice"], tmp_path / "one")
    header = json.loads(path.read_text(encoding="utf-8"))
    for text, message in [
        ("{", "must name a saved result"),
        ("[]", "must name a saved result"),
        (json.dumps({**header, "kind": "Cake"}), "must name a saved result"),
        (json.dumps({**header, "format": 7}), "must have format 1, got 7"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            landscape.load(path)
    with pytest.raises(UsageTypeError, match=r"must be one of Slice, Plane, .* got dict"):
        landscape.save({}, tmp_path / "two")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    found = every_kind()["slice"]
    path = landscape.save(found, tmp_path / "one")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        landscape.save(found, tmp_path / "one")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
