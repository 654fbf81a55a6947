"""What `geomwatch.integrations.lightning` is made of.

May import what `geomwatch.integrations` may, and Lightning inside functions. A newcomer would
change something here when Lightning changes its loop: integrations/lightning/README.md draws it.
"""
