"""evaluation/divergence.py: the KL of an iterate against plain forward passes in float64, and what it leaves
and refuses.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.chat import ChatTemplate
from common.cli import UserError
from common.manifest import write_json
from evaluation import divergence, kl
from evaluation.logps import Policy
from evaluation.metrics import mean_and_error

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evaluation/divergence.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(policy, reference): alike, but for their weights."""
    folder, more = tmp_path_factory.mktemp("models"), {"initializer_range": 0.15}
    seeds = {"policy": 1, "reference": 2}
    return [micro.make_policy(folder / name, seed=seed, **more) for name, seed in seeds.items()]


def answers(path, count=9, K=4, ids=True):
    """A generated file with alike beginnings, an empty response, one cut off, several turns; returns its
    records.
    """
    rows, tokenizer = [], micro.make_tokenizer()
    end = [ChatTemplate(tokenizer).end_of_turn()]
    for i in range(count):
        prompt = [{"role": "user", "content": f"Question {i}?"}]
        if i % 3 == 2:
            prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *prompt]
        responses = [f"Answer {i}", f"Answer {i}{'x' * i}", "Other " * (i % 4 + 1) + "end", f"{i}"][:K]
        reasons = ["stop"] * K
        if i == 1:
            responses[0] = ""
        if i == 4:
            reasons[1] = "length"
        if i == 5:
            responses, reasons = [f"the same {i}"] * K, ["stop"] * K
        rows.append({"id": f"p{i}", "prompt": prompt, "responses": responses, "finish_reasons": reasons})
        if ids:
            own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses]
            own = [ids + end * (reason == "stop") for ids, reason in zip(own, reasons, strict=True)]
            rows[-1] |= {
                "prompt_token_ids": ChatTemplate(tokenizer).encode(prompt, True),
                "response_token_ids": own,
            }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def arguments(models, path, output, *more):
    given = {"dataset_name_or_path": path, "model_name_or_path": models[0], "output_dir": output}
    given["ref_model_name_or_path"] = models[1]
    return [*(str(word) for name, value in given.items() for word in (f"--{name}", value)), *more]


@pytest.fixture
def run(monkeypatch, capsys):
    """Start the script in this process; gives (its estimates, its records, what it says)."""
    torch.set_num_threads(1)

    def start(models, path, output, *more):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["divergence.py", *arguments(models, path, output, *more)])
        divergence.main()
        return *made(output), capsys.readouterr().out

    return start


def made(output):
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    return json.loads(output.with_suffix(".json").read_text()), entries


def plain(folder, rows, temperature=1.0):
    """Log-probabilities of each response's tokens, {id: K lists}: one sequence at a time, in float64."""
    more = {"dtype": torch.float64, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    found = {}
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        found[row["id"]] = []
        for response, reason in zip(row["responses"], row["finish_reasons"], strict=True):
            ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [end] * (reason == "stop")
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0] / temperature
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
            found[row["id"]].append(logps.tolist())
    return found


