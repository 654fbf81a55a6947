"""Estimators: functions of losses, gradients and products, each with its error and its cost.

May import stability, isolation, vectors and records. A newcomer would change something here to
estimate another quantity: one function that returns an `Estimate`, with its formula, its citation,
its units and its cost in the docstring; `quantities` then gives it a name.
"""
