"""Real architectures, tiny and random, against one autograd pass per example."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.batches import take
from source_proj.sketch import Sketch

SIZE, LENGTH, VOCABULARY = 3, 6, 20
Function = Callable[[nn.Module, Any], Tensor]
WIDTHS = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {**WIDTHS, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
TRANSFORMERS = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**WIDTHS, "num_key_value_heads": 1}),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "BertForSequenceClassification": ("BertConfig", {**WIDTHS, "num_labels": 3}),
    "T5ForConditionalGeneration": (
        "T5Config", {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY,
         "decoder_start_token_id": 0}
    ),
    "ViTForImageClassification": (
        "ViTConfig", {**{k: WIDTHS[k] for k in list(WIDTHS)[:4]}, "image_size": 8, "patch_size": 4, "num_labels": 3}
    ),
}  # fmt: skip


def plain_rows(model: nn.Module, space: ParameterSpace, function: Function, batch: Any) -> Tensor:
    """The naive twin: one backward pass per example."""
    parameters = space.parameters(model)
    rows = []
    for b in range(SIZE):
        total = function(model, take(batch, [b], SIZE))[0]
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.values(), gradients, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
    return torch.stack(rows)


def assert_rows_right(model: nn.Module, function: Function, batch: Any, patterns: list[str] | None = None) -> str:
    """Law 1; returns the path."""
    model.eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    space = ParameterSpace.from_model(model, patterns)
    engine = gradient_engine(model, space, Sketch(kind="identity", dim=space.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a batching rule
        rows = engine.sketch(function, batch, SIZE)[1]
    expected = plain_rows(model, space, function, batch)
    error = (rows - expected).norm(dim=1)
    assert (error <= 1e-5 * expected.norm(dim=1)).all(), error / expected.norm(dim=1)
    return engine.method


def sequences(name: str) -> dict[str, Tensor]:
    """Padded sequences, or images."""
    torch.manual_seed(1)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(SIZE, 3, 8, 8), "labels": torch.arange(SIZE)}
    ids = torch.randint(3, VOCABULARY, (SIZE, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 3, 4])[:, None]
    labels = torch.arange(SIZE) if "Classification" in name else ids.where(mask, -100)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def of_decoder(model: nn.Module, batch: Any) -> Tensor:
    """Likelihood of T5's labels."""
    inputs = {**batch, "labels": batch["labels"].clamp(min=0)}
    logp = model(**inputs).logits.log_softmax(-1)
    return (logp.gather(2, inputs["labels"][..., None])[..., 0] * (batch["labels"] >= 0)).sum(1)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: install source-proj[hf]")
    config, options = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    if name.startswith("T5"):
        assert_rows_right(model, of_decoder, sequences(name))
        return
    task = sp.Classification() if "Classification" in name else sp.CausalLM()
    assert assert_rows_right(model, task.output, sequences(name)) == "hooks"
    if "Moe" in name or "Mixtral" in name:  # the rest must be right beside them
        assert_rows_right(model, task.output, sequences(name), ["*self_attn*", "*norm*", "*embed*", "lm_head*"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_recurrent(kind: type[nn.Module], options: dict[str, Any]) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(VOCABULARY, 4), kind(4, 4, batch_first=True, **options)
            self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x))[0][:, -1])

    torch.manual_seed(0)
    batch = (torch.randint(0, VOCABULARY, (SIZE, LENGTH)), torch.arange(SIZE))
    assert assert_rows_right(Network(), sp.Classification().output, batch) == "hooks"
    assert_rows_right(Network(), sp.Classification().output, batch, ["embed.*", "head.*"])


def importable(name: str) -> Any:
    if name in sys.modules and sys.modules[name] is None:
        pytest.skip(f"{name} is of another build than torch")
    return pytest.importorskip(name, reason=f"needs {name}")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "vit_b_16", "swin_t"])
def test_torchvision(name: str) -> None:
    models = importable("torchvision").models
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=3, **({"image_size": 32} if name.startswith("vit") else {}))
    batch = (torch.randn(SIZE, 3, 32, 32), torch.arange(SIZE))
    assert_rows_right(model, sp.Classification().output, batch, ["*.bias"])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_timm(name: str) -> None:
    timm = importable("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    size = 224 if "224" in name else 64
    batch = (torch.randn(SIZE, 3, size, size), torch.arange(SIZE))
    assert_rows_right(model, sp.Classification().output, batch, ["*.bias"])
