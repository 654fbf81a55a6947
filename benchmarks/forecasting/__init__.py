"""The parts of benchmarks/forecast.py: the grid of runs, one run, detectors, the report."""
