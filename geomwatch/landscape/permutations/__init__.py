"""Nets that compute the same: hidden units of two nets brought into one order.

May import `geomwatch.vectors` and, inside functions, SciPy. A newcomer would change something
here to permute units of another kind of layer: `units` knows which there are.
"""
