"""Methods of single objects with something around them, and put back as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from geomwatch.integrations._host.tap import Tap, named, replaced


class Host:
    def step(self, rate: float, *, times: int = 1) -> float:
        """Return how far it goes."""
        return rate * times


def tapped(host: Host, heard: list[Any]) -> Tap:
    def around(original: Any, args: Any, kwargs: Any) -> Any:
        heard.append(named(("rate", "times"), args, kwargs))
        return original(*args, **kwargs)

    tap = Tap()
    tap.stand_around(host, "step", around)
    return tap


def test_a_method_does_what_it_did_and_is_seen_doing_it():
    host, heard = Host(), []
    tap = tapped(host, heard)
    assert host.step(2.0, times=3) == 6.0
    assert heard == [{"rate": 2.0, "times": 3}]
    assert host.step.__doc__ == Host.step.__doc__
    tap.close()
    assert host.step == Host.step.__get__(host)
    assert not vars(host)


def test_what_somebody_else_has_put_in_its_place_comes_back():
    host, heard = Host(), []
    mine = host.step = lambda rate: -rate
    tap = tapped(host, heard)
    assert host.step(1.0) == -1.0
    tap.close()
    assert host.step is mine


def test_two_taps_around_one_method_both_hear_and_may_be_closed_in_any_order():
    host, first, second = Host(), [], []
    taps = [tapped(host, first), tapped(host, second)]
    host.step(1.0)
    taps[0].close()  # the other stands around it, and calls go through both
    host.step(2.0)
    assert [len(first), len(second)] == [2, 2]
    taps[1].close()
    assert host.step(3.0) == 3.0
    assert len(second) == 2


def test_a_copy_of_the_object_has_the_bare_method():
    host, heard = Host(), []
    tapped(host, heard)
    assert copy.deepcopy(host).step(2.0) == 2.0
    assert heard == []


def test_an_attribute_is_replaced_for_a_while_also_when_something_fails():
    host = Host()
    host.name = "own"
    with pytest.raises(ZeroDivisionError), replaced(host, "name", "other"):
        assert 1 / (host.name != "other")
    assert host.name == "own"
    with replaced(host, "step", None):
        assert host.step is None
    assert vars(host) == {"name": "own"}
