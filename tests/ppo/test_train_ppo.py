"""ppo/train_ppo.py on micro models: what it computes, against plain passes, and what it learns. Its formulas
alone are in test_ppo_losses.py.
"""

import math
import subprocess
import sys

import micro
import pytest
import torch
from small_ppo import equal, make
from training import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.cli import UserError
from ppo import train_ppo as ppo


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_values_are_those_of_one_sequence_alone(work, temperature):
    """In float64 a response at a time, without padding: log-probabilities, entropies, and the value before
    each token.
    """
    it = make(work, reward_name_or_path=[str(work / "rm")], reward_function=..., temperature=temperature)
    rows, _ = it.rollout(1)
    assert len({len(row["prompt"]) for row in rows}) > 1  # padded on the left
    rows[0]["response"] = rows[0]["response"][:3]  # and on the right
    it.evaluate(rows)
    policy = AutoModelForCausalLM.from_pretrained(work / "policy", dtype=torch.float64)
    critic = AutoModelForSequenceClassification.from_pretrained(work / "rm", dtype=torch.float64)
    for row in rows:
        ids, start = torch.tensor([row["prompt"] + row["response"]]), len(row["prompt"])
        with torch.no_grad():
            every = (policy(ids).logits[0] / temperature).log_softmax(-1)
            values = critic.score(critic.model(ids).last_hidden_state)[0, :, 0]
        expected = [every[start + t - 1, token].item() for t, token in enumerate(row["response"])]
        assert row["log_probs"].tolist() == pytest.approx(expected, abs=2e-5)
        assert row["values"].tolist() == pytest.approx(values[start - 1 : -1].tolist(), abs=2e-4)
        entropy = -(every.exp() * every).sum(-1)[start - 1 : -1].sum().item()
        assert row["entropy"] == pytest.approx(entropy, abs=1e-3)
        assert torch.equal(row["log_probs"], row["ref_log_probs"])  # KL 0 to the last bit


def test_sampling_follows_the_log_probabilities(work):
    """One token of one prompt, 2048 times: frequencies against the probabilities that are trained on, at a
    temperature.
    """
    model = AutoModelForCausalLM.from_pretrained(micro.make_policy(work / "untied"))
    with torch.no_grad():
        model.lm_head.weight.mul_(25)  # far from uniform
    # The model's own taste must not matter.
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=3.0)
    model.save_pretrained(work / "peaked")
    AutoTokenizer.from_pretrained(work / "policy").save_pretrained(work / "peaked")
    it = make(
        work,
        model_name_or_path=str(work / "peaked"),
        dataset_name_or_path=[str(work / "one.jsonl")],
        rollout_batch_size=1,
        max_new_tokens=1,
        samples_per_prompt=2048,
        generation_batch_size=2048,
        batch_size=2048,
        micro_batch_size=2048,
        temperature=0.8,
        chat_template=str(work / "plain.jinja"),
    )
    assert it.policy.generation_config.top_k == 0  # transformers' own default is 50
    rows, _ = it.rollout(1)
    counts = torch.bincount(torch.tensor([row["response"][0] for row in rows]), minlength=288) / len(rows)
    inputs, *_ = ppo.padded([rows[0] | {"response": []}], it.pad, "cpu")
    with torch.no_grad():
        logits = it.policy(**inputs).logits[0, -1]
    right, wrong = (
        0.5 * (counts - (logits / temperature).softmax(-1)).abs().sum().item() for temperature in (0.8, 1.0)
    )
    assert right < 0.06 and wrong > 0.1, (right, wrong)


