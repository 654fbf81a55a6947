"""The learning rate held to what the curvature along the coming step allows.

May import what `geomwatch.controllers` may. A newcomer would change something here to hold the
rate by another limit, from the first step on (`limit`) or once the loss has stopped falling
(`history`); `cap` puts them together.
"""
