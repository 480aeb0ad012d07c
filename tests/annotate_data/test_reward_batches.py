"""Batches: shared prompts, padded rows, too little memory; shares of ranks, and the summary."""

import json
import random
import re
import statistics

import micro
import pytest
from rewarding import FAMILIES, flat, generated, reference

from annotate_data import batches, ranks, reward_models, summary
from common import cli, shared_prompts

pytestmark = pytest.mark.env("vllm")

PROMPT = [{"role": "user", "content": "q"}]
MOST = 500  # tokens of a pass that a card holds


@pytest.fixture
def scorer(model):
    """Makes a scorer by the micro Llama, with its weights."""

    def make(**options):
        made = reward_models.BradleyTerry(str(model()), **options)
        made.load()
        return made

    return make


def of_lengths(*groups):
    return [{"prompt": PROMPT, "responses": ["a" * n for n in sizes]} for sizes in groups]


@pytest.mark.parametrize("share", [True, False])
def test_score_keeps_the_order(model, scorer, share):
    records, scorer = of_lengths((5, 90, 1), (40,), (0, 300, 7, 12)), scorer(share_prompts=share)
    scorer.batches.tokens = 100  # a group is split over batches, which are done in another order
    got = dict(scorer.score(records))
    assert sorted(got) == [0, 1, 2] and list(dict(scorer.score(records))) != [0, 1, 2]
    for i, record in enumerate(records):
        expected = [reference(model(), PROMPT, x) for x in record["responses"]]
        assert got[i]["rewards"] == pytest.approx(expected, abs=1e-4) and got[i]["cut"] == 0


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
LONG |= {"rope_theta": 1e4, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
ENCODINGS = {  # architecture → what its frequencies depend on the longest sequence of a pass by
    "llama": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
    "phi3": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
        "rope_parameters": LONG,
    },
}


@pytest.mark.parametrize("architecture", ENCODINGS)
def test_a_sequence_is_encoded_as_it_would_be_alone(architecture, tmp_path):
    """Short and long ones of one record, each against a model that has seen nothing else."""
    import torch
    from transformers import AutoModelForSequenceClassification

    more = ENCODINGS[architecture]
    folder = micro.make_reward_model(tmp_path, FAMILIES[architecture], architecture, **more)
    scorer = reward_models.BradleyTerry(str(folder))
    scorer.load()
    responses = ["a b", "a b " * 40, "a", "b a " * 20, "a b " * 20]
    ids = [list(scorer.encode(PROMPT, response).ids) for response in responses]
    assert scorer.max_length == 256 and max(map(len, ids)) < 256
    assert sorted(len(one) > 64 for one in ids) == [False, False, True, True, True]
    [(_, found)] = list(scorer.score([{"prompt": PROMPT, "responses": responses}]))
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
@pytest.mark.parametrize("kind", ["bt", "armorm", "pairs"])
def test_a_batch_that_a_gpu_cannot_hold_is_halved_for_good(
    kind, share, models, annotate, card, tmp_path, capsys
):
    """Through the script: the same rewards, one line for each pass that did not fit, and those at the start
    alone.
    """
    generated(tmp_path / "gen.jsonl", 12)
    how = {"share_prompts": share, "chunk_records": 4}
    whole = flat(annotate(models[kind], target="whole.jsonl", **how))
    passes = card(MOST)
    capsys.readouterr()
    assert flat(annotate(models[kind], **how)) == pytest.approx(whole, abs=1e-5)
    told = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    beyond = [at for at, size in enumerate(passes) if size > MOST]
    assert 0 < len(told) == len(beyond) and "tokens a batch" in told[-1]
    assert beyond[-1] < len(passes) / 2
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["counts"]["shared_prompts"] == share


def test_shared_prompts_are_tried_on_what_a_gpu_can_hold(scorer, card, capsys):
    lengths = (200, 190, 180), (20, 30), (25, 35)
    records = [
        {"prompt": PROMPT, "responses": [letter * n for letter, n in zip("abc", sizes)]} for sizes in lengths
    ]
    expected, scorer = dict(scorer().score(records)), scorer()
    card(400)
    got = dict(scorer.score(records))
    said = capsys.readouterr().out
    assert scorer.share_prompts and scorer.batches.tokens <= 400 and "separately" not in said
    for i in range(3):
        assert got[i]["rewards"] == pytest.approx(expected[i]["rewards"], abs=1e-5)


