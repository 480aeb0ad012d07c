"""ppo/train_ppo.py as a person starts it, on micro models: what it computes, what it learns, stopped,
continued, refused.
"""

import json
import math
import os
import shutil
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
from common.cli import UserError, build
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


def reset():
    """As at the start of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)


@pytest.fixture
def here(monkeypatch):
    """Start train_ppo.py in this process."""

    def go(words):
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", *words])
        reset()
        ppo.main()

    return go


def make(work, precision="no", **more):
    """A PPO object in this process, without a launcher."""
    from accelerate import Accelerator

    reset()
    args = build(ppo.Arguments, settings(work, "unused", **more))
    return ppo.PPO(args, Accelerator(cpu=True, mixed_precision=precision))


def begin(words, launcher=()):
    hidden = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, *words],
        cwd=ROOT,
        env=env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
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


def test_the_value_model_starts_as_the_reward_model(work, capsys):
    it = make(work, reward_name_or_path=[str(work / "rm")], reward_function=...)
    assert f"value model: from {work / 'rm'}, head and all" in capsys.readouterr().out
    rows, _ = it.rollout(1)
    end = it.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for row, text in zip(rows, ("", "a", "Paris is it.", "bb", "no", "x y", "z", "a longer answer")):
        row["response"] = [*it.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        record = next(p for p in it.prompts if p["ids"] == row["prompt"])
        row |= {"text": text, "cut": False, "record": record}
    it.score(rows)
    for row in rows:  # one token more, so that the value behind the last token is among those given out
        inputs, responses, _ = ppo.padded([row | {"response": row["response"] + [0]}], it.pad, "cpu")
        with torch.no_grad():
            value = ppo.values_of(it.critic, inputs, responses)[0, -1].item()
        assert value == pytest.approx(row["score"], abs=1e-4)
    assert len({row["score"] for row in rows}) == len(rows)


def test_another_vocabulary_scores_texts_and_the_value_model_starts_from_the_policy(work, capsys):
    it = make(work, reward_name_or_path=[str(work / "rm_chatml")], reward_weights=[0.5, 2.0])
    told = f"value model: from {work / 'policy'}, the policy, with a new head that says 0"
    assert told in capsys.readouterr().out
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


# What is learned


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


@pytest.fixture(scope="module")
def undisturbed(work):
    """A run from start to end, in this process."""
    reset()
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
    model, start = AutoModelForCausalLM.from_pretrained(undisturbed), work / "policy"
    for name in ("generation_config.json", "config.json"):
        assert read_json(undisturbed / name) == read_json(start / name)
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (undisturbed, start)]
    assert templates[0] == templates[1] and (undisturbed / "preprocessor_config.json").is_file()
    assert GenerationConfig.from_pretrained(undisturbed).eos_token_id == model.generation_config.eos_token_id
    before, after = weights(start), weights(undisturbed)
    assert set(after) == set(before) and "lm_head.weight" not in after  # a tied head is no weight of its own
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3
    manifest = read_json(work / "undisturbed.manifest.json")
    assert manifest["complete"] and manifest["settings"]["clip"] == 0.2
    assert manifest["counts"] == {"prompts": 12, "skipped": 0, "rollouts": 6, "responses": 48}
    assert {"model_name_or_path", "dataset_name_or_path 1", "reward_function"} <= manifest["inputs"].keys()
    assert [f.name for f in sorted(undisturbed.glob("checkpoint-*"))] == ["checkpoint-5", "checkpoint-6"]
    assert list((undisturbed / "runs").rglob("events.out.tfevents.*"))
    assert not (work / "undisturbed.lock").exists()


def test_each_rollout_is_logged(work, undisturbed):
    log = read_jsonl(work / "undisturbed.log.jsonl")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6] and log[-1]["episode"] == 2
    wanted = (
        "reward reward_less_kl kl entropy response_length truncated_fraction policy_loss value_loss "
        "clip_fraction approx_kl ratio explained_variance kl_coef policy_learning_rate critic_learning_rate "
        "policy_grad_norm critic_grad_norm tokens_per_second seconds"
    )
    assert all(set(wanted.split()) <= entry.keys() for entry in log)
    assert log[0]["kl"] == 0 and log[1]["kl"] != 0
    for old, new in zip(log, log[1:]):  # the controller of kl_target
        assert new["kl_coef"] == pytest.approx(ppo.steer(old["kl_coef"], old["kl"], 0.05, 20, 8), rel=1e-12)
    assert log[0]["policy_learning_rate"] > log[-1]["policy_learning_rate"]  # cosine
    assert 5.0 < log[0]["entropy"] < math.log(288) and 1 <= log[0]["response_length"] <= 6


def test_a_finished_run_is_left_alone_and_another_setting_is_refused(work, undisturbed, here, capsys):
    stamp = (undisturbed / "model.safetensors").stat().st_mtime_ns
    here(argv(work, "undisturbed", **RUN))
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == stamp
    here(argv(work, "undisturbed", **RUN, micro_batch_size=1))  # mere speed
    with pytest.raises(UserError, match="kl_horizon was 20 and is now 30.*--overwrite"):
        here(argv(work, "undisturbed", **RUN | {"kl_horizon": 30}))


def test_a_run_that_dies_on_its_way_ends_with_the_same_weights(work, undisturbed, here, monkeypatch, capsys):
    """After its second checkpoint, with a rollout beyond it in the log."""
    saved, words = ppo.save, argv(work, "died", **RUN)

    def save(it):
        if it.done == 3:
            raise KeyboardInterrupt
        saved(it)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save", save)
        with pytest.raises(KeyboardInterrupt):
            here(words)
    assert not (work / "died" / "model.safetensors").exists()
    here(words)
    assert f"continuing from {work / 'died' / 'checkpoint-2'}" in capsys.readouterr().out
    equal(weights(undisturbed), weights(work / "died"))
    assert without_seconds(work / "died.log.jsonl") == without_seconds(work / "undisturbed.log.jsonl")
    one, other = (
        torch.load(work / run / "checkpoint-6" / "state.pt", weights_only=True)
        for run in ("undisturbed", "died")
    )
    for name in ("policy", "critic"):
        equal(one[name][0], other[name][0])
        assert str(one[name][2]) == str(other[name][2])


def test_without_a_value_model_nothing_is_left_or_logged_of_one(work, here, capsys):
    words = argv(work, "group_norm", **RUN | {"report_to": ["none"]}, advantage_estimator="group_norm")
    here(words)
    said = capsys.readouterr().out
    assert "value model: from" not in said and "explained" not in said
    [*_, last] = read_jsonl(work / "group_norm.log.jsonl")
    assert last["step"] == 6 and not {"value_loss", "explained_variance", "critic_grad_norm"} & last.keys()
    state = torch.load(work / "group_norm" / "checkpoint-6" / "state.pt", weights_only=True)
    assert state.keys() == {"policy"}


def test_two_processes_train_what_one_does(work, undisturbed):
    launcher = "-m accelerate.commands.launch --config_file configs/ddp.yaml --num_processes 2"
    launcher = [*launcher.split(), "--main_process_port", "0"]
    process = begin(argv(work, "two", **RUN, micro_batch_size=1), launcher)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    equal(weights(undisturbed), weights(work / "two"), atol=2e-5)
    logs = [without_seconds(work / f"{run}.log.jsonl") for run in ("undisturbed", "two")]
    for one, two in zip(*logs):
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


@pytest.fixture
def unfinished(work, undisturbed):
    """A function that copies the finished run as it was before its model was saved; returns its arguments."""

    def copy(name, **more):
        shutil.copytree(undisturbed, work / name)
        shutil.copy(work / "undisturbed.log.jsonl", work / f"{name}.log.jsonl")
        (work / name / "model.safetensors").unlink()
        manifest = read_json(work / "undisturbed.manifest.json") | {"complete": False}
        (work / f"{name}.manifest.json").write_text(json.dumps(manifest))
        return argv(work, name, **RUN | more)

    return copy


DAMAGE = {
    "half a state": lambda folder: os.truncate(folder / "state.pt", 1000),
    "half a note": lambda folder: os.truncate(folder / "trainer_state.json", 5),
    "an empty note": lambda folder: (folder / "trainer_state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_an_older_one(work, undisturbed, unfinished, here, capsys, damage):
    name = damage.replace(" ", "_")
    words, log = unfinished(name), work / f"{name}.log.jsonl"
    DAMAGE[damage](work / name / "checkpoint-6")
    torn = '\n{"step": 5, "rew'  # what a loss of power leaves
    log.write_text("\n".join(log.read_text().split("\n")[:4]) + torn)
    here(words)
    assert f"continuing from {work / name / 'checkpoint-5'}" in capsys.readouterr().out
    equal(weights(undisturbed), weights(work / name))
    assert [entry["step"] for entry in read_jsonl(log)] == [1, 2, 3, 4, 6]


def test_checkpoints_of_which_none_can_be_read_are_not_passed_over_in_silence(work, unfinished, here):
    words = unfinished("unreadable")
    for state in (work / "unreadable").glob("checkpoint-*/state.pt"):
        os.truncate(state, 1000)
    with pytest.raises(UserError, match="checkpoint-5 cannot be read .*nor is there an older .*overwrite"):
        here(words)
    for note in (work / "unreadable").glob("checkpoint-*/trainer_state.json"):
        os.truncate(note, 5)
    with pytest.raises(UserError, match="checkpoint-. cannot be read .*trainer_state.json is damaged"):
        here(words)


def test_checkpoints_stay_until_the_model_is_known_to_be_complete(
    work, unfinished, here, monkeypatch, capsys
):
    """A kill between the two would otherwise cost the whole run."""
    words, written = unfinished("late", keep_checkpoints=False), training.write_json

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
    "does not divide by 1 process × micro_batch_size 3": {"micro_batch_size": 3},
    "generation_batch_size 1 is below": {"generation_batch_size": 1},
    "gae_lambda 1.5": {"gae_lambda": 1.5},
    "lr_scheduler_type constant has no warm-up": {"lr_scheduler_type": "constant", "warmup_steps": 3},
    "warmup_steps 7 is more than the 6 optimizer steps": {"warmup_steps": 7},
    "needs --reward_weights|need --reward_weights": {"reward_name_or_path": ["RM"]},
    "is the model .* itself": {"output_dir": "POLICY"},
    "12 prompts for rollouts of 16": {"rollout_batch_size": 16, "batch_size": 32},
    "has 512 positions": {"max_input_length": 510},
    "advantage_estimator rloo has no value model": {
        "critic_name_or_path": "RM",
        "advantage_estimator": "rloo",
    },
    "advantage_estimator rloo compares": {"advantage_estimator": "rloo", "samples_per_prompt": 1},
    "has another vocabulary": {"critic_name_or_path": "RM_CHATML"},
    "no such input|no such prompt": {"dataset_name_or_path": ["./nowhere.jsonl"]},
    "cannot write": {"output_dir": "FILE/model"},
    "is a file, a folder was expected": {"output_dir": "FILE"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_end_with_one_clear_line(work, here, message):
    (work / "file").write_text("")
    names = {"RM": "rm", "RM_CHATML": "rm_chatml", "POLICY": "policy", "FILE": "file"}
    places = {name: work / folder for name, folder in names.items()}

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
    more = {"reward_name_or_path": [name], "reward_function": ..., "samples_per_prompt": 1}
    for kind in ("auto", "pair_preference"):
        with pytest.raises(UserError, match="compares the responses of a prompt: give samples_per_prompt 2"):
            here(argv(work, "wrong", reward_type=[kind], **more))


def test_a_second_run_into_the_same_folder_is_refused_and_sharding_too(work, here, monkeypatch):
    with Training(work / "locked", "", {}, {}).locked():
        with pytest.raises(UserError, match="another process is training into"):
            here(argv(work, "locked"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DEEPSPEED would cut them up: launch it with configs/ddp.yaml"):
        here(argv(work, "locked"))


def test_settings_are_read_without_anything_heavy():
    """The loop imports both backends to resolve a section."""
    asks = "import sys, ppo.train_ppo, ppo.openrlhf.run_openrlhf; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "False", loaded.stderr
