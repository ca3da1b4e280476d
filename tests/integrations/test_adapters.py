"""Checkpoints of adapters alone, over a base model's own weights; and states in several files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_transformers_gradients import assert_equal, make, make_batch, plain_rows, rows
from torch import nn
from torch.utils.data import TensorDataset
from trainer_runs import EXAMPLES, classifier, train, transformers

import source_proj as sp
from source_proj.integrations import trainable_parameters
from source_proj.trajectory.moved import moved_by_stages
from source_proj.trajectory.trained import trained_parameters

PEFT_LAGS = "ignore:.*is deprecated and will be removed:FutureWarning"  # behind names of transformers


class LoRALinear(nn.Module):
    """y = W x + B A x, W frozen."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def lora_model():
    torch.manual_seed(0)
    return nn.Sequential(LoRALinear(nn.Linear(5, 6)), nn.Tanh(), LoRALinear(nn.Linear(6, 3)))


def adapter_file(model, directory):
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.clone() for name, value in model.state_dict().items() if "lora" in name}
    save_file(state, directory / "adapter_model.safetensors")
    return directory / "adapter_model.safetensors"


def test_an_adapter_lies_over_the_models_own_weights(tmp_path):
    model, trained = lora_model(), lora_model()
    for parameter in trained.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    checkpoint = sp.Checkpoint(adapter_file(trained, tmp_path), step=1)
    before, x = model.state_dict(), torch.randn(4, 5)
    with checkpoint.applied_to(model), torch.no_grad():
        torch.testing.assert_close(model(x), trained(x), rtol=0, atol=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(sp.MismatchError, match=r"has 0.lora_A.weight, which the model Linear has as \[\]"):
        checkpoint.applied_to(nn.Linear(5, 3)).__enter__()


def test_only_the_adapter_is_attributed_and_its_bank_equals_that_of_whole_checkpoints(tmp_path):
    model, data = lora_model(), TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)
    names = trainable_parameters(model)
    assert names == ["0.lora_A.weight", "0.lora_B.weight", "2.lora_A.weight", "2.lora_B.weight"]
    scores = []
    for state in (adapter_file(model, tmp_path), model.state_dict()):
        run = sp.Trajectory([sp.Checkpoint(state, step=10, lr=0.1)])
        path = tmp_path / f"bank_{len(scores)}"
        bank = sp.build(model, sp.Classification(), run, data, path, sketch=sp.Sketch(dim=32), parameters=names)
        assert bank.space_spec["names"] == names
        reopened = sp.open(path)
        scores.append(sp.Source(reopened, model=lora_model()).score(data).to_numpy())
    assert (scores[0] == scores[1]).all()


def test_an_adapters_bank_is_of_one_base_model(tmp_path):
    """No checkpoint holds the base's weights: rows and queries over others would be of another model, in silence."""
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)

    def build(model, path="bank"):
        run = sp.Trajectory([sp.Checkpoint(tmp_path / "adapter_model.safetensors", step=10, lr=0.1)])
        return sp.build(model, sp.Classification(), run, data, tmp_path / path, sketch=sp.Sketch(16), progress=False)

    model, other = lora_model(), lora_model()
    adapter_file(model, tmp_path)
    bank = build(model)
    nn.init.normal_(other[2].base.weight)
    refused = "bank hold an adapter alone, and the model has another base: its 2.base.weight is not what"
    for ask in (
        lambda: sp.Source(bank, model=other, progress=False).score(data),
        lambda: sp.RepSim(bank, train_set=data, model=other, progress=False).score(data),
        lambda: bank.append(
            other, sp.Classification(), TensorDataset(torch.randn(3, 5), torch.arange(3)), progress=False
        ),
        lambda: build(other),
    ):
        with pytest.raises(sp.MismatchError, match=refused):
            ask()
    assert bank.verify().ok
    assert sp.open(tmp_path / "bank").n_rows == 8
    near = lora_model().bfloat16().float()  # as where the base is loaded in half precision
    for fits in (near, lora_model()):
        assert sp.Source(bank, model=fits, progress=False).score(data).shape == (8, 8)
    assert not build_whole(model, data, tmp_path / "whole").notes.base