@pytest.mark.parametrize(
    "more, temperature",
    [((), 1.0), (("--share_prompts", "false"), 1.0), (("--temperature", "0.7", "--batch_tokens", "60"), 0.7)],
)
def test_it_is_that_of_plain_passes_in_float64(models, run, tmp_path, more, temperature):
    rows = answers(tmp_path / "answers.jsonl")
    summary, entries, _ = run(models, tmp_path / "answers.jsonl", tmp_path / "divergence.jsonl", *more)
    ours, theirs = (plain(folder, rows, temperature) for folder in models)
    assert [entry["id"] for entry in entries] == [row["id"] for row in rows]
    kl, k3, total, tokens = [], [], 0.0, 0
    for entry in entries:
        a, b = ours[entry["id"]], theirs[entry["id"]]
        ratios = [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]
        want = [sum(math.exp(-r) - 1 + r for r in one) for one in ratios]
        assert entry["tokens"] == [len(one) for one in a]
        assert entry["logps"] == pytest.approx([sum(one) for one in a], abs=2e-4)
        assert entry["ref_logps"] == pytest.approx([sum(one) for one in b], abs=2e-4)
        assert entry["k3"] == pytest.approx(want, abs=2e-4, rel=1e-4)
        kl.append(statistics.fmean(map(sum, ratios)))
        k3.append(statistics.fmean(want))
        total, tokens = total + sum(map(sum, ratios)), tokens + sum(map(len, a))
    assert summary["kl"] == pytest.approx(statistics.fmean(kl), abs=1e-3)
    assert summary["k3"] == pytest.approx(statistics.fmean(k3), rel=1e-3)
    assert summary["kl_se"] == pytest.approx(statistics.stdev(kl) / len(kl) ** 0.5, rel=1e-3)
    assert summary["kl_per_token"] == pytest.approx(total / tokens, abs=1e-4) and summary["tokens"] == tokens
    names = ("responses", "prompts", "left_out", "temperature")
    assert [summary[name] for name in names] == [36, 9, 0, temperature]
    assert summary["exact"] and summary["estimator"] == "k1" and abs(summary["kl"]) > 0.1


@pytest.mark.parametrize("share", ["true", "false"])
def test_a_pass_that_a_gpu_cannot_hold_is_halved(models, run, card, tmp_path, share):
    answers(tmp_path / "answers.jsonl")
    how = ("--share_prompts", share)
    _, whole, _ = run(models, tmp_path / "answers.jsonl", tmp_path / "whole.jsonl", *how)
    passes = card(200)
    _, found, said = run(models, tmp_path / "answers.jsonl", tmp_path / "halved.jsonl", *how)
    assert [entry["logps"] for entry in found] == [pytest.approx(e["logps"], abs=2e-4) for e in whole]
    # One line for each that did not fit; each of the two models finds out for itself.
    assert 2 <= said.count("out of memory with") == sum(size > 200 for size in passes)
    card(30)
    with pytest.raises(UserError, match="one sequence of .. tokens: nothing is cut here.*more free memory"):
        run(models, tmp_path / "answers.jsonl", tmp_path / "none.jsonl", *how)


