"""A loss at a point: its value, its gradient and products with its Hessian, the way that is right.

May import isolation, vectors, parallel and errors. A newcomer would change something here to
compute products in another way, or to feed the loss another kind of batch: `objective` is what
everybody else sees of it, `validation` chooses and checks a way, `replay` evaluates the loss again.
"""
