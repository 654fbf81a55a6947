"""What `geomwatch.integrations.transformers` is made of.

May import what `geomwatch.integrations` may, and transformers inside functions. A newcomer would
change something here when the Trainer changes its loop: integrations/transformers/README.md draws
it.
"""
