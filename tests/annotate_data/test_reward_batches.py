"""What a batch of responses is made of: shared prompts, padded rows, too little memory; shares of ranks, and
the summary.
"""

import json
import random
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import micro
from rewarding import FAMILIES, annotate, generated, reference

from annotate_data import batches, ranks, reward_models, summary
from common import cli, shared_prompts

pytestmark = pytest.mark.env("vllm")


@pytest.mark.parametrize("share", [True, False])
def test_score_keeps_the_order(model, share):
    scorer = reward_models.BradleyTerry(str(model()), share_prompts=share)
    scorer.load()
    prompt = [{"role": "user", "content": "q"}]
    records = [
        {"prompt": prompt, "responses": ["a" * n for n in sizes]}
        for sizes in ((5, 90, 1), (40,), (0, 300, 7, 12))
    ]
    scorer.batches.tokens = (
        100  # a group is split over batches, and they are done in another order than the records'
    )
    got = dict(scorer.score(records))
    assert sorted(got) == [0, 1, 2] and list(dict(scorer.score(records))) != [0, 1, 2]
    for i, record in enumerate(records):
        expected = [reference(model(), prompt, x) for x in record["responses"]]
        assert got[i]["rewards"] == pytest.approx(expected, abs=1e-4) and got[i]["cut"] == 0


ENCODINGS = {  # architecture → what its frequencies depend on the longest sequence of a pass by
    "llama": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "phi3": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 16,
            "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 1.0,
        },
    },
}


