"""A zoo of the models that people train: one more entry is one more test of each kind.

An entry is a `Case` in one of the zoo_*.py files. test_zoo.py compares its Hessian-vector products
with those of its twin in float64; test_zoo_training.py trains it with a probe at every step and
without.
"""

import zoo_custom
import zoo_held
import zoo_norms
import zoo_torch
import zoo_transformers
from zoo_case import Case

ZOO: dict[str, Case] = {
    **zoo_torch.CASES,
    **zoo_norms.CASES,
    **zoo_custom.CASES,
    **zoo_held.CASES,
    **zoo_transformers.CASES,
}
