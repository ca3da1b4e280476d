"""Models whose parameters meet the examples in ways of their own: biases by distance, scans, kernels that are made."""

import copy

import pytest
import torch
from example_rows import captured_rows, hooked_rows, plain_rows

transformers = pytest.importorskip("transformers")

N, LENGTH, LABELS = 4, 7, 3
SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = {**SMALL, "vocab_size": 30, "max_position_embeddings": 16, "num_labels": LABELS}
T5 = {"vocab_size": 30, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4,
    "num_labels": LABELS, "drop_path_rate": 0.0,
}  # fmt: skip
WAVES = {
    **SMALL, "num_hidden_layers": 1, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
    "num_labels": LABELS, "classifier_proj_size": 8, "apply_spec_augment": False, "activation_dropout": 0.0,
}  # fmt: skip
RELATIVE = {**WORDS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
MODELS = {
    "T5ForConditionalGeneration": ("T5Config", T5),
    "MPNetForSequenceClassification": ("MPNetConfig", WORDS),
    "DebertaForSequenceClassification": ("DebertaConfig", RELATIVE),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", RELATIVE),
    "Swinv2ForImageClassification": ("Swinv2Config", SWIN),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", WAVES),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 30, "hidden_size": 12, "state_size": 4, "num_hidden_layers": 2, "intermediate_size": 24},
    ),
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 1}


def model_of(name):
    config, options = MODELS.get(name, ("Qwen3MoeConfig", {**WORDS, **EXPERTS, "head_dim": 8}))
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    for module in model.modules():
        for dropout in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    with torch.no_grad():
        for p in model.parameters():  # some begin at zero, and a layer norm's gradient there is all in its epsilon
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch_of(name):
    if "Image" in name:
        return {"pixel_values": torch.randn(N, 3, 16, 16)}
    if "Wav" in name:
        return {"input_values": torch.randn(N, 120)}
    words = {"input_ids": torch.randint(1, 30, (N, LENGTH))}
    return {**words, "decoder_input_ids": torch.randint(1, 30, (N, LENGTH - 2))} if "T5" in name else words


def values_of(model, batch):
    """A number for each example, of which every logit has a share."""
    logits = model(**batch).logits.flatten(1)
    return logits.tanh() @ torch.linspace(-1, 2, logits.shape[1])


def rows_alone(model, batch):
    return plain_rows(model, values_of, ({k: t[place : place + 1] for k, t in batch.items()} for place in range(N)))


def assert_near(rows, expected):
    assert float((rows - expected).norm()) <= 3e-5 * float(expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_each_examples_gradient(tmp_path, name):
    torch.manual_seed(0)
    model, batch = model_of(name), batch_of(name)
    expected = rows_alone(copy.deepcopy(model).train(), batch)
    rows, reason = hooked_rows(copy.deepcopy(model).eval(), values_of, batch)
    assert_near(rows, expected)
    assert "followed by themselves" in reason
    assert_near(captured_rows(tmp_path, model.train(), values_of, batch, N), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "Qwen3MoeForCausalLM"])
def test_what_checkpointing_computes_once_more_is_followed_too(tmp_path, name, reentrant):
    torch.manual_seed(0)
    model, batch = model_of(name), batch_of(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{name} checkpoints nothing")
    expected = rows_alone(copy.deepcopy(model).train(), batch)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    rows, _ = hooked_rows(copy.deepcopy(model).train(), values_of, batch)
    assert_near(rows, expected)
    if not reentrant:
        assert_near(captured_rows(tmp_path, model.train(), values_of, batch, N), expected)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]  # the loop's own
        assert_near(torch.cat([g.flatten() for g in gradients]), expected.mean(0))
