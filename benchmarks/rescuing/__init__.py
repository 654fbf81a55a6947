"""The parts of rescue.py."""
