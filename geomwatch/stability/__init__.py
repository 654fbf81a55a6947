"""From the state of an optimizer to the limit of its coming step.

May import errors, isolation and vectors. A newcomer would change something here to add an
optimizer: one function in `optimizers` or `beyond_torch`, from a parameter's state to a
`Recursion`, and a row in `algorithms`; users add theirs by `register_optimizer` (see `registry`).
"""
