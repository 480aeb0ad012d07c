"""Which pairs share a step and a row, and that a packed row gives what each sequence gives alone:
log-probabilities, gradients.
"""

import dataclasses
import random
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import micro
import pytest
import torch
from training import alone, make_rows
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from common import shared_prompts
from common.shared_prompts import only_wanted, prepare
from dpo_iteration.losses import Pairs, Settings, pair_losses
from dpo_iteration.packing import PaddedCollator, Rows, Steps, collate_packed, columns_of, fill, score

# Steps


def collected(steps, epoch=0):
    """[step][pass of each process]: what every process is given."""
    made = []
    for process in range(steps.processes):
        one = dataclasses.replace(steps, process=process, epoch=epoch)
        made.append(list(one))
        assert len(made[-1]) == len(one) == len(steps)
    a = steps.accumulation
    return [
        [made[p][k] for k in range(s, s + a) for p in range(steps.processes)] for s in range(0, len(steps), a)
    ]


@pytest.mark.parametrize("processes", [1, 3, 8])
@pytest.mark.parametrize("budget", [None, 60, 5000])
def test_each_step_has_the_pairs_of_the_unpacked_computation(processes, budget):
    costs = [random.Random(i).randint(5, 90) for i in range(103)]
    steps = Steps(costs, 24, budget, 2, processes, seed=7, epochs=2)
    for epoch in (0, 1):
        # TRL's order, see test_dpo.py.
        order = torch.randperm(103, generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        made = collected(steps, epoch)
        assert len(made) == 5
        for n, rows in enumerate(made):
            real = [(i, scale) for row in rows for i, scale in row if scale]
            assert sorted(i for i, _ in real) == sorted(order[24 * n : 24 * n + 24])
            # Σ scale × loss over all passes, divided by them as Trainer and mean over processes do, is the
            # mean over the pairs.
            assert {round(scale / len(rows) * len(real), 9) for _, scale in real} == {1.0}
            if budget:
                assert all(sum(costs[i] for i, _ in row) <= budget or len(row) == 1 for row in rows)
            assert all(row and (len(row) == 1 or all(scale for _, scale in row)) for row in rows)


def test_rows_are_filled_alike_and_as_few_as_can_be():
    costs = [random.Random(i).randint(50, 400) for i in range(256)]
    steps = Steps(costs, 128, 4096, processes=2, seed=1)
    totals = [[sum(costs[i] for i, _ in row) for row in rows] for rows in collected(steps)]
    least = max(-(-sum(rows) // (4096 * 2)) for rows in totals)
    assert steps.accumulation == least
    assert all(max(rows) < 1.05 * min(rows) for rows in totals)


def test_one_very_long_pair_is_a_row_of_its_own():
    made = collected(Steps([30] * 15 + [2000], 16, 100, processes=2))
    [rows] = made
    assert [row for row in rows if any(i == 15 for i, _ in row)] == [[(15, len(rows) / 16)]]
    assert Counter(i for row in rows for i, scale in row if scale) == Counter(range(16))


def test_fewer_pairs_than_processes_leave_rows_without_a_pair():
    [rows] = collected(Steps([9, 5, 7], 8, 100, processes=8))
    assert [row for row in rows if not row[0][1]] == [[(1, 0.0)]] * 5 and len(rows) == 8


def test_weights_scale_the_loss():
    [rows] = collected(Steps([9, 5], 2, 100, weights=[0.5, 1.5]))
    assert dict(pair for row in rows for pair in row) == {0: 0.25, 1: 0.75}


def test_fill_puts_the_largest_first_into_the_least_filled():
    assert fill([0, 1, 2, 3], [5, 4, 3, 3], 2) == [[0, 3], [1, 2]]


# Rows


ARCHITECTURES = {
    "llama": {}, "mistral": {"sliding_window": 13}, "qwen2": {}, "qwen3": {}, "phi3": {},
    "gemma2": {"sliding_window": 13, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 13, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def make_model(architecture="llama", dtype=torch.float32, **more):
    torch.manual_seed(3)
    config = micro.make_config(micro.make_tokenizer(), architecture, **(ARCHITECTURES[architecture] | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, weight in model.named_parameters():
        # Attention far from even, or a wrong mask would hardly show.
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2 if "proj" in name else 0.6)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model.to(dtype)


def shared(model):
    prepare(model)
    only_wanted(model.base_model)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_and_gradients_are_those_of_one_sequence_at_a_time(architecture):
    rows = make_rows(7)
    model = make_model(architecture)
    settings, weights = Settings(0.1, 0.1), torch.rand(7)

    def loss(chosen, rejected):
        pairs = Pairs(chosen, rejected, *torch.zeros(5, 7))
        return (pair_losses(pairs, ["sigmoid"], [1.0], settings) * weights).sum()

    chosen, rejected = map(torch.stack, zip(*(alone(model, row) for row in rows)))
    loss(chosen.float(), rejected.float()).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    batch = collate_packed([row | {"scale": 1.0} for row in rows])
    assert batch["input_ids"].shape[1] == sum(map(columns_of, rows)) < batch["tokens"]
    scored = score(shared(model), batch)
    assert torch.allclose(scored.chosen.double(), chosen, atol=2e-4)
    assert torch.allclose(scored.rejected.double(), rejected, atol=2e-4)
    assert scored.chosen_tokens.tolist() == [len(row["chosen_ids"]) for row in rows]
    assert scored.rejected_tokens.tolist() == [len(row["rejected_ids"]) for row in rows]
    loss(scored.chosen, scored.rejected).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("capability", [7, 8])
def test_a_gpus_branches_under_autocast(architecture, capability, monkeypatch):
    """fp32 weights and bf16 autocast, as configs/ddp.yaml has it: rotary positions leave query and key in
    fp32, value is bf16.

    A CPU takes a GPU's branches here: below capability 8 a call for each span with torch's causal bias, else
    the kernel for all spans, which runs on GPUs only: it refuses mixed dtypes, and so does its stand-in.
    """

    def kernel(query, key, value, starts_q, starts_k, *_, scale, window_size, enable_gqa):
        calls.append(query.dtype)
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        made = []
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            may = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            may = may.triu(d - c - (b - a) - window_size[0]) if window_size[0] >= 0 else may
            q, k, v = (one.transpose(0, 1)[None] for one in (query[a:b], key[c:d], value[c:d]))
            made.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, may, scale=scale, enable_gqa=enable_gqa
                )[0]
            )
        return torch.cat(made, 1).transpose(0, 1)

    model, rows, calls = make_model(architecture), [row | {"scale": 1.0} for row in make_rows(5)], []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        padded = score(model, PaddedCollator(0)(rows))
    monkeypatch.setattr(shared_prompts, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(shared_prompts, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    with torch.autocast("cpu", torch.bfloat16):
        packed = score(shared(model), collate_packed(rows))
    (packed.chosen - packed.rejected).sum().backward()
    assert bool(calls) == (capability == 8 and architecture != "gemma2")  # its soft-cap has no kernel
    for ours, theirs, tokens in (
        (packed.chosen, padded.chosen, packed.chosen_tokens),
        (packed.rejected, padded.rejected, packed.rejected_tokens),
    ):
        assert ((ours - theirs).abs() <= 0.02 * tokens + 0.3 * tokens.sqrt()).all()
    assert all(
        weight.grad is not None and weight.grad.dtype == torch.float32 for weight in model.parameters()
    )


def test_padded_batches_give_the_same_and_so_do_their_metrics():
    rows = [row | {"scale": 1.0} for row in make_rows(5)]
    model = make_model()
    padded = score(model, PaddedCollator(0)(rows))
    packed = score(shared(model), collate_packed(rows))
    for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"):
        assert torch.allclose(getattr(packed, name), getattr(padded, name), atol=1e-4), name
    for of in ("of_chosen", "of_rejected"):
        for value in ("mean_logits", "entropy", "is_top1"):
            ours, theirs = ((getattr(s.outputs, value) * getattr(s, of)).sum() for s in (packed, padded))
            assert torch.allclose(ours.float(), theirs.float(), rtol=1e-4), (of, value)


def test_ld_alpha_is_trls():
    rows, model = make_rows(4), make_model()
    batch = PaddedCollator(0)(rows)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", autocast=nullcontext),
        ref_model=model,
        model=model,
        ld_alpha=0.3,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    tensors = {k: v for k, v in batch.items() if k not in ("tokens", "margin")}
    want = DPOTrainer.compute_ref_log_probs(trainer, model, tensors)
    scored = score(model, batch, ld_alpha=0.3)
    assert torch.allclose(scored.chosen, want[0], atol=1e-5) and torch.allclose(
        scored.rejected, want[1], atol=1e-5
    )
    assert not torch.allclose(scored.chosen, score(model, batch).chosen)


def test_a_row_without_a_pair_has_no_gradient_but_passes_through():
    row = Rows(make_rows(3))[1, 0.0]
    model = shared(make_model())
    batch = collate_packed([row])
    scored = score(model, batch)
    (scored.chosen * batch["scale"]).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_a_prompt_of_one_token_and_no_prompt_at_all():
    rows = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7, 8], "scale": 1.0}]
    rows.append({"prompt_ids": [], "chosen_ids": [6, 9], "rejected_ids": [7, 8], "scale": 1.0})
    model = make_model()
    padded = score(model, PaddedCollator(0)(rows))
    packed = score(shared(model), collate_packed(rows))
    assert torch.allclose(packed.chosen, padded.chosen, atol=1e-5) and torch.allclose(
        packed.rejected, padded.rejected, atol=1e-5
    )
    assert packed.chosen_tokens.tolist() == [1, 1]  # without a prompt the first token has no probability