def test_responses_end_at_any_stop_token_also_where_pad_is_eos(work, monkeypatch):
    it = make(work)
    eot, end, a = (it.tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>", "a"))
    assert it.stops == {eot, end}
    it.pad = eot
    written = [[a, a, eot, eot, eot], [end, eot, eot, eot, eot], [a, a, a, a, a], [a, a, a, a, eot]]

    def generate(input_ids, attention_mask):
        return torch.cat([input_ids, torch.tensor(written)], 1)

    monkeypatch.setattr(it.policy, "generate", generate)
    rows = it.generate(it.prompts[:2], 0)
    assert [row["response"] for row in rows] == [[a, a, eot], [end], [a] * 5, [a] * 4 + [eot]]
    assert [row["text"] for row in rows] == ["aa", "", "aaaaa", "aaaa"]
    assert [row["cut"] for row in rows] == [False, False, True, False]
    it.score(rows)
    assert [round(row["score"], 6) for row in rows] == [1.6, 0, 4, 3.2]
    it.evaluate(rows)
    it.args.missing_eos_penalty, it.args.kl_coef, it.args.gae_lambda = 7.0, 0.0, 1.0
    data, figures = it.advantages(rows)
    assert data["mask"].sum(1).tolist() == [3, 1, 5, 5]
    assert data["returns"][:, 0].tolist() == pytest.approx([1.6, 0, 4 - 7, 3.2])
    assert (figures["truncated_fraction"], figures["response_length"]) == (0.25, 3.5)
    assert figures["reward"] == pytest.approx(2.2)


def test_the_gradient_is_one_mean_over_the_steps_tokens(work):
    """Micro batches of 1, 3 and all give the gradient of the plain mean over all tokens, responses having 1
    to 6.
    """
    it, gradients = make(work), {}
    rows, _ = it.rollout(1)
    for i, row in enumerate(rows):
        row["response"] = row["response"][: 1 + i % 6]
    it.evaluate(rows)
    data, _ = it.advantages(rows)
    tokens = data["mask"].sum()
    for size in (1, 3, 8):
        it.policy.zero_grad()
        for some in torch.arange(8).split(size):
            it.backward([rows[i] for i in some], {key: value[some] for key, value in data.items()}, tokens)
        gradients[size] = {name: p.grad.clone() for name, p in it.policy.named_parameters()}
    equal(gradients[1], gradients[8], atol=1e-6, rtol=1e-4)
    equal(gradients[3], gradients[8], atol=1e-6, rtol=1e-4)
    it.policy.zero_grad()  # at ratio 1 the gradient is that of −mean(A · log π)
    total = 0.0
    for i, row in enumerate(rows):
        inputs, responses, _ = ppo.padded([row], it.pad, "cpu")
        log_probs = ppo.log_probs_of(it.policy, inputs, responses, 1.0)[0][0]
        total = total - (log_probs * data["advantages"][i, : responses.shape[1]]).sum()
    (total / tokens).backward()
    equal({name: p.grad for name, p in it.policy.named_parameters()}, gradients[8], atol=1e-6, rtol=1e-4)


def test_prompts_come_once_a_pass_and_in_another_order_each(work):
    it = make(work)
    first, second = it.order(0, 12), it.order(12, 12)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert it.order(10, 4) == first[10:] + second[:2]


def test_checkpointing_and_bf16_compute_nearly_the_same(work):
    """bf16 by the CPU's autocast, as on a GPU: weights and values stay fp32, the first ratio is 1 to bf16's
    rounding.
    """
    found = {}
    for name, more in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"precision": "bf16"},
    }.items():
        it = make(work, **more)
        rows, _ = it.rollout(1)
        if name == "checkpointing":
            assert any(getattr(module, "gradient_checkpointing", False) for module in it.policy.modules())
        data, figures = it.advantages(rows)
        it.check_start(figures)
        figures = it.learn(rows, data, 1)
        found[name] = {key: p.detach().clone() for key, p in it.policy.named_parameters()}
        assert {data["values"].dtype, *(p.dtype for p in it.policy.parameters())} == {torch.float32}
    equal(found["plain"], found["checkpointing"], atol=1e-6)
    assert any(not torch.equal(found["plain"][key], found["bf16"][key]) for key in found["plain"])


def test_a_ratio_off_one_stops_the_run(work):
    it = make(work)
    rows, _ = it.rollout(1)
    data, figures = it.advantages(rows)
    it.check_start(figures)
    data["log_probs"] = data["log_probs"] + 0.01
    with pytest.raises(UserError, match="ratio of the first step is off 1 by 0.01.*attn_implementation"):
        it.learn(rows, data, 1)
    with pytest.raises(UserError, match="nats off the reference before anything was learned"):
        it.check_start(figures | {"kl": 0.5})