def build_whole(model, data, path):
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    names = trainable_parameters(model)
    return sp.build(model, sp.Classification(), run, data, path, parameters=names, progress=False)


@pytest.mark.parametrize("adapter_first", [False, True])
def test_files_of_adapters_say_nothing_of_what_they_leave_out(tmp_path, adapter_first):
    """Beside whole checkpoints of another stage, the model's own weights neither move where it is frozen nor stand
    still where it is trained.
    """
    model = lora_model()
    adapter = set(trainable_parameters(model))

    def stage(name, adapters):
        points = []
        for step in (1, 2):
            for own, parameter in model.named_parameters():
                if own in adapter or not adapters:
                    nn.init.normal_(parameter)
            state = adapter_file(model, tmp_path / f"{name}-{step}") if adapters else model.state_dict()
            points.append(sp.Checkpoint(state, step=step, lr=0.1))
        return sp.Stage(name, points, sp.SGD())

    stages = [stage("first", adapter_first), stage("second", not adapter_first)]
    moved, all_names = moved_by_stages(stages, model), {name for name, _ in model.named_parameters()}
    assert moved == ([adapter, all_names] if adapter_first else [all_names, adapter])
    assert trained_parameters(sp.Trajectory.from_stages(stages), model)[0] == [n for n, _ in model.named_parameters()]


def test_frozen_models_have_nothing_to_attribute():
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainable_parameters(nn.Linear(2, 2).requires_grad_(False))


def with_peft(model, targets):
    peft = pytest.importorskip("peft", reason="needs peft: install source-proj[peft]", exc_type=ImportError)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT's own B is zero, which hides A
            parameter.data.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", PEFT_LAGS)
@pytest.mark.parametrize(("name", "targets"), [("gpt2", ["c_attn"]), ("llama", ["q_proj", "v_proj", "down_proj"])])
def test_hooks_see_through_peft(name, targets):
    model = with_peft(make(name, "sdpa"), targets).eval()
    batch, names = make_batch(name, padded=True), trainable_parameters(model)
    assert all("lora" in one for one in names)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for task in (sp.CausalLM(), sp.CausalLM(chunk=2)):
        got, engine = rows(model, task, batch)
        assert engine.method == "hooks", engine.reason
        assert_equal(got, plain_rows(model, sp.CausalLM(), batch))


@pytest.mark.filterwarnings(PEFT_LAGS)
def test_a_trainers_run_over_peft(tmp_path):
    model = with_peft(classifier(), ["query", "value"])
    trainer = train(tmp_path / "run", model=model, weight_decay=0.1)
    assert not (tmp_path / "run/checkpoint-4/model.safetensors").exists()
    fresh = with_peft(classifier(), ["query", "value"])
    run = sp.Trajectory.from_hf_trainer(tmp_path / "run", model=fresh, max_grad_norm=0)
    with run.final.applied_to(fresh):
        state = fresh.state_dict()
        assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())
    assert {n for g in run.stages[0].checkpoints[0].optimizer_state["param_groups"] for n in g["param_names"]} == set(
        trainable_parameters(fresh)
    )
    data = [{k: torch.as_tensor(v) for k, v in one.items()} for one in trainer.train_dataset]
    bank = sp.build(
        fresh,
        sp.Classification(),
        run,
        data,
        tmp_path / "bank",
        sketch=sp.Sketch(dim=64),
        parameters=trainable_parameters(fresh),
        progress=False,
    )
    assert sp.Source(bank, model=fresh, progress=False).score(data[:3]).shape == (3, EXAMPLES)