def test_samples_of_the_policy_itself_give_its_kl(models, tmp_path):
    """With many samples the estimates come near the KL that is summed over the whole vocabulary along the
    answers.
    """
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in models)
    prompt = [{"role": "user", "content": "Go"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p, q = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (policy, reference))
    true = float((p.exp() * (p - q)).sum())  # of answers of one token
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(p.exp(), 4000, replacement=True, generator=generator)
    ratios = (p - q)[draws].tolist()
    mean, error = mean_and_error(ratios)
    entries = [
        {"tokens": [1], "logps": [r], "ref_logps": [0.0], "k3": [math.exp(-r) - 1 + r]} for r in ratios
    ]
    found = kl.summarise(entries, {})
    assert found["kl"] == pytest.approx(mean, abs=1e-5) and abs(found["kl"] - true) < 4 * error
    assert abs(found["k3"] - true) < 4 * found["k3_se"]


def test_of_a_model_to_itself_it_is_nothing(models, run, tmp_path):
    """By name without computing it; as a copy, computed, exactly."""
    answers(tmp_path / "answers.jsonl")
    summary, entries, _ = run([models[0]] * 2, tmp_path / "answers.jsonl", tmp_path / "same.jsonl")
    assert summary["kl"] == summary["kl_se"] == 0.0 and summary["responses"] == 0
    assert "one model" in summary["estimator"] and len(entries) == 9
    copy = micro.make_policy(tmp_path / "copy", seed=1, initializer_range=0.15)
    summary, _, _ = run((models[0], copy), tmp_path / "answers.jsonl", tmp_path / "to_copy.jsonl")
    assert summary["kl"] == summary["k3"] == 0.0 and summary["responses"] == 36


def test_in_bf16_k3_is_rounding_and_not_shown(models, run, tmp_path):
    """Equal weights on both sides, computed in other layouts: kl is nothing within its error, k3 would be
    something, always above 0.
    """
    answers(tmp_path / "answers.jsonl", 3)
    ids = torch.randint(3, 250, (6, 60), generator=torch.Generator().manual_seed(0)).tolist()
    groups, found = [(prompt[:20], [prompt[20:40], prompt[40:]]) for prompt in ids], []
    strong = micro.make_policy(tmp_path / "strong", num_hidden_layers=6, initializer_range=0.4)
    for share in (True, False):
        policy = Policy(str(strong), 1.0, dtype="bfloat16", share_prompts=share)
        policy.load()
        with torch.no_grad():
            logps = sorted(policy.logps(groups))
        found.append([value for _, group in logps for one in group for value in one])
    ratios = [a - b for a, b in zip(*found, strict=True)]
    mean, error = mean_and_error(ratios)
    k3, k3_error = mean_and_error([math.exp(-r) - 1 + r for r in ratios])
    assert abs(mean) < 5 * error and k3 > 2 * k3_error
    more = ("--dtype", "bfloat16")
    summary, entries, _ = run(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", *more)
    assert summary["k3"] is summary["k3_se"] is summary["k3_per_token"] is None
    assert "--dtype float32" in summary["k3_null"]
    assert summary["kl"] is not None and summary["kl_se"] > 0
    assert {value for entry in entries for value in entry["k3"]} == {None}


def test_two_processes_find_what_one_finds(models, run, tmp_path):
    answers(tmp_path / "answers.jsonl", 13)
    more = ("--chunk_records", "5")
    one, _, _ = run(models, tmp_path / "answers.jsonl", tmp_path / "one.jsonl", *more)
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --main_process_port 0"
    given = arguments(models, tmp_path / "answers.jsonl", tmp_path / "two.jsonl", *more)
    command = [sys.executable, *launch.split(), SCRIPT, *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    two, _ = made(tmp_path / "two.jsonl")
    del one["seconds"], two["seconds"]
    assert two == pytest.approx(one, abs=1e-4)


def test_a_killed_one_continues(models, run, tmp_path, monkeypatch):
    answers(tmp_path / "answers.jsonl")
    given = models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", "--chunk_records", "2"
    true, passes = Policy.logps, []

    def dies(self, groups):
        passes.append(self.name)
        if len(passes) == 7:  # in the second model
            raise KeyboardInterrupt
        return true(self, groups)

    monkeypatch.setattr(Policy, "logps", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*given)
    assert not (tmp_path / "d.jsonl").exists() and not (tmp_path / "d.json").exists()
    summary, entries, _ = run(*given)
    assert len(passes) == 7 + 4 and set(passes[7:]) == {str(models[1])}
    run(*given)  # nothing is left
    (tmp_path / "d.json").unlink()
    assert run(*given)[0] == summary and len(passes) == 11  # but to write it again
    _, whole, _ = run(models, tmp_path / "answers.jsonl", tmp_path / "whole.jsonl")
    for one, other in zip(entries, whole, strict=True):
        assert one["id"] == other["id"]
        assert one["logps"] == pytest.approx(other["logps"], abs=1e-3)
        assert one["k3"] == pytest.approx(other["k3"], abs=1e-3)


def sampled(path, **settings):
    """Leave the manifest of the generation of a file's answers."""
    manifest = {"script": "generation/get_hf2.py", "settings": settings, "inputs": {}}
    write_json(path.with_suffix(".manifest.json"), manifest)


def test_temperature_is_read_off_the_manifests_and_greedy_answers_are_refused(models, run, tmp_path):
    answers(tmp_path / "g.jsonl")
    answers(tmp_path / "r.jsonl")
    sampled(tmp_path / "g.jsonl", temperature=0.6, top_p=0.9, top_k=-1)
    inputs = {"dataset_name_or_path": {"path": str(tmp_path / "g.jsonl")}}
    write_json(tmp_path / "r.manifest.json", {"settings": {}, "inputs": inputs})
    known = divergence.Arguments(str(tmp_path / "r.jsonl"), *map(str, models), str(tmp_path / "o.jsonl"))
    assert divergence.sampling(known) == {"temperature": 0.6, "top_p": 0.9, "top_k": -1}
    sampled(tmp_path / "g.jsonl", temperature=0.0)
    with pytest.raises(UserError, match="sampled at temperature 0: a KL is estimated"):
        divergence.check(known)
    sampled(tmp_path / "g.jsonl", temperature=1.0, top_p=0.9)
    summary, _, told = run(models, tmp_path / "g.jsonl", tmp_path / "biased.jsonl")
    assert "biased" in told and not summary["exact"]


def test_what_else_was_sampled_is_not_exact_and_a_mixture_is_refused(models, run, tmp_path):
    """A stop string only ends what is sampled; min_p changes it."""
    path = tmp_path / "g.jsonl"
    answers(path)
    stop, more, fp8 = {"stop": ["x"]}, {"min_p": 0.1}, {"quantization": "fp8"}
    for k, (given, exact) in enumerate(
        [({"sampling_args": stop}, True), ({"sampling_args": more}, False), ({"engine_args": fp8}, False)]
    ):
        sampled(path, temperature=1.0, **given)
        summary, _, told = run(models, path, tmp_path / f"{k}.jsonl")
        assert summary["exact"] == exact and ("biased" in told) != exact
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sources = [{"response_sources": [{"temperature": 1.0}] * len(row["responses"])} for row in rows]
    path.write_text("".join(json.dumps(row | more) + "\n" for row, more in zip(rows, sources)))
    with pytest.raises(UserError, match="holds responses of a mixture"):
        run(models, path, tmp_path / "mixed.jsonl")


@pytest.mark.parametrize(
    "more, named",
    [
        (("--dataset_name_or_path", "nowhere.jsonl"), "no such generated file"),
        (("--model_name_or_path", "./nowhere"), "no such folder"),
        (("--output_dir", "divergence.json"), "ends in .jsonl"),
        (("--temprature", "1"), "did you mean"),
    ],
)
def test_refusals_are_one_line(models, run, tmp_path, more, named):
    answers(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match=named) as caught:
        run(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", *more)
    assert "\n" not in str(caught.value)


def test_other_vocabularies_and_longer_answers_than_the_context(models, run, tmp_path):
    rows = answers(tmp_path / "answers.jsonl", 3)
    other = micro.make_policy(tmp_path / "other", family="chatml")
    with pytest.raises(UserError, match="different vocabularies"):
        run((models[0], other), tmp_path / "answers.jsonl", tmp_path / "d.jsonl")
    rows[1]["responses"][2] = "long " * 200
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, _, told = run(models, tmp_path / "long.jsonl", tmp_path / "long_d.jsonl")
    assert summary["left_out"] == 1 and summary["responses"] == 11 and "1 responses left out" in told


def test_text_alone_is_tokenised_as_it_was_sampled_and_not_called_exact(models, run, tmp_path):
    rows = answers(tmp_path / "ids.jsonl", 4)
    del rows[0]["prompt_token_ids"], rows[0]["response_token_ids"]
    rows[0]["num_tokens"] = [99, 9, 17, 2]  # of "Answer 0" others than were sampled
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, _, told = run(models, tmp_path / "text.jsonl", tmp_path / "text_d.jsonl")
    assert (summary["from_text"], summary["exact"]) == (4, False)
    assert "4 responses have no token ids" in told and "biased" not in told
    assert summary["retokenised"] == sum(a != b for a, b in zip(rows[0]["num_tokens"], (9, 9, 10, 2)))


def test_an_interrupt_ends_it_with_a_word(models, tmp_path):
    answers(tmp_path / "answers.jsonl", 400)
    given = arguments(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", "--chunk_records", "1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, SCRIPT, *given], **pipes)
    until = time.monotonic() + 120
    partial = tmp_path / "d.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start the same command again" in errors and "Traceback" not in errors
