"""From the state of an optimizer to the limit of its coming step.

May import isolation and vectors. A newcomer would change something here to add an optimizer:
one function in `optimizers`, from a parameter's state to a `Recursion`, and a row in its table.
"""