def methods():
    """Each of PEFT's ways to save an adapter: a base model, and the adapter over it."""
    peft = pytest.importorskip("peft", reason="needs peft: install source-proj[peft]", exc_type=ImportError)
    words = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=20, max_position_embeddings=12, **words)
    lora = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    prompt, bank = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, {"num_vectors": 4, "vector_length": 4}
    return {
        "a head": (classifier, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")),
        "a head of two layers": (
            lambda: transformers.RobertaForSequenceClassification(config),
            peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        ),
        "modules_to_save": (lambda: make("llama"), peft.LoraConfig(**lora, modules_to_save=["lm_head", "norm"])),
        "a prompt": (lambda: make("llama"), peft.PromptTuningConfig(**prompt)),
        "a prefix": (lambda: make("llama"), peft.PrefixTuningConfig(**prompt)),
        "a shared bank of vectors": (lambda: make("llama, tied"), peft.VBLoRAConfig(**lora, **bank)),
    }


WAYS = ["a head", "a head of two layers", "modules_to_save", "a prompt", "a prefix", "a shared bank of vectors"]


@pytest.mark.filterwarnings(PEFT_LAGS)
@pytest.mark.parametrize("way", WAYS)
def test_an_adapters_file_is_read_as_peft_writes_it(tmp_path, way):
    base, config = methods()[way]
    trained, fresh = (with_config(base(), config) for _ in range(2))
    fresh.load_state_dict(trained.state_dict())
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    trained.save_pretrained(tmp_path)
    checkpoint = sp.Checkpoint(tmp_path / "adapter_model.safetensors", step=1)
    assert set(checkpoint.parameters_of(fresh)) == set(trainable_parameters(trained))
    with checkpoint.applied_to(fresh):
        state = fresh.state_dict()
        assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("way", ["dict", "file", "trainable"])
@pytest.mark.parametrize("whole", [None, ["head"]])
def test_an_adapters_state_needs_no_name(tmp_path, way, whole):
    """As ``get_peft_model_state_dict`` gives it, or the parameters that were trained, by their own names."""
    peft = pytest.importorskip("peft")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.body(x).tanh())

    def make():
        torch.manual_seed(0)
        return peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["body"], modules_to_save=whole, r=2))

    trained, x = make(), torch.randn(4, 5)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    state = peft.get_peft_model_state_dict(trained)
    if way == "trainable":
        state = {name: value for name, value in trained.named_parameters() if value.requires_grad}
    lacking = {name: value for place, (name, value) in enumerate(state.items()) if place}
    if way == "file":
        torch.save(state, tmp_path / "epoch_1.pt")
        state = tmp_path / "epoch_1.pt"
    model, checkpoint = make(), sp.Checkpoint(state, step=1)
    with checkpoint.applied_to(model), torch.no_grad():
        torch.testing.assert_close(model(x), trained(x), rtol=0, atol=0)
    assert set(checkpoint.parameters_of(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(sp.MismatchError, match="does not fit the model PeftModel: missing"):
        sp.Checkpoint(lacking, step=1).load_into(model)
    base = {name: value for name, value in trained.state_dict().items() if "lora_B" not in name}
    with pytest.raises(sp.MismatchError, match=r"missing: .*lora_B"):
        sp.Checkpoint(base, step=1).load_into(model)


@pytest.mark.filterwarnings(PEFT_LAGS)
def test_merged_adapters_are_refused_as_nothing_reaches_them():
    model, batch = with_peft(make("llama"), ["q_proj"]).eval(), make_batch("llama", padded=True)
    expected = rows(model, sp.CausalLM(), batch)[0]
    model.merge_adapter()
    with pytest.raises(sp.GradientError, match=r"q_proj' has its adapters \['default'\] merged .*unmerge_adapter\(\)"):
        rows(model, sp.CausalLM(), batch)
    model.unmerge_adapter()
    torch.testing.assert_close(rows(model, sp.CausalLM(), batch)[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings(PEFT_LAGS, "ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_frozen_embedding_in_an_adapters_file_was_not_trained(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: install source-proj[peft]", exc_type=ImportError)
    model = with_config(make("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(tmp_path)
    run = sp.Trajectory([sp.Checkpoint(tmp_path / "adapter_model.safetensors", step=1, lr=0.1)])
    assert any("embed_tokens.base_layer" in name for name in run.final.parameters_of(model))
    assert trained_parameters(run, model)[0] == trainable_parameters(model)


def with_config(model, config):
    import peft

    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings(PEFT_LAGS)
def test_a_prompts_encoder_is_in_no_file(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: install source-proj[peft]", exc_type=ImportError)
    config = peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=4, task_type="CAUSAL_LM")
    model = with_config(make("llama"), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(sp.MismatchError, match="not their weights: record the run by a RecorderCallback"):
        sp.Checkpoint(tmp_path / "adapter_model.safetensors", step=1).parameters_of(model)


@pytest.mark.filterwarnings(PEFT_LAGS)
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_a_tuned_prompt_is_named_with_the_loss_that_peft_trains_it_by(kind):
    peft = pytest.importorskip("peft", reason="needs peft: install source-proj[peft]", exc_type=ImportError)
    model = with_config(make("llama"), getattr(peft, kind)(num_virtual_tokens=2, task_type="CAUSAL_LM")).eval()
    batch = make_batch("llama", padded=False)
    with pytest.raises(ValueError, match=r"write a Task of logits\[:, 1:-1\] and all labels"):
        sp.CausalLM().output(model, batch)
    logits = model(input_ids=batch["input_ids"]).logits[:, 1:-1]
    torch.testing.assert_close(nn.functional.cross_entropy(logits.mT, batch["labels"]), model(**batch).loss)


def sharded(directory):
    model = classifier()
    model.save_pretrained(directory, max_shard_size="2KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return model, directory / "model.safetensors.index.json"


def test_a_state_in_several_files_is_one_state(tmp_path):
    model, index = sharded(tmp_path)
    checkpoint = sp.Checkpoint(index, step=1)
    state = checkpoint.load()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    before, part = checkpoint.hash(), sorted(tmp_path.glob("*.safetensors"))[0]
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert sp.Checkpoint(index, step=1).hash() != before
    part.unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sp.Checkpoint(index, step=1).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {"weights": {}}, "is no index of weights"),
        (lambda content: {"weight_map": {**content["weight_map"], "more": "../other.safetensors"}}, "names '../other"),
        (
            lambda content: {"weight_map": {**content["weight_map"], "more": min(content["weight_map"].values())}},
            "do not hold the same entries: more",
        ),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, message):
    _, index = sharded(tmp_path)
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises(ValueError, match=message):
        sp.Checkpoint(index, step=1).load()


def test_a_trainers_sharded_checkpoints_are_read(tmp_path):
    train(tmp_path / "run")
    for step in range(4, 21, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model = transformers.BertForSequenceClassification.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="2KB")
    run = sp.Trajectory.from_hf_trainer(tmp_path / "run", max_grad_norm=0)
    assert run.final.path.name == "model.safetensors.index.json"
    with run.final.applied_to(classifier()) as model:
        assert torch.equal(model.classifier.weight, run.final.load()["classifier.weight"])


def test_weights_that_are_saved_under_other_names_are_brought_back(tmp_path):
    """transformers has experts as one parameter in memory, and writes one entry each."""
    model = make("mixtral")
    data = [{"input_ids": row, "labels": row} for row in make_batch("mixtral", padded=False)["input_ids"].tolist()]
    options = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), disable_tqdm=True, **options)
    transformers.Trainer(model, arguments, train_dataset=data).train()
    for given in (None, make("mixtral")):
        run = sp.Trajectory.from_hf_trainer(tmp_path, model=given, max_grad_norm=0)
        with run.final.applied_to(make("mixtral")) as found:
            assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())