def test_a_sequence_that_a_gpu_cannot_hold_is_named_with_what_to_do(
    models, annotate, refused, card, tmp_path
):
    rows = generated(tmp_path / "gen.jsonl", 3)
    card(100)
    longest = "out of memory on one sequence of ... tokens: lower --max_length"
    assert re.search(longest, refused(models["bt"]))
    assert len(annotate(models["bt"], max_length=100, overwrite=True)) == len(rows)


def test_the_cpu_s_memory_runs_out_in_other_words(scorer, monkeypatch, capsys):
    records, scorer = of_lengths((5, 90, 1, 40)) * 3, scorer()
    expected = dict(scorer.score(records))
    true = shared_prompts.last_states

    def tight(backbone, packed):
        if packed.ids.numel() > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return true(backbone, packed)

    monkeypatch.setattr(shared_prompts, "last_states", tight)
    got = dict(scorer.score(records))
    assert "out of memory" in capsys.readouterr().out and scorer.batches.tokens <= 300
    assert {i: got[i]["rewards"] for i in range(3)} == {
        i: pytest.approx(expected[i]["rewards"], abs=1e-5) for i in range(3)
    }


def test_a_prompt_is_computed_once(scorer, monkeypatch):
    prompts, responses = (
        ([{"role": "user", "content": word * 40}] for word in ("ab", "cd")),
        ["yes", "no", "perhaps"],
    )
    records, scorer = [{"prompt": prompt, "responses": responses} for prompt in prompts], scorer()
    groups, _ = scorer.encode_all(records)
    columns, pack = [], shared_prompts.pack
    monkeypatch.setattr(shared_prompts, "pack", lambda *a, **k: columns.append(pack(*a, **k)) or columns[-1])
    dict(scorer.score(records))
    passed = sum(packed.ids.numel() for packed in columns[1:])  # the first is the trial
    assert passed == sum(map(shared_prompts.packed_tokens, groups))
    assert 0 < passed < sum(len(ids) for group in groups for ids in group) / 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_linear_layers_are_packed_for_the_cpu(bias, dtype, tolerance):
    """The operator is torch's own and not public: a torch that has lost it is noticed here."""
    import torch

    from annotate_data.packed_linear import PackedLinear, pack_linears

    dtype = getattr(torch, dtype)
    plain, inputs = torch.nn.Sequential(torch.nn.Linear(37, 53, bias=bias)).to(dtype), torch.randn(2, 5, 37)
    inputs = inputs.to(dtype)
    expected = plain(inputs)
    packed = pack_linears(plain)
    # oneDNN has the order for bf16 on processors with AVX-512 only; elsewhere the layer stays as it was.
    if dtype is torch.float32 or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert packed == 1
    assert packed == isinstance(plain[0], PackedLinear)
    with torch.inference_mode():
        assert torch.allclose(plain(inputs), expected, atol=tolerance)


def test_a_scorer_s_linear_layers_are_packed(scorer):
    scorer = scorer()
    dict(scorer.score(of_lengths((4, 9))))
    kinds = {type(module).__name__ for module in scorer.model.base_model.layers.modules()}
    assert "PackedLinear" in kinds and "Linear" not in kinds


def test_a_model_that_cannot_share_is_scored_all_the_same(model, scorer, monkeypatch, capsys):
    """Here shared attention computes something else; the trial at the start finds out."""
    true, interface = shared_prompts.attention, shared_prompts.AttentionInterface

    def wrong(*given, **named):
        out, weights = true(*given, **named)
        return out * 1.01, weights

    monkeypatch.setattr(
        interface, "_global_mapping", interface._global_mapping | {shared_prompts.NAME: wrong}
    )
    scorer, records = scorer(), of_lengths((4, 9))
    got = dict(scorer.score(records))
    assert "differ by" in capsys.readouterr().out and not scorer.share_prompts
    expected = [reference(model(), PROMPT, x) for x in records[0]["responses"]]
    assert got[0]["rewards"] == pytest.approx(expected, abs=1e-4)


def test_windows_hold_every_group_once_and_the_longest_first():
    groups = [[[0] * n] * 2 for n in (3, 50, 20, 1, 30, 100, 7)]
    found = list(batches.windows(groups, 120))
    assert sorted(sum(found, [])) == list(range(7)) and found[0] == [5]
    assert all(sum(len(x) for g in window for x in groups[g]) <= 120 for window in found[1:])


