"""What `geomwatch.integrations.accelerate` is made of.

May import what `geomwatch.integrations` may, and accelerate inside functions. A newcomer would
change something here when accelerate changes its loop: integrations/accelerate/README.md draws it.
"""
