"""ppo/train_ppo.py as a person starts it, on micro models: what it computes, what it learns, stopped,
continued, refused.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file
from training import ROOT, read_json, read_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from common import training
from common.cli import UserError, build, read_yaml
from common.training import Training
from ppo import train_ppo as ppo

SCRIPT = str(ROOT / "ppo" / "train_ppo.py")
FUNCTION = "def letters(messages, response):\n    return response.count('a') - 0.2 * len(response)\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with models, prompts and a reward function.

    Micro models are random, so a response seldom ends by itself.
    """
    folder = tmp_path_factory.mktemp("ppo")
    policy = micro.make_policy(folder / "policy", tie_word_embeddings=True)
    (policy / "preprocessor_config.json").write_text("{}")
    micro.make_reward_model(folder / "rm")
    micro.make_reward_model(folder / "rm_chatml", family="chatml")
    micro.write_prompts(folder / "prompts.jsonl", 12)
    (folder / "reward.py").write_text(FUNCTION)
    (folder / "one.jsonl").write_text(json.dumps({"prompt": "Q"}) + "\n")
    (folder / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def settings(work, name, **more):
    values = {
        "model_name_or_path": str(work / "policy"),
        "reward_function": f"{work / 'reward.py'}:letters",
        "output_dir": str(work / name),
        "dataset_name_or_path": [str(work / "prompts.jsonl")],
        "max_input_length": 200,
        "max_new_tokens": 6,
        "rollout_batch_size": 4,
        "samples_per_prompt": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "generation_batch_size": 4,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "kl_coef": 0.05,
        "num_episodes": 1,
        "cpu_threads": 1,
        "bf16": False,
    }
    values |= more
    return {key: value for key, value in values.items() if value is not ...}


def argv(work, name, **more):
    words = []
    for key, value in settings(work, name, **more).items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture
def here(monkeypatch):
    """Start train_ppo.py in this process."""
    from accelerate.state import AcceleratorState, GradientState

    def go(words):
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", *words])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(1)
        ppo.main()

    return go


def make(work, name="unused", **more):
    """A PPO object in this process, without a launcher."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    precision = more.pop("precision", "no")
    return ppo.PPO(
        build(ppo.Arguments, settings(work, name, **more)), Accelerator(cpu=True, mixed_precision=precision)
    )


def begin(words, launcher=(), **options):
    hidden = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    program = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
    return subprocess.Popen(
        [sys.executable, *program, SCRIPT, *words],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
    )


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def equal(a, b, **limits):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **({"rtol": 0, "atol": 0} | limits))


def without_seconds(path):
    return [
        {k: v for k, v in entry.items() if not k.startswith(("seconds", "tokens_per"))}
        for entry in read_jsonl(path)
    ]


# What is computed


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


def test_padding_changes_nothing(work):
    it = make(work)
    rows, _ = it.rollout(1)
    inputs, responses, mask = ppo.padded(rows, it.pad, "cpu")
    found, _ = ppo.log_probs_of(it.policy, inputs, responses, 1.0)
    wider = [row | {"prompt": row["prompt"]} for row in rows] + [{"prompt": [5] * 150, "response": [6] * 30}]
    inputs, responses, more = ppo.padded(wider, 7, "cpu")  # other padding, and another token for it
    again, _ = ppo.log_probs_of(it.policy, inputs, responses, 1.0)
    n = mask.shape[1]
    torch.testing.assert_close(again[:-1, :n] * mask, found * mask, atol=1e-5, rtol=0)
    assert torch.equal(more[:-1, :n], mask) and not more[:-1, n:].any()
    for row, places, there in zip(
        wider, inputs["position_ids"], inputs["attention_mask"]
    ):  # where a model counts from 0
        assert places[there > 0].tolist() == list(range(len(row["prompt"]) + len(row["response"])))


def test_sampling_follows_the_log_probabilities(work):
    """One token of one prompt, 2048 times: frequencies against the probabilities that are trained on, at a
    temperature.
    """
    model = AutoModelForCausalLM.from_pretrained(micro.make_policy(work / "untied"))
    with torch.no_grad():
        model.lm_head.weight.mul_(25)  # far from uniform
    model.generation_config.update(
        do_sample=True, top_k=3, repetition_penalty=3.0
    )  # the model's own taste must not matter
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
    assert [row["text"] for row in rows] == ["aa", "", "aaaaa", "aaaa"] and [row["cut"] for row in rows] == [
        False,
        False,
        True,
        False,
    ]
    it.score(rows)
    assert [round(row["score"], 6) for row in rows] == [1.6, 0, 4, 3.2]
    it.evaluate(rows)
    it.args.missing_eos_penalty, it.args.kl_coef, it.args.gae_lambda = 7.0, 0.0, 1.0
    data, figures = it.advantages(rows)
    assert data["mask"].sum(1).tolist() == [3, 1, 5, 5]
    assert data["returns"][:, 0].tolist() == pytest.approx([1.6, 0, 4 - 7, 3.2])
    assert (
        figures["truncated_fraction"] == 0.25
        and figures["reward"] == pytest.approx(2.2)
        and figures["response_length"] == 3.5
    )


def test_the_value_model_starts_as_the_reward_model(work, capsys):
    it = make(work, reward_name_or_path=[str(work / "rm")], reward_function=...)
    assert f"value model: from {work / 'rm'}, head and all" in capsys.readouterr().out
    rows, _ = it.rollout(1)
    for row, text in zip(rows, ("", "a", "Paris is it.", "bb", "no", "x y", "z", "a longer answer")):
        row["response"] = it.tokenizer(text, add_special_tokens=False)["input_ids"] + [
            it.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        ]
        row |= {
            "text": text,
            "cut": False,
            "record": next(p for p in it.prompts if p["ids"] == row["prompt"]),
        }
    it.score(rows)
    for row in rows:  # one token more, so that the value behind the last token is among those given out
        inputs, responses, _ = ppo.padded([row | {"response": row["response"] + [0]}], it.pad, "cpu")
        with torch.no_grad():
            value = ppo.values_of(it.critic, inputs, responses)[0, -1].item()
        assert value == pytest.approx(row["score"], abs=1e-4)
    assert len({row["score"] for row in rows}) == len(rows)


def test_another_vocabulary_scores_texts_and_the_value_model_starts_from_the_policy(work, capsys):
    it = make(work, reward_name_or_path=[str(work / "rm_chatml")], reward_weights=[0.5, 2.0])
    assert (
        f"value model: from {work / 'policy'}, the policy, with a new head that says 0"
        in capsys.readouterr().out
    )
    rows, _ = it.rollout(1)
    assert all(not row["values"].any() for row in rows)
    from annotate_data.reward_models import BradleyTerry

    scorer = BradleyTerry(str(work / "rm_chatml"))
    scorer.load()
    row = rows[3]
    prompt = next(p["prompt"] for p in it.prompts if p["ids"] == row["prompt"])
    [(_, entry)] = scorer.score([{"prompt": prompt, "responses": [row["text"]]}])
    expected = 0.5 * entry["rewards"][0] + 2 * (row["text"].count("a") - 0.2 * len(row["text"]))
    assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert len({row["score"] for row in rows}) > 1


def test_the_gradient_is_one_mean_over_the_steps_tokens(work):
    """Micro batches of 1, 3 and all give the gradient of the plain mean over all tokens, responses having 1
    to 6.
    """
    gradients = {}
    for size in (1, 3, 8):
        it = make(work, micro_batch_size=size, batch_size=8)
        rows, _ = it.rollout(1)
        for i, row in enumerate(rows):
            row["response"] = row["response"][: 1 + i % 6]
        it.evaluate(rows)
        data, _ = it.advantages(rows)
        tokens, model = data["mask"].sum(), it.policy
        for some in torch.arange(8).split(size):
            it.backward([rows[i] for i in some], {key: value[some] for key, value in data.items()}, tokens)
        gradients[size] = {name: p.grad.clone() for name, p in model.named_parameters()}
    equal(gradients[1], gradients[8], atol=1e-6, rtol=1e-4)
    equal(gradients[3], gradients[8], atol=1e-6, rtol=1e-4)
    it.policy.zero_grad()  # at ratio 1 the gradient is that of −mean(A · log π)
    total = 0.0
    for i, row in enumerate(rows):
        inputs, responses, _ = ppo.padded([row], it.pad, "cpu")
        total = (
            total
            - (
                ppo.log_probs_of(it.policy, inputs, responses, 1.0)[0][0]
                * data["advantages"][i, : responses.shape[1]]
            ).sum()
        )
    (total / tokens).backward()
    equal({name: p.grad for name, p in it.policy.named_parameters()}, gradients[8], atol=1e-6, rtol=1e-4)


def test_a_learning_pass_holds_no_tensors_for_entropies(work):
    """Of the vocabulary's size, 16 rows × 1024 tokens × 128,256 × 4 bytes are 8 GB each: nothing of it beside
    log_softmax.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    it = make(work)
    rows, _ = it.rollout(1)
    data, figures = it.advantages(rows)
    assert figures["entropy"] > 1
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, words=(), more=None):
            result = function(*words, **(more or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (288,) and result.dim() == 3:
                made.append(str(function))
            return result

    with Watch():
        it.backward(rows, data, data["mask"].sum())
    assert any("log_softmax" in name for name in made) and not any("exp" in name for name in made), made


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
        assert {p.dtype for p in it.policy.parameters()} == {torch.float32} and data[
            "values"
        ].dtype == torch.float32
    equal(found["plain"], found["checkpointing"], atol=1e-6)
    assert any(not torch.equal(found["plain"][key], found["bf16"][key]) for key in found["plain"])


def test_a_ratio_off_one_stops_the_run(work):
    it = make(work)
    rows, _ = it.rollout(1)
    data, figures = it.advantages(rows)
    it.check_start(figures)
    data["log_probs"] = data["log_probs"] + 0.01
    with pytest.raises(
        UserError, match="ratio of the first step is off 1 by 0.01.*dropout.*attn_implementation"
    ):
        it.learn(rows, data, 1)
    with pytest.raises(UserError, match="nats off the reference before anything was learned"):
        it.check_start(figures | {"kl": 0.5})


@pytest.mark.parametrize("spread", [2.0, 8.0])
def test_in_bf16_rounding_passes_and_dropout_does_not(work, spread):
    """A policy whose attention is far from even and whose logits are large rounds far; its passes differ from
    rollout to step.
    """
    it = make(work, precision="bf16", max_new_tokens=12, micro_batch_size=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for policy in (it.policy, it.reference):
            for name, weight in policy.named_parameters():
                if weight.ndim == 2:
                    weight.copy_(
                        torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                        * (0.2 if "proj" in name else 1.0)
                    )
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


# What is learned


def test_a_bandit_reaches_its_known_optimum(work):
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


@pytest.fixture(scope="module")
def undisturbed(work):
    """A run from start to end, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_ppo.py", *argv(work, "undisturbed", **RUN)])
        ppo.main()
    return work / "undisturbed"


RUN = {
    "num_episodes": 2,
    "kl_target": 0.05,
    "kl_horizon": 20,
    "ppo_epochs": 2,
    "save_steps": 1,
    "keep_checkpoints": True,
    "whiten_rewards": True,
    "missing_eos_penalty": 3,
    "report_to": ["tensorboard"],
}


def test_what_a_run_leaves(work, undisturbed):
    assert undisturbed.is_dir()
    tokenizer, model = (
        AutoTokenizer.from_pretrained(undisturbed),
        AutoModelForCausalLM.from_pretrained(undisturbed),
    )
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(work / "policy").chat_template
    assert read_json(undisturbed / "generation_config.json") == read_json(
        work / "policy" / "generation_config.json"
    )
    assert read_json(undisturbed / "config.json") == read_json(work / "policy" / "config.json")
    assert GenerationConfig.from_pretrained(undisturbed).eos_token_id == model.generation_config.eos_token_id
    assert (undisturbed / "preprocessor_config.json").is_file()
    before, after = weights(work / "policy"), weights(undisturbed)
    assert set(after) == set(before) and "lm_head.weight" not in after  # a tied head is no weight of its own
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3
    manifest = read_json(work / "undisturbed.manifest.json")
    assert (
        manifest["complete"]
        and manifest["script"] == "ppo/train_ppo.py"
        and manifest["settings"]["clip"] == 0.2
    )
    assert manifest["counts"] == {"prompts": 12, "skipped": 0, "rollouts": 6, "responses": 48}
    assert {"model_name_or_path", "dataset_name_or_path 1", "reward_function"} <= manifest["inputs"].keys()
    assert [f.name for f in sorted(undisturbed.glob("checkpoint-*"))] == ["checkpoint-5", "checkpoint-6"]
    assert (
        list((undisturbed / "runs").rglob("events.out.tfevents.*"))
        and not (work / "undisturbed.lock").exists()
    )


def test_each_rollout_is_logged(work, undisturbed):
    log = read_jsonl(work / "undisturbed.log.jsonl")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6] and log[-1]["episode"] == 2
    wanted = {
        "reward",
        "reward_less_kl",
        "kl",
        "entropy",
        "response_length",
        "truncated_fraction",
        "policy_loss",
        "value_loss",
        "clip_fraction",
        "approx_kl",
        "ratio",
        "explained_variance",
        "kl_coef",
        "policy_learning_rate",
        "critic_learning_rate",
        "policy_grad_norm",
        "critic_grad_norm",
        "tokens_per_second",
        "seconds",
    }
    assert all(wanted <= entry.keys() for entry in log)
    assert log[0]["kl"] == 0 and log[1]["kl"] != 0
    for old, new in zip(log, log[1:]):  # the controller of kl_target
        assert new["kl_coef"] == pytest.approx(ppo.steer(old["kl_coef"], old["kl"], 0.05, 20, 8), rel=1e-12)
    assert log[0]["policy_learning_rate"] > log[-1]["policy_learning_rate"]  # cosine
    assert 5.0 < log[0]["entropy"] < math.log(288) and 1 <= log[0]["response_length"] <= 6


def test_a_finished_run_is_left_alone_and_another_setting_is_refused(work, undisturbed, here, capsys):
    stamp = (undisturbed / "model.safetensors").stat().st_mtime_ns
    here(argv(work, "undisturbed", **RUN))
    assert (
        "is complete, nothing to do" in capsys.readouterr().out
        and (undisturbed / "model.safetensors").stat().st_mtime_ns == stamp
    )
    here(argv(work, "undisturbed", **RUN, micro_batch_size=1))  # mere speed
    with pytest.raises(UserError, match="kl_horizon was 20 and is now 30.*--overwrite"):
        here(argv(work, "undisturbed", **RUN | {"kl_horizon": 30}))


def test_a_killed_run_ends_with_the_same_weights(work, undisturbed):
    """kill -9 once the second checkpoint is there, start again."""
    words = argv(work, "killed", **RUN)
    process = begin(words)
    until = time.monotonic() + 200
    while (
        not (work / "killed" / "checkpoint-2").exists()
        and process.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (work / "killed" / "model.safetensors").exists()
    process = begin(words)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "continuing from" in said, said
    equal(weights(undisturbed), weights(work / "killed"))
    assert without_seconds(work / "killed.log.jsonl") == without_seconds(work / "undisturbed.log.jsonl")
    for name in ("policy", "critic"):
        a, b = (
            torch.load(work / run / "checkpoint-6" / "state.pt", weights_only=True)[name]
            for run in ("undisturbed", "killed")
        )
        equal(a[0], b[0])
        assert str(a[2]) == str(b[2])


def test_two_processes_train_what_one_does(work, undisturbed):
    launcher = [
        "--config_file",
        str(ROOT / "configs" / "ddp.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    process = begin(argv(work, "two", **RUN, micro_batch_size=1), launcher)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    equal(weights(undisturbed), weights(work / "two"), atol=2e-5)
    for one, two in zip(
        without_seconds(work / "undisturbed.log.jsonl"), without_seconds(work / "two.log.jsonl")
    ):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-4)
    assert read_json(work / "two.manifest.json")["num_processes"] == 2


@pytest.mark.long
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(work, undisturbed):
    """Twelve kills at random moments of work and of putting things in place, one run."""
    import random

    rng, words, kills = random.Random(0), argv(work, "often", **RUN), 0
    while kills < 12:
        process = begin(words)
        while "prompts," not in (line := process.stdout.readline()) and line:
            pass
        time.sleep(rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
    process = begin(words)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    equal(weights(undisturbed), weights(work / "often"))
    assert without_seconds(work / "often.log.jsonl") == without_seconds(work / "undisturbed.log.jsonl")


def stopped_before(name, here, monkeypatch, words):
    """Start a run that dies as soon as `name` of train_ppo.py is called."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo, name, die)
        with pytest.raises(KeyboardInterrupt):
            here(words)


DAMAGE = {
    "half a state": lambda folder: os.truncate(folder / "state.pt", 1000),
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "half a note": lambda folder: os.truncate(folder / "trainer_state.json", 5),
    "an empty note": lambda folder: (folder / "trainer_state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    work, undisturbed, here, monkeypatch, capsys, damage
):
    name = damage.replace(" ", "_")
    words = argv(work, name, **RUN)
    stopped_before("finish", here, monkeypatch, words)
    DAMAGE[damage](work / name / "checkpoint-6")
    log = work / f"{name}.log.jsonl"
    log.write_text(
        "\n".join(log.read_text().split("\n")[:4]) + '\n{"step": 5, "rew'
    )  # what a loss of power leaves
    here(words)
    assert f"continuing from {work / name / 'checkpoint-5'}" in capsys.readouterr().out
    equal(weights(undisturbed), weights(work / name))
    assert [entry["step"] for entry in read_jsonl(log)] == [1, 2, 3, 4, 6]


def test_checkpoints_of_which_none_can_be_read_are_not_passed_over_in_silence(work, here, monkeypatch):
    words = argv(work, "unreadable", **RUN)
    stopped_before("finish", here, monkeypatch, words)
    for state in (work / "unreadable").glob("checkpoint-*/state.pt"):
        os.truncate(state, 1000)
    with pytest.raises(
        UserError, match="checkpoint-5 cannot be read .*nor is there an older one.*overwrite true"
    ):
        here(words)
    for note in (work / "unreadable").glob("checkpoint-*/trainer_state.json"):
        os.truncate(note, 5)
    with pytest.raises(
        UserError, match="checkpoint-. cannot be read .*trainer_state.json is damaged.*overwrite true"
    ):
        here(words)


def test_checkpoints_stay_until_the_model_is_known_to_be_complete(work, here, monkeypatch, capsys):
    """A kill between the two would otherwise cost the whole run."""
    words, written = argv(work, "late", **RUN | {"keep_checkpoints": False}), training.write_json

    def write(path, content):
        if content.get("complete"):
            raise KeyboardInterrupt
        written(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", write)
        with pytest.raises(KeyboardInterrupt):
            here(words)
    here(words)
    assert "continuing from" in capsys.readouterr().out and not list((work / "late").glob("checkpoint-*"))


# What is refused


def test_long_prompts_are_skipped_and_listed(work, here):
    here(argv(work, "skipping", max_input_length=70, rollout_batch_size=2, batch_size=4, max_rollouts=1))
    skipped = read_jsonl(work / "skipping.skipped.jsonl")
    assert 0 < len(skipped) < 12 and all("more than 70" in entry["reason"] for entry in skipped)
    assert read_json(work / "skipping.manifest.json")["counts"]["prompts"] == 12 - len(skipped)


WRONG = {
    "nothing scores": {"reward_function": ...},
    "batch_size 3": {"batch_size": 3},
    "does not divide by 1 process × micro_batch_size 3": {"micro_batch_size": 3},
    "generation_batch_size 1 is below": {"generation_batch_size": 1},
    "top_p 0.0 must be above 0": {"top_p": 0.0},
    "gae_lambda 1.5": {"gae_lambda": 1.5},
    "kl_coef -1": {"kl_coef": -1.0},
    "temperature 0.0 must be above 0": {"temperature": 0.0},
    "lr_scheduler_type constant has no warm-up": {"lr_scheduler_type": "constant", "warmup_steps": 3},
    "warmup_steps 7 is more than the 6 optimizer steps": {"warmup_steps": 7},
    "kl_target steers": {"kl_target": 3.0, "kl_coef": 0.0},
    "no such reward function file": {"reward_function": "nowhere.py:f"},
    "lr_scheduler_type: 'cosin' is not one of": {"lr_scheduler_type": "cosin"},
    "report_to nothing": {"report_to": ["nothing"]},
    "needs --reward_weights|need --reward_weights": {"reward_name_or_path": ["RM"]},
    "model_name_or_path ./nowhere": {"model_name_or_path": "./nowhere"},
    "is the model .* itself": {"output_dir": "POLICY"},
    "12 prompts .* for rollouts of 16": {"rollout_batch_size": 16, "batch_size": 32},
    "has 512 positions": {"max_input_length": 510},
    "has another vocabulary": {"critic_name_or_path": "RM_CHATML"},
    "no such input|no such prompt": {"dataset_name_or_path": ["./nowhere.jsonl"]},
    "cannot write": {"output_dir": "FILE/model"},
    "is a file, a folder was expected": {"output_dir": "FILE"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_end_with_one_clear_line(work, here, message):
    (work / "file").write_text("")
    places = {
        "RM": work / "rm",
        "RM_CHATML": work / "rm_chatml",
        "POLICY": work / "policy",
        "FILE": work / "file",
    }

    def there(value):
        if isinstance(value, list):
            return [there(v) for v in value]
        name, slash, rest = str(value).partition("/")
        return f"{places[name]}{slash}{rest}" if name in places else value

    with pytest.raises(UserError, match=message) as error:
        here(argv(work, "wrong", **{key: there(value) for key, value in WRONG[message].items()}))
    assert all("\n" not in line for line in str(error.value).split("\nerror: "))  # more of them, a line each


def test_a_policy_without_a_template_or_under_another_vocabulary_size_is_refused(work, here):
    AutoModelForCausalLM.from_pretrained(work / "policy").save_pretrained(work / "bare")
    tokenizer = AutoTokenizer.from_pretrained(work / "policy")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(work / "bare")
    with pytest.raises(UserError, match="has no chat template: give one with --chat_template FILE"):
        here(argv(work, "wrong", model_name_or_path=str(work / "bare")))
    micro.make_reward_model(work / "small", vocab_size=261)
    with pytest.raises(UserError, match="261 embeddings, the policy's tokens need 262|token"):
        here(argv(work, "wrong", critic_name_or_path=str(work / "small")))


def test_one_response_a_prompt_is_refused_where_responses_are_compared(work, here):
    """`auto` knows a pair-preference model by its published name; alone each response would score 0.5, for
    the whole run.
    """
    name = str(micro.make_pair_preference(work / "pair-preference-model-x"))
    for kind in ("auto", "pair_preference"):
        with pytest.raises(
            UserError, match="compares the responses of a prompt: give samples_per_prompt 2 or more"
        ):
            here(
                argv(
                    work,
                    "wrong",
                    reward_name_or_path=[name],
                    reward_type=[kind],
                    reward_function=...,
                    samples_per_prompt=1,
                )
            )


def test_a_second_run_into_the_same_folder_is_refused_and_sharding_too(work, here, monkeypatch):
    with Training(work / "locked", "", {}, {}).locked():
        with pytest.raises(UserError, match="another process is training into"):
            here(argv(work, "locked"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DEEPSPEED would cut them up: launch it with configs/ddp.yaml"):
        here(argv(work, "locked"))


def test_the_command_line_answers_at_once(work):
    for words, status, said in (
        (["--help"], 0, "--kl_coef"),
        (["--kl_coeff", "1"], 2, "did you mean '--kl_coef'"),
    ):
        begun = time.monotonic()
        process = begin(words)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == status and said in out, out
        assert "Traceback" not in out and time.monotonic() - begun < 20


def test_settings_are_read_without_anything_heavy():
    """The loop imports both backends to resolve a section."""
    asks = "import sys, ppo.train_ppo, ppo.openrlhf.run_openrlhf; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "False", loaded.stderr


def test_the_tiny_config_is_accepted():
    path = ROOT / "configs" / "train_ppo_tiny.yaml"
    args = ppo.arguments(read_yaml(path), path.name)
    assert args.kl_coef > 0 and f"ppo/train_ppo.py configs/{path.name}" in path.read_text()