@pytest.mark.parametrize("architecture", ENCODINGS)
def test_a_sequence_is_encoded_as_it_would_be_alone(architecture, tmp_path):
    """Short and long ones of one record, beyond the length that the config says, each against a model that
    has seen nothing else.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = micro.make_reward_model(
        tmp_path, FAMILIES[architecture], architecture, **ENCODINGS[architecture]
    )
    scorer = reward_models.BradleyTerry(str(folder))
    scorer.load()
    prompt, responses = (
        [{"role": "user", "content": "q"}],
        ["a b", "a b " * 40, "a", "b a " * 20, "a b " * 20],
    )
    ids = [list(scorer.encode(prompt, response).ids) for response in responses]
    assert (
        scorer.max_length == 256
        and max(map(len, ids)) < 256
        and sorted(len(one) > 64 for one in ids) == [False, False, True, True, True]
    )
    [(_, found)] = list(scorer.score([{"prompt": prompt, "responses": responses}]))
    for one, reward in zip(ids, found["rewards"], strict=True):
        alone = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
        alone.config.pad_token_id = None
        with torch.no_grad():
            assert reward == pytest.approx(alone(torch.tensor([one])).logits[0, 0].item(), abs=1e-4)


def small(rows):
    """A forward pass whose memory holds 100 padded tokens."""
    if len(rows) * max(len(row.ids) for row in rows) > 100:
        raise MemoryError
    return [float(len(row.ids)) for row in rows]


def test_batches_shrink_when_memory_runs_out():
    rows = [batches.Row([0] * n, 0) for n in (3, 50, 20, 1, 30, 100, 7)]
    got, sized = {}, batches.Batches(10000)
    for batch, rewards in sized.run(small, rows):
        got.update(zip(batch, rewards, strict=True))
    assert [got[i] for i in range(7)] == [3, 50, 20, 1, 30, 100, 7]
    assert sized.tokens <= 100  # for good, also for what comes later
    with pytest.raises(cli.UserError, match="101 tokens.*--max_length"):
        list(batches.Batches(10000).run(small, [*rows, batches.Row([0] * 101, 0)]))


@pytest.mark.parametrize("share", [True, False])
def test_out_of_memory_in_the_model_splits_groups(model, monkeypatch, capsys, share):
    scorer = reward_models.BradleyTerry(str(model()), share_prompts=share)
    scorer.load()
    records = [
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["a" * n for n in (5, 90, 1, 40)]}
    ] * 3
    expected = dict(scorer.score(records))
    place, name = (shared_prompts, "last_states") if share else (scorer, "_hidden")
    true = getattr(place, name)

    def tight(*given):
        ids = given[1].ids if share else given[1]  # (backbone, packed row) or (rows, padded ids, mask)
        if ids.numel() > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return true(*given)

    monkeypatch.setattr(place, name, tight)
    got = dict(scorer.score(records))
    assert (
        "out of memory" in capsys.readouterr().out
        and sorted(got) == [0, 1, 2]
        and scorer.batches.tokens <= 300
    )
    for i in range(3):
        assert got[i]["rewards"] == pytest.approx(expected[i]["rewards"], abs=1e-5)


def test_a_prompt_is_computed_once(model, monkeypatch):
    scorer = reward_models.BradleyTerry(str(model()))
    scorer.load()
    records = [
        {"prompt": [{"role": "user", "content": word * 40}], "responses": ["yes", "no", "perhaps not"]}
        for word in ("ab", "cd")
    ]
    groups, _ = scorer.encode_all(records)
    columns, pack = [], shared_prompts.pack
    monkeypatch.setattr(shared_prompts, "pack", lambda *a, **k: columns.append(pack(*a, **k)) or columns[-1])
    dict(scorer.score(records))
    passed = sum(packed.ids.numel() for packed in columns[1:])  # the first is the trial
    assert (
        0
        < passed
        == sum(map(shared_prompts.packed_tokens, groups))
        < sum(len(ids) for group in groups for ids in group) / 2
    )


def test_linear_layers_are_packed_for_the_cpu(model):
    """The operator is torch's own and not public: a torch that has lost it is noticed here, where users only
    lose speed.
    """
    import torch

    from annotate_data.packed_linear import PackedLinear, pack_linears

    for bias in (True, False):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            plain = torch.nn.Sequential(torch.nn.Linear(37, 53, bias=bias)).to(dtype)
            inputs = torch.randn(2, 5, 37, dtype=dtype)
            expected = plain(inputs)
            packed = pack_linears(plain)
            # oneDNN has the order for bf16 on processors with AVX-512 only; elsewhere the layer stays as it
            # was.
            if dtype is torch.float32 or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
                assert packed == 1
            assert packed == isinstance(plain[0], PackedLinear)
            with torch.inference_mode():
                assert torch.allclose(plain(inputs), expected, atol=tolerance)
    scorer = reward_models.BradleyTerry(str(model()))
    scorer.load()
    dict(scorer.score([{"prompt": [{"role": "user", "content": "q"}], "responses": ["some", "more words"]}]))
    kinds = {type(module).__name__ for module in scorer.model.base_model.layers.modules()}
    assert "PackedLinear" in kinds and "Linear" not in kinds


def test_a_model_that_cannot_share_is_scored_all_the_same(model, monkeypatch, capsys):
    """Here a window that the shared attention would ignore; the trial at the start finds out."""
    true = shared_prompts.attention
    monkeypatch.setattr(
        shared_prompts.AttentionInterface,
        "_global_mapping",
        dict(shared_prompts.AttentionInterface._global_mapping),
    )
    shared_prompts.AttentionInterface.register(
        shared_prompts.NAME, lambda *a, **k: (lambda out, w: (out * 1.01, w))(*true(*a, **k))
    )
    scorer = reward_models.BradleyTerry(str(model()))
    scorer.load()
    records = [{"prompt": [{"role": "user", "content": "q"}], "responses": ["some", "more words"]}]
    got = dict(scorer.score(records))
    assert "differ by" in capsys.readouterr().out and not scorer.share_prompts
    assert got[0]["rewards"] == pytest.approx(
        [reference(model(), records[0]["prompt"], x) for x in records[0]["responses"]], abs=1e-4
    )


def test_windows_hold_every_group_once_and_the_longest_first():
    groups = [[[0] * n] * 2 for n in (3, 50, 20, 1, 30, 100, 7)]
    found = list(batches.windows(groups, 120))
    assert sorted(sum(found, [])) == list(range(7)) and found[0] == [5]
    assert all(sum(len(x) for g in window for x in groups[g]) <= 120 for window in found[1:])


def test_null_rewards_are_written_and_counted(model, tmp_path, monkeypatch, capsys):
    generated(tmp_path / "gen.jsonl", 3)
    true = reward_models.BradleyTerry.hidden_states

    def sometimes(self, groups, positions):
        for g, states in true(self, groups, positions):
            for k, ids in enumerate(groups[g]):
                states[k] *= float("nan") if len(ids) % 2 else 1
            yield g, states

    monkeypatch.setattr(reward_models.BradleyTerry, "hidden_states", sometimes)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", model())
    nulls = sum(x is None for r in out for x in r["rewards"])
    assert 0 < nulls < 12
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert counts["null_rewards"] == nulls and f"{nulls} rewards are null" in capsys.readouterr().out
    kept = [x for r in out for x in r["rewards"] if x is not None]
    assert counts["reward_mean"] == pytest.approx(statistics.fmean(kept), abs=1e-5)


def summarise(rows):
    found = summary.Summary()
    for row in rows:
        found.add(row["rewards"], row.get("num_tokens"))
    return found.figures()


def test_summary_against_numpy():
    import numpy as np

    rng = np.random.default_rng(0)
    rewards, lengths = (
        1000 + rng.normal(size=(3000, 4)),
        rng.integers(1, 50, (3000, 4)),
    )  # far from 0: moments must not cancel
    rewards[3] = 1.25
    rows = [{"rewards": r, "num_tokens": n} for r, n in zip(rewards.tolist(), lengths.tolist(), strict=True)]
    got = summarise(rows)
    centred = [(x - x.mean(1, keepdims=True)).ravel() for x in (rewards, lengths)]
    expected = {
        "reward_mean": rewards.mean(),
        "best_of_k": rewards.max(1).mean(),
        "worst_of_k": rewards.min(1).mean(),
        "spread": rewards.std(1).mean(),
        "all_equal_fraction": round(1 / 3000, 6),
        "length_correlation": np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1],
        "length_correlation_within": np.corrcoef(*centred)[0, 1],
    }
    assert got == pytest.approx(expected, abs=1e-6)
    empty = summarise([{"rewards": [None]}, {"rewards": [1.0]}])
    assert (
        empty["reward_mean"] == 1.0
        and empty["all_equal_fraction"] is None
        and empty["length_correlation"] is None
    )


def test_summary_with_nulls_and_without_lengths_against_statistics():
    rng = random.Random(1)
    rows = [
        {
            "rewards": [rng.choice([None, rng.random(), 0.1]) for _ in range(3)],
            "num_tokens": rng.choice([None, [rng.choice([None, 1, 2, 9]) for _ in range(3)]]),
        }
        for _ in range(500)
    ]
    got = summarise(rows)
    kept = [[x for x in r["rewards"] if x is not None] for r in rows]
    assert got["reward_mean"] == pytest.approx(statistics.fmean(sum(kept, [])), abs=1e-6)
    assert got["best_of_k"] == pytest.approx(statistics.fmean(max(v) for v in kept if v), abs=1e-6)
    assert got["spread"] == pytest.approx(statistics.fmean(statistics.pstdev(v) for v in kept if v), abs=1e-6)
    assert got["all_equal_fraction"] == pytest.approx(
        statistics.fmean(min(v) == max(v) for v in kept if len(v) > 1), abs=1e-6
    )
    timed = [
        [(x, n) for x, n in zip(r["rewards"], r["num_tokens"], strict=True) if None not in (x, n)]
        for r in rows
        if r["num_tokens"]
    ]
    flat = [list(column) for column in zip(*sum(timed, []), strict=True)]
    assert got["length_correlation"] == pytest.approx(statistics.correlation(*flat), abs=1e-6)
    inside = [
        (x - statistics.fmean(a for a, _ in g), n - statistics.fmean(b for _, b in g))
        for g in timed
        for x, n in g
    ]
    assert got["length_correlation_within"] == pytest.approx(
        statistics.correlation(*zip(*inside, strict=True)), abs=1e-6
    )
    equal = summarise([{"rewards": [0.1] * 3, "num_tokens": [1, 2, 3]}] * 7)
    assert (
        equal["length_correlation"] is None
        and equal["length_correlation_within"] is None
        and equal["spread"] == 0.0
    )


def test_share_is_balanced_and_whole():
    sizes = {(0, i): (i * 7919) % 1000 + 1 for i in range(101)}
    parts = [ranks.share(sizes, rank, 4) for rank in range(4)]
    assert sorted(sum(parts, [])) == sorted(sizes)
    work = [sum(sizes[key] for key in part) for part in parts]
    assert max(work) - min(work) < 0.03 * sum(work)
    assert parts == [ranks.share(dict(reversed(sizes.items())), rank, 4) for rank in range(4)]