def test_null_rewards_are_written_and_counted(model, annotate, tmp_path, monkeypatch, capsys):
    generated(tmp_path / "gen.jsonl", 3)
    true = reward_models.BradleyTerry.hidden_states

    def sometimes(self, groups, positions):
        for g, states in true(self, groups, positions):
            for k, ids in enumerate(groups[g]):
                states[k] *= float("nan") if len(ids) % 2 else 1
            yield g, states

    monkeypatch.setattr(reward_models.BradleyTerry, "hidden_states", sometimes)
    rewards = flat(annotate(model()))
    nulls, kept = rewards.count(None), [x for x in rewards if x is not None]
    assert 0 < nulls < 12
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert counts["null_rewards"] == nulls and f"{nulls} rewards are null" in capsys.readouterr().out
    assert counts["reward_mean"] == pytest.approx(statistics.fmean(kept), abs=1e-5)


def summarise(rows):
    found = summary.Summary()
    for rewards, lengths in rows:
        found.add(rewards, lengths)
    return found.figures()


def test_summary_against_numpy():
    import numpy as np

    rng = np.random.default_rng(0)
    rewards = 1000 + rng.normal(size=(3000, 4))  # far from 0: moments must not cancel
    lengths = rng.integers(1, 50, (3000, 4))
    rewards[3] = 1.25
    centred = [(x - x.mean(1, keepdims=True)).ravel() for x in (rewards, lengths)]
    assert summarise(zip(rewards.tolist(), lengths.tolist(), strict=True)) == pytest.approx(
        {
            "reward_mean": rewards.mean(),
            "best_of_k": rewards.max(1).mean(),
            "worst_of_k": rewards.min(1).mean(),
            "spread": rewards.std(1).mean(),
            "all_equal_fraction": round(1 / 3000, 6),
            "length_correlation": np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1],
            "length_correlation_within": np.corrcoef(*centred)[0, 1],
        },
        abs=1e-6,
    )


def test_summary_with_nulls_and_without_lengths_against_statistics():
    rng = random.Random(1)
    rows = []
    for _ in range(500):
        lengths = rng.choice([None, [rng.choice([None, 1, 2, 9]) for _ in range(3)]])
        rows.append(([rng.choice([None, rng.random(), 0.1]) for _ in range(3)], lengths))
    kept = [[x for x in rewards if x is not None] for rewards, _ in rows]
    kept = [values for values in kept if values]
    timed = [[p for p in zip(*row, strict=True) if None not in p] for row in rows if row[1]]
    means = [[statistics.fmean(column) for column in zip(*pairs, strict=True)] for pairs in timed if pairs]
    inside = [(x - mx, n - mn) for pairs, (mx, mn) in zip(filter(None, timed), means) for x, n in pairs]
    expected = {
        "reward_mean": sum(kept, []),
        "best_of_k": map(max, kept),
        "worst_of_k": map(min, kept),
        "spread": map(statistics.pstdev, kept),
        "all_equal_fraction": [min(v) == max(v) for v in kept if len(v) > 1],
    }
    expected = {key: statistics.fmean(values) for key, values in expected.items()}
    for key, pairs in {"length_correlation": sum(timed, []), "length_correlation_within": inside}.items():
        expected[key] = statistics.correlation(*zip(*pairs, strict=True))
    assert summarise(rows) == pytest.approx(expected, abs=1e-6)
    correlations = {"length_correlation": None, "length_correlation_within": None}
    equal = summarise([([0.1] * 3, [1, 2, 3])] * 7)
    assert equal["spread"] == 0.0 and equal | correlations == equal
    empty = summarise([([None], None), ([1.0], None)])
    assert empty["reward_mean"] == 1.0 and empty | correlations | {"all_equal_fraction": None} == empty


def test_share_is_balanced_and_whole():
    chunk = [(i, {"prompt": [], "responses": ["x" * ((i * 7919) % 1000 + 1)]}) for i in range(101)]
    parts = [ranks.share(chunk, rank, 4) for rank in range(4)]
    assert sorted(sum(parts, [])) == chunk
    work = [sum(len(record["responses"][0]) for _, record in part) for part in parts]
    assert max(work) - min(work) < 0.03 * sum(work)
    assert parts == [ranks.share(chunk[::-1], rank, 4) for rank in range(4)]
