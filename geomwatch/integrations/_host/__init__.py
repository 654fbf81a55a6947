"""What all hosts share: seeing the batch and the loss, evaluating it again, telling what was found.

May import what `geomwatch.integrations` may. A newcomer would change something here when
something true of every host is missing; what is true of one belongs into its own folder.
"""
