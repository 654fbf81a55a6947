"""The tests of the kits share what those in tests/ share."""

from conftest import _seeds, needs_data, pytest_collection_modifyitems

__all__ = ["_seeds", "needs_data", "pytest_collection_modifyitems"]
