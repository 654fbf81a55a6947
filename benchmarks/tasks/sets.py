"""Which tasks a level may be chosen on, and which are kept for reporting: three sets by task."""

from __future__ import annotations

from typing import Literal

Part = Literal["development", "validation", "test"]

# Levels, thresholds and settings may be chosen on development, as often as one likes. Validation is
# read at the end of an attempt. The test set is read once, for the tables, and nothing is moved
# after that; whoever has looked at one of its runs has to leave the task out.
SETS: dict[Part, tuple[str, ...]] = {
    "development": (
        "mlp-digits",
        "conv-mnist",
        "encoder-digits",
        "lstm-kjv",
        "gd-digits",
        "regression-table",
        "vae-digits",
        "contrastive-digits",
        "reinforce-grid",
        "deepsets-max",
        "pinn-poisson",
    ),
    "validation": (
        "mlp-mnist",
        "resnet-mnist",
        "gpt-kjv",
        "minilm-verses",
        "gd-mnist",
        "vit-digits",
        "lstm-topics",
        "graphs-triangles",
        "moe-digits",
    ),
    "test": (
        "regression-diabetes",
        "conv-digits",
        "gru-topics",
        "seq2seq-reverse",
        "diffusion-digits",
        "gan-ring",
        "qlearning-chain",
        "multitask-digits",
    ),
}
PART: dict[str, Part] = {name: part for part, names in SETS.items() for name in names}
