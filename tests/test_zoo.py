"""Real architectures from transformers, with their default attention: HVPs right, no trace left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geomwatch
from geomwatch.objective import Objective

transformers = pytest.importorskip("transformers")

TEXT = torch.randint(0, 90, (4, 16), generator=torch.Generator().manual_seed(0))
LANGUAGE = {"input_ids": TEXT, "labels": TEXT.clone()}
CLASSES = torch.tensor([0, 1, 0, 1])
IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GQA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=99,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**GQA, num_local_experts=4))


def vit() -> nn.Module:
    sizes = {**SMALL, "image_size": 16, "patch_size": 4, "num_channels": 1}
    sizes.pop("vocab_size")
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


VISION = {"pixel_values": IMAGES, "labels": CLASSES}
ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "gpt2": (gpt2, LANGUAGE),
    "llama": (llama, LANGUAGE),
    "bert": (bert, {"input_ids": TEXT, "labels": CLASSES}),
    "t5": (t5, LANGUAGE),
    "mixtral": (mixtral, LANGUAGE),
    "vit": (vit, VISION),
    "resnet": (resnet, VISION),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, batch = ZOO[name]
    return make().train(), batch


@pytest.mark.parametrize("name", [n for n in ZOO if n != "mixtral"])  # its experts refuse float64
def test_an_hvp_in_float32_is_that_of_float64(name):
    model, batch = build(name)
    products = []
    for dtype in (torch.float32, torch.float64):
        with Objective(model, geomwatch.model_loss, [batch], mode="eval", dtype=dtype) as objective:
            v = objective.layout.normal(torch.Generator().manual_seed(1))
            products.append(objective.hvp(v))
            assert objective.how["backend"] == "double_backward"
    assert (products[0] - products[1]).norm() < 1e-5 * products[1].norm()


@pytest.mark.parametrize("name", ZOO)
def test_the_operator_is_symmetric(name):
    model, batch = build(name)
    with Objective(model, geomwatch.model_loss, [batch]) as objective:
        rng = torch.Generator().manual_seed(2)
        u, v = objective.layout.normal(rng), objective.layout.normal(rng)
        forth, back = float(u @ objective.hvp(v)), float(v @ objective.hvp(u))
        size = float(objective.hvp(u).norm() * v.norm())
    assert abs(forth - back) < 1e-5 * size


@pytest.mark.parametrize("name", ZOO)
def test_training_is_bit_identical_with_probes_at_every_step(name):
    model, batch = build(name)
    watched = copy.deepcopy(model)
    states = []
    for net, watch in ((model, False), (watched, True)):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        monitor: Any = None
        if watch:
            monitor = geomwatch.Monitor(
                net, geomwatch.model_loss, optimizer, every=1, schedule="fixed"
            )
        for _ in range(3):
            optimizer.zero_grad()
            geomwatch.model_loss(net, batch).backward()
            if monitor is not None:
                record = monitor.step(batch)
                assert record["lambda_max"].value is not None
                assert record["stability_margin"].value > 0
            optimizer.step()
        states.append([*net.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