@pytest.mark.parametrize("spread", [2.0, 8.0])
def test_in_bf16_rounding_passes_and_dropout_does_not(work, spread):
    """A policy whose attention is far from even and whose logits are large rounds far; its passes differ from
    rollout to step.
    """
    it = make(work, precision="bf16", max_new_tokens=12, micro_batch_size=3)
    with torch.no_grad():
        for policy in (it.policy, it.reference):
            for name, weight in policy.named_parameters():
                if weight.ndim == 2:
                    torch.manual_seed(len(name))
                    weight.normal_(std=0.2 if "proj" in name else 1.0)
            policy.lm_head.weight.mul_(spread / 8)
    rows, _ = it.rollout(1)
    data, figures = it.advantages(rows)
    it.check_start(figures)
    it.learn(rows, data, 1)
    for layer in it.policy.model.layers:
        layer.self_attn.attention_dropout = 0.2  # as transformers' attention takes it in training
    rows, _ = it.rollout(2)
    data, _ = it.advantages(rows)
    with pytest.raises(UserError, match="ratio of the first step is off 1 by"):
        it.learn(rows, data, 2)


def test_an_unfinished_number_stops_the_run_before_the_weights(work):
    it = make(work)
    rows, _ = it.rollout(1)
    data, _ = it.advantages(rows)
    data["advantages"][2, 0] = math.inf
    with pytest.raises(UserError, match="of the policy is not finite in rollout 1"):
        it.learn(rows, data, 1)
    assert all(p.isfinite().all() for p in it.policy.parameters())
    with torch.no_grad():
        it.policy.get_input_embeddings().weight.fill_(math.inf)
    with pytest.raises(UserError, match="probabilities are not finite any more"):
        it.rollout(2)
    (work / "nan.py").write_text("def f(messages, response):\n    return float('nan')\n")
    with pytest.raises(UserError, match="score that is not finite"):
        make(work, reward_function=f"{work / 'nan.py'}:f").rollout(1)


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_a_bandit_reaches_its_known_optimum(work, estimator):
    """One prompt, one token, reward 1 for `a`: with the KL in the reward the optimum is π_ref(x) · e^(r(x)/β)
    / Z.
    """
    (work / "bandit.py").write_text("def f(messages, response):\n    return float(response == 'a')\n")
    beta, rollouts = 0.18, 50
    it = make(
        work,
        reward_function=f"{work / 'bandit.py'}:f",
        dataset_name_or_path=[str(work / "one.jsonl")],
        rollout_batch_size=1,
        max_new_tokens=1,
        samples_per_prompt=256,
        generation_batch_size=256,
        batch_size=64,
        micro_batch_size=64,
        kl_coef=beta,
        advantage_estimator=estimator,
        learning_rate=3e-3,
        critic_learning_rate=3e-3,
        num_episodes=rollouts,
        lr_scheduler_type="linear",
        missing_eos_penalty=0.0,
        chat_template=str(work / "plain.jinja"),
    )
    a = it.tokenizer.convert_tokens_to_ids("a")
    inputs, *_ = ppo.padded([{"prompt": it.prompts[0]["ids"], "response": []}], it.pad, "cpu")

    def probability(model):
        with torch.no_grad():
            return model(**inputs).logits[0, -1].softmax(-1)[a].item()

    for number in range(1, rollouts + 1):
        rows, _ = it.rollout(number)
        data, figures = it.advantages(rows)
        it.learn(rows, data, number)
    before, after = probability(it.reference), probability(it.policy)
    optimum = before * math.exp(1 / beta) / (before * math.exp(1 / beta) + 1 - before)
    assert before < 0.01 and 0.3 < optimum < 0.7
    assert after == pytest.approx(optimum, abs=0.1), (before, after, optimum)


def test_settings_are_read_without_anything_heavy():
    """The loop imports both backends to resolve a section."""
    asks = "import sys, ppo.train_ppo, ppo.openrlhf.run_openrlhf; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "False", loaded.stderr
