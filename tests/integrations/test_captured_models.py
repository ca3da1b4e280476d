"""Models of transformers are followed by autograd's graph alone: capture runs no pass of its own beside theirs."""

import pytest
import torch

import source_proj as sp

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {**SMALL, "vocab_size": 64, "max_position_embeddings": 40}
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "LlamaForCausalLM": ("LlamaConfig", WORDS),
    "OPTForCausalLM": ("OPTConfig", {**WORDS, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "BertForSequenceClassification": ("BertConfig", WORDS),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", WORDS),
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "image_size": 16, "patch_size": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_pass_is_made_beside_the_trained_ones(tmp_path, name):
    torch.manual_seed(0)
    config, options = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    task = sp.CausalLM() if name.endswith("CausalLM") or "LMHead" in name else sp.Classification()
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", capture=sp.Sketch(64), task=task, examples=12)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for step in range(4):
        tokens, mask = torch.randint(1, 64, (4, 12)), torch.ones(4, 12, dtype=torch.long)
        mask[1, 9:] = 0
        labels = tokens if isinstance(task, sp.CausalLM) else torch.randint(2, (4,))
        words = {"input_ids": tokens * mask, "attention_mask": mask}
        batch = {"pixel_values": torch.randn(4, 3, 16, 16)} if "ViT" in name else words
        batch["labels"] = labels
        optimizer.zero_grad()
        forwards.clear()
        model(**batch).loss.backward()
        optimizer.step()
        recorder.step(ids=[(4 * step + place) % 12 for place in range(4)], batch=batch)
        # Some passes are compared with those of their halves, the 4th is not; and drawn labels go through its graph.
        assert (len(forwards) == 1) is (step == 3)
    assert recorder.bank().finalized
