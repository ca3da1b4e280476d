"""Models that one device does not hold: offloaded, quantised, checkpointed, spread; and those that are refused."""

from functools import partial

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.pipelining import ScheduleGPipe
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import source_proj as sp
from source_proj._errors import SourceProjError
from source_proj.gradients import private_copy

TASK = sp.CausalLM()


class Tied(nn.Module):
    """A small language model whose embeddings are its head."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.tokens, self.hidden, self.norm = nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 9)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.tokens(tokens)).tanh()))


def tokens(size: int, n: int = 13) -> torch.Tensor:
    return torch.randint(0, size, (n, 6), generator=torch.Generator().manual_seed(0))


def built(model, path, run, data, **options):
    sketch = sp.Sketch(dim=64)
    options = {"sketch": sketch, "batch_size": 4, "storage": "float32", "progress": False} | options
    return sp.build(model, TASK, run, data, path, **options)


def rows(bank):
    return torch.cat([block.rows for c in range(bank.stages[0].n_checkpoints) for block in bank.stages[0].iter_rows(c)])


def assert_same_rows(bank, other):
    expected = rows(other)
    assert expected.norm() > 0
    assert (rows(bank) - expected).norm() <= 1e-6 * expected.norm()


OFFLOADS = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "dispatched": lambda model, _: accelerate.dispatch_model(model, {"": "cpu"}, "cpu", force_hooks=True),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_accelerate_dispatches_or_offloads_has_the_rows_of_the_plain_model(tmp_path, offload):
    run = sp.Trajectory([sp.Checkpoint(Tied(seed).state_dict(), seed, lr=0.1) for seed in (1, 2)])
    data = TensorDataset(tokens(9), tokens(9))
    model = OFFLOADS[offload](Tied(), tmp_path / "files")
    chosen = {"parameters": ["hidden.*", "norm.*", "head.bias"]}
    bank = built(model, tmp_path / "bank", run, data, **chosen)
    whole = built(Tied(), tmp_path / "whole", run, data, **chosen)
    assert_same_rows(bank, whole)
    asked = [
        sp.Source(made, model=own, task=TASK).score(data).to_numpy() for made, own in ((bank, model), (whole, Tied()))
    ]
    assert (asked[0] == asked[1]).all()
    inputs = tokens(9)
    torch.testing.assert_close(model(inputs), Tied()(inputs))  # the model itself is as it was


def test_tied_weights_that_offloading_takes_apart_are_refused(tmp_path):
    run = sp.Trajectory([sp.Checkpoint(Tied().state_dict(), 1, lr=0.1)])
    model = OFFLOADS["cpu"](Tied(), None)
    with pytest.raises(SourceProjError, match=r"\['tokens.weight', 'head.weight'\] are tied"):
        built(model, tmp_path / "bank", run, TensorDataset(tokens(9), tokens(9)), parameters=["*"])
    with pytest.raises(ValueError, match="'meta' was given for a model that is offloaded"):
        private_copy(model, "meta")


def llama(quantised: bool) -> nn.Module:
    """Adapters on a frozen base, whose weights are int8, or what those stand for."""
    ao = pytest.importorskip("torchao.quantization", reason="quantised bases: pip install torchao")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    ao.quantize_(model.model, ao.Int8WeightOnlyConfig())
    if not quantised:
        for layer in model.model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.dequantize())
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_a_quantised_base_have_the_rows_of_its_float_weights(tmp_path, checkpointing):
    model = llama(quantised=True)
    model.save_pretrained(tmp_path / "adapter")
    run = sp.Trajectory([sp.Checkpoint(tmp_path / "adapter", 10, lr=0.1)])
    data = [{"input_ids": row, "labels": row} for row in tokens(32)]
    layer = model.base_model.model.model.layers[0]
    CALLS.clear()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
        layer.mlp.forward = partial(_counting, layer.mlp.forward, layer)
    bank = built(model, tmp_path / "bank", run, data)
    assert bank.parameter_choice.startswith("8 of ")
    whole = built(llama(quantised=False), tmp_path / "whole", run, data)
    assert_same_rows(bank, whole)
    for known, quantised in ((bank, False), (whole, True)):  # one base, however it is held
        known.notes.require_base(llama(quantised), run.checkpoints, "the bank")
    if checkpointing:  # more passes than the 8 with a backward pass, and nothing trains in them
        assert sum(graph for graph, _ in CALLS) > 8
        assert not any(trains for _, trains in CALLS)


CALLS: list[tuple[bool, bool]] = []  # of a layer and its copies: with a graph, and in training mode


def _counting(forward, layer, x):
    CALLS.append((torch.is_grad_enabled(), layer.training or layer.mlp.training))
    return forward(x)


class FullyShardedDataParallel(nn.Linear):
    """By its name FSDP1's wrapper."""


def with_attribute(name: str, value: object) -> nn.Module:
    model = nn.Linear(2, 3)
    setattr(model.weight, name, value)
    return model


def of_transformers() -> nn.Module:
    model = nn.Linear(2, 3)
    model._tp_size = 4
    return model


def pipelined() -> object:
    return ScheduleGPipe.__new__(ScheduleGPipe)  # it begins only where a process group is


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: FullyShardedDataParallel(2, 3), "FSDP1"),
        (lambda: with_attribute("ds_id", 1), "'weight' is partitioned by DeepSpeed's ZeRO stage 3"),
        (lambda: with_attribute("tensor_model_parallel", True), "'weight' is split by Megatron's tensor parallelism"),
        (of_transformers, "tp_plan, 4 processes"),
        (pipelined, "ScheduleGPipe is a pipeline schedule"),
    ],
    ids=["fsdp1", "deepspeed", "megatron", "transformers", "pipeline"],
)
def test_other_ways_to_split_a_model_are_refused_by_name(tmp_path, model, words):
    run = sp.Trajectory([sp.Checkpoint(nn.Linear(2, 3).state_dict(), 1, lr=0.1)])
    data = TensorDataset(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(SourceProjError, match=words) as refused:
        sp.build(model(), sp.Classification(), run, data, tmp_path / "bank")
    assert "fully_shard alone, or give it a device_map" in str(refused.value)
    assert not (tmp_path / "bank").exists()
