"""Models of transformers: the hook path against a plain backward pass per example and against ``vmap(grad)``."""

import pytest
import torch

import source_proj as sp
from source_proj._errors import GradientError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.batches import map_tensors, take
from source_proj.sketch import Sketch

transformers = pytest.importorskip("transformers", reason="needs transformers: install source-proj[hf]")

VOCABULARY, LENGTH, SIZE = 40, 6, 4
NARROW = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3}
GPT2 = {**NARROW, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
WIDTHS = {**NARROW, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "max_position_embeddings": 16}
BERT = {**WIDTHS, "num_attention_heads": 2}
GROUPED = {**WIDTHS, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTRAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "bert classifier": ("BertForSequenceClassification", "BertConfig", BERT),
    "gpt2 classifier": ("GPT2ForSequenceClassification", "GPT2Config", GPT2),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
}
BY_VALUES = {"mixtral"}  # control flow, which vmap does not stand


def make(name, attention="eager"):
    torch.manual_seed(0)
    model, config, options = MODELS[name]
    made = getattr(transformers, config)(**options, attn_implementation=attention)
    network = getattr(transformers, model)(made).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # at their own scale attention is all but uniform
    return network


def make_batch(name, padded, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    labels = tokens.clone()
    if padded:
        tokens[1, 4:], mask[1, 4:], labels[1, 4:] = 0, 0, -100
        labels[2, :3] = -100  # a prompt
    batch = {"input_ids": tokens, "labels": labels}
    if "classifier" in name:
        batch["labels"] = torch.arange(size) % 3
    return {**batch, "attention_mask": mask} if padded else batch


def task_of(name):
    return sp.Classification() if "classifier" in name else sp.CausalLM()


def rows(model, task, batch, method="auto"):
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(dim=space.size, kind="identity"), method)
    return engine.sketch(task.output, batch)[1], engine


def plain_rows(model, task, batch):
    """The naive twin: one backward pass per example."""
    found = []
    for b in range(SIZE):
        model.zero_grad()
        task.output(model, take(batch, [b])).sum().backward()
        found.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        )
    model.zero_grad()
    return torch.stack(found)


def assert_equal(got, expected):
    """Law 1: relative 1e-5."""
    assert ((got - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_one_backward_pass_per_example(name, attention, padded):
    model, batch, task = make(name, attention), make_batch(name, padded), task_of(name)
    got, engine = rows(model, task, batch)
    assert engine.method == "hooks", engine.reason
    assert_equal(got, plain_rows(model, task, batch))


@pytest.mark.parametrize("name", sorted(MODELS.keys() - BY_VALUES))
def test_hooks_equal_vmap(name):
    # vmap stands no control flow on values: BERT looks into a mask, decoders into positions if they have no mask.
    model, batch, task = make(name), make_batch(name, padded="bert" not in name), task_of(name)
    expected, engine = rows(model, task, batch, "general")
    assert "vmap failed" not in engine.reason
    assert_equal(rows(model, task, batch, "hooks")[0], expected)


def test_experts_are_left_out_by_no_path_silently():
    model, task = make("mixtral"), sp.CausalLM()
    model.model.layers[0].mlp.experts._is_expert_parallel = True  # as where some of them are elsewhere
    with pytest.raises(GradientError, match=r"mlp\.experts.*: no rule covers MixtralExperts"):
        rows(model, task, make_batch("mixtral", padded=True), "hooks")
    got, engine = rows(model, task, make_batch("mixtral", padded=True))
    space = ParameterSpace.from_model(model)
    for p, name in enumerate(space.names):
        start = space.offsets[name]
        end = start + torch.Size(space.shapes[p]).numel()
        assert got[:, start:end].any(), name
    assert "MixtralExperts" in engine.reason


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_and_prompts_receive_nothing(name):
    """Padding behind a sequence changes nothing; a masked prompt leaves the tokens after it."""
    model, task = make(name), sp.CausalLM(reduction="sum")
    batch = make_batch(name, padded=True)
    shorter = map_tensors(take(batch, [1]), lambda t: t[:, :4])
    assert_equal(rows(model, task, batch)[0][1:2], rows(model, task, shorter)[0])
    whole, _ = rows(model, task, {**batch, "labels": batch["input_ids"].where(batch["attention_mask"] > 0, -100)})
    prompt = {**batch, "labels": batch["labels"].clone()}
    prompt["labels"][2] = batch["input_ids"][2]
    prompt["labels"][2, 3:] = -100
    parts = rows(model, task, batch)[0][2] + rows(model, task, prompt)[0][2]
    assert_equal(parts[None], whole[2:3])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_is_the_sum_of_its_sequences(attention):
    model, task = make("llama", attention), sp.CausalLM(reduction="sum")
    first, second = (make_batch("llama", padded=False, size=2)["input_ids"][:, a:b] for a, b in ((0, 2), (2, 6)))
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]] * 2),
        "labels": torch.cat([first, torch.full((2, 1), -100), second[:, 1:]], 1),
    }
    alone = [rows(model, task, {"input_ids": part, "labels": part})[0] for part in (first, second)]
    assert_equal(rows(model, task, packed)[0], alone[0] + alone[1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert classifier"])
def test_gradient_checkpointing_changes_nothing(name):
    model, batch, task = make(name), make_batch(name, padded=True), task_of(name)
    expected = rows(model, task, batch)[0]
    enable = "activation_checkpointing_enable"  # its name from transformers 5 on
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    got, engine = rows(model.train(), task, batch)
    assert engine.method == "hooks"
    assert torch.equal(got, expected)
