"""Architectures from transformers, tiny, with the attention they have by default; and from peft."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_case import Case

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY = 50
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT_SIZES = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
GROUPED = {**TEXT_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}


def gpt2() -> nn.Module:
    """Its output layer is tied to its embedding; dropout, but not of the fused attention."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
    )
    config.loss_type = "ForCausalLM"  # or it warns that it has none
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**GROUPED, bos_token_id=1, eos_token_id=2, **options)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT_SIZES))


def bert_on_a_frozen_encoder() -> nn.Module:
    model = bert()
    model.bert.encoder.requires_grad_(False)
    model.bert.embeddings.requires_grad_(False)
    return model


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **GROUPED, num_local_experts=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.MixtralForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_channels=1)
    return transformers.ViTForImageClassification(config)


def resnet18() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    )
    return transformers.ResNetForImageClassification(config)


def resnet18_on_a_frozen_backbone() -> nn.Module:
    model = resnet18()
    for stage in (model.resnet.embedder, *model.resnet.encoder.stages[:3]):
        stage.requires_grad_(False)
    return model


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """Of gradient checkpointing: transformers warns that 6 will have new ones; peft uses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def lora(make: Callable[[], nn.Module], targets: list[str], **options: Any) -> nn.Module:
    config = peft.LoraConfig(
        r=4, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM", **options
    )
    with old_names():
        return peft.get_peft_model(make(), config)


def checkpointed(make: Callable[[], nn.Module], use_reentrant: bool) -> nn.Module:
    model = make()
    with old_names():
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def lora_checkpointed() -> nn.Module:
    """As memory is saved in fine-tuning: nothing before the first checkpoint is trained."""
    return lora_on_gpt2(functools.partial(checkpointed, gpt2, use_reentrant=True))


def lora_on_gpt2(make: Callable[[], nn.Module] = gpt2) -> nn.Module:
    return lora(make, ["c_attn"], fan_in_fan_out=True, init_lora_weights=False)


def text() -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (4, 8))
    return {"input_ids": tokens, "labels": tokens.clone()}


def padded_text() -> dict[str, Tensor]:
    """Sentences of different lengths, as a tokenizer pads them."""
    tokens = torch.randint(3, VOCABULARY, (4, 8))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = mask[2, 6:] = 0
    tokens[mask == 0] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def sentences() -> dict[str, Tensor]:
    return {**padded_text(), "labels": torch.tensor([0, 1, 0, 1])}


def images(size: int, count: int) -> dict[str, Tensor]:
    pixels = torch.randn(count, 1, size, size)
    return {"pixel_values": pixels, "labels": torch.arange(count) % 2}


def eager(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model with the attention and the experts that are written out in Python."""

    def built() -> nn.Module:
        model = make()
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        return model

    return built


def case(make: Callable[[], nn.Module], batch: Callable[[], Any], **options: Any) -> Case:
    return Case(
        make, batch, **{"twin": eager(make), "mixed": True, "validation_error": 1e-3, **options}
    )


FUSED = "flash_attention_for_cpu_backward is not implemented"
REENTRANT = "When use_reentrant=True, .* is incompatible"
CASES = {
    "GPT-2": case(gpt2, text, obstacle=FUSED),
    "Llama": case(llama, text, obstacle=FUSED),
    "Llama, padded": case(functools.partial(llama, pad_token_id=0), padded_text, obstacle=FUSED),
    "BERT": case(bert, sentences),
    "BERT on a frozen encoder": case(bert_on_a_frozen_encoder, sentences),
    "T5": case(t5, text),
    "Mixtral": case(mixtral, text, twin=eager(mixtral), wide=eager(mixtral), obstacle=FUSED),
    "ViT": case(vit, functools.partial(images, 16, 4), obstacle=FUSED),
    "ResNet-18": case(resnet18, functools.partial(images, 32, 8)),
    "ResNet-18 on a frozen backbone": case(
        resnet18_on_a_frozen_backbone, functools.partial(images, 32, 8)
    ),
    "LoRA on Llama": case(functools.partial(lora, llama, ["q_proj", "v_proj"]), text),
    "LoRA on GPT-2": case(lora_on_gpt2, text, obstacle=FUSED),
    "LoRA in reentrant checkpoints": case(lora_checkpointed, text, twin=eager(lora_on_gpt2)),
    "GPT-2 in checkpoints": case(
        functools.partial(checkpointed, gpt2, False), text, twin=eager(gpt2), obstacle=FUSED
    ),
    "GPT-2 in reentrant checkpoints": case(
        functools.partial(checkpointed, gpt2, True), text, twin=eager(gpt2), obstacle=REENTRANT
    ),
}
