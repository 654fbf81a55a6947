"""Quantities: their names, what each costs and needs, and what those of one point share.

May import estimators, stability, curvature, isolation, vectors, parallel, records and errors. A
newcomer would change something here to have another quantity measured: a row in `table`.
"""
