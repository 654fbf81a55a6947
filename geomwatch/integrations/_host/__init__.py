"""What all hosts share: seeing the batch and the loss, evaluating it again, telling what was found.

`options` is what a user asks for, `tap` sees a host's methods being called, `loss` evaluates what
they computed again, `watch` feeds a monitor with it, `check` compares it with training, and
`actuators` are what a host lets controllers turn.

May import what `geomwatch.integrations` may. A newcomer would change something here when
something true of every host is missing; what is true of one belongs into its own folder.
"""
