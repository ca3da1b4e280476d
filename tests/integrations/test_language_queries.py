"""Single tokens as queries, and heads over some tokens at a time, with models of transformers."""

import numpy as np
import pytest
import torch
from test_transformers_gradients import LENGTH, assert_equal, make, make_batch, rows

import source_proj as sp
from source_proj.gradients.batches import take

HEADED = ["gpt2", "llama", "llama, tied", "mixtral"]


def sequences(padded=True, size=4):
    batch = make_batch("gpt2", padded, size)
    return [{key: value[b] for key, value in batch.items()} for b in range(size)]


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("name", HEADED)
def test_a_head_in_chunks_gives_the_same_gradients(name, chunk):
    model, batch = make(name, "sdpa"), make_batch(name, padded=True)
    expected, _ = rows(model, sp.CausalLM(), batch)
    got, engine = rows(model, sp.CausalLM(chunk=chunk), batch)
    assert engine.method == "hooks", engine.reason
    assert_equal(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(sp.CausalLM(chunk=chunk).output(model, batch), sp.CausalLM().output(model, batch))


def test_drawn_tokens_are_the_same_in_chunks():
    model, batch = make("gpt2", "sdpa"), make_batch("gpt2", padded=True)
    numbers = torch.rand(4, LENGTH - 1, generator=torch.Generator().manual_seed(0))
    values = [sp.CausalLM(chunk=chunk).sampled_output(model, batch, lambda n: numbers[:, :n]) for chunk in (None, 2)]
    torch.testing.assert_close(values[1], values[0])


def test_no_logits_of_more_than_a_chunk_are_made():
    model, batch, lengths = make("gpt2", "sdpa"), make_batch("gpt2", padded=True), []
    task = sp.CausalLM(chunk=2)
    task.output(model, batch)  # compares the head once, on one example
    model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    task.output(model, batch).sum().backward()
    assert max(lengths) == 2
    assert sum(lengths) == 2 * (LENGTH - 1)  # forward, and once more in the backward pass


def test_models_that_change_their_heads_logits_are_refused():
    model, batch = make("gpt2", "sdpa"), make_batch("gpt2", padded=True)
    plain = model.forward

    def capped(**inputs):
        output = plain(**inputs)
        return {"logits": output.logits.tanh()} if inputs.get("as_dict") else type(output)(logits=output.logits.tanh())

    model.forward = capped
    with pytest.raises(ValueError, match="scaled or capped"):
        sp.CausalLM(chunk=2).output(model, batch)
    with pytest.raises(TypeError, match="needs a model of transformers"):
        sp.CausalLM(chunk=2).output(torch.nn.Linear(2, 2), batch)
    with pytest.raises(ValueError, match="chunk counts tokens, from 1 on, got 0"):
        sp.CausalLM(chunk=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scores_of_tokens_add_up_to_those_of_their_sequence(tmp_path, reduction):
    model, task, data = make("gpt2", "sdpa"), sp.CausalLM(reduction=reduction), sequences(size=6)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    bank = sp.build(model, task, run, data, tmp_path / "bank", sketch=sp.Sketch(dim=256), storage="float32")
    source = sp.Source(bank, model=model, task=task)
    queries = sp.TokenQueries(data, task)
    scores = source.score(queries)
    assert scores.query_ids == queries.ids
    by_token = torch.as_tensor(scores.to_numpy())
    by_sequence = torch.as_tensor(source.score(data).to_numpy())
    assert [len(queries.of(i)) for i in range(6)] == [5, 3, 3, 5, 5, 5]  # padding and prompt don't count
    for i in range(6):
        tokens = by_token[queries.of(i)]
        total = tokens.sum(0) if reduction == "sum" else tokens.mean(0)
        # Of float32 sums in another order, relative to what was added.
        scale = tokens.abs().max() * len(tokens)
        torch.testing.assert_close(total, by_sequence[i], rtol=0, atol=1e-5 * float(scale))


@pytest.mark.parametrize("reduction", ["sum", "mean", "token"])
@pytest.mark.parametrize("mode", ["shared", "per_segment"])
def test_parts_of_a_training_sequence_by_token_add_up_to_its_score(tmp_path, reduction, mode):
    options = {"normalizer": 4.5} if reduction == "token" else {}
    model, task, data = make("gpt2", "sdpa"), sp.CausalLM(reduction=reduction, **options), sequences(size=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", every=1)
    for _ in range(3):
        optimizer.zero_grad()
        (-task.output(model, make_batch("gpt2", True, 6)).mean()).backward()
        optimizer.step()
        recorder.step()
    run = recorder.trajectory(segments=[[0], [1, 2]], preconditioner=mode)
    bank = sp.build(model, task, run, data, tmp_path / "bank", sketch=sp.Sketch(dim=256), storage="float32")
    source = sp.Source(bank, model=model, task=task)
    parts = source.by_token(data[:3], [data[4], data[1]])
    whole = torch.as_tensor(source.score(data[:3]).to_numpy())
    tokens = sp.TokenQueries([data[4], data[1]], task)
    assert parts.train_ids == [0, 1]
    named = source.by_token(data[:3], [data[4], data[1]], ids=["d", "a"])
    assert named.train_ids == ["d", "a"]
    np.testing.assert_array_equal(named, parts)
    with pytest.raises(sp.MismatchError, match="got 1 ids for 2 examples"):
        source.by_token(data[:3], [data[4], data[1]], ids=["d"])
    assert [f"{place}/{position}" for position, place in np.argwhere(parts.present)] == sorted(
        tokens.ids, key=lambda word: tuple(map(int, word.split("/")[::-1]))
    )
    assert not parts.values.transpose(0, 2, 1)[~parts.present].any()
    scale = float(np.abs(parts.values).max()) * len(parts.values)
    total = torch.as_tensor(parts.total().to_numpy())
    torch.testing.assert_close(total, whole[:, [4, 1]], rtol=0, atol=1e-5 * scale)
    changes = [
        scores.predict_removal(ids, renormalize=True).values
        for scores, ids in ((parts.total(), [0, 1]), (source.score(data[:3]), [4, 1]))
    ]
    np.testing.assert_allclose(changes[0], changes[1], atol=1e-5 * scale)
    named = source.by_token(data[:3], [data[4]], stage="train").total()
    torch.testing.assert_close(torch.as_tensor(named.to_numpy()[:, 0]), total[:, 0], rtol=0, atol=1e-6 * scale)


def test_a_tokens_measurement_is_its_log_likelihood():
    model, batch = make("llama", "sdpa"), make_batch("llama", padded=False)
    task = sp.CausalLM()
    queries = sp.TokenQueries(sequences(padded=False), task)
    place = queries.ids.index("2/4")
    query = {key: value[None] for key, value in queries[place].items()}
    with torch.no_grad():
        logp = model(input_ids=take(batch, [2])["input_ids"]).logits.log_softmax(-1)
        expected = logp[0, 3, batch["input_ids"][2, 4]]
        torch.testing.assert_close(task.measurement(model, query)[0], expected)


def test_parts_by_token_need_a_model_and_a_language(tmp_path):
    model, task, data = make("gpt2", "sdpa"), sp.CausalLM(), sequences(size=3)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    bank = sp.build(model, task, run, data, tmp_path / "bank", sketch=sp.Sketch(dim=64))
    with pytest.raises(ValueError, match="pass model= when constructing"):
        sp.Source(bank).by_token(data, data)
    for stage in (1, 7, -1, "pretrain"):
        with pytest.raises(
            ValueError, match=r"stage must be one of the bank's stages \['train'\], or an index into them, got"
        ):
            sp.Source(bank, model=model).by_token(data, data, stage=stage)


def test_refuses_what_has_no_tokens():
    with pytest.raises(TypeError, match="queries of CausalLM alone, got Classification"):
        sp.TokenQueries(sequences(), sp.Classification())
    with pytest.raises(ValueError, match="no token of the 1 sequences counts"):
        sp.TokenQueries([(torch.zeros(3), torch.full((3,), -100))], sp.CausalLM())
    with pytest.raises(TypeError, match="must be a dict with 'labels'"):
        sp.TokenQueries([{"input_ids": torch.zeros(3)}], sp.CausalLM())
