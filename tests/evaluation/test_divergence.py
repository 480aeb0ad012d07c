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

from common import chat
from common.cli import UserError
from common.manifest import write_json
from evaluation import divergence

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evaluation/divergence.py"
MADE = "generation/get_hf2.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(policy, reference): alike, but for their weights."""
    folder = tmp_path_factory.mktemp("models")
    return micro.make_policy(folder / "policy", seed=1, initializer_range=0.15), micro.make_policy(
        folder / "reference", seed=2, initializer_range=0.15
    )


def answers(path, count=9, K=4, ids=True):
    """A generated file with alike beginnings, an empty response, one cut off, several turns; returns its
    records.
    """
    rows, tokenizer = [], micro.make_tokenizer()
    end = [chat.end_of_turn(tokenizer)]
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
            own = [
                tokenizer(text, add_special_tokens=False)["input_ids"] + end * (reason == "stop")
                for text, reason in zip(responses, reasons)
            ]
            rows[-1] |= {"prompt_token_ids": chat.encode(tokenizer, prompt, True), "response_token_ids": own}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def run(*arguments, status=0, launch=(sys.executable,)):
    process = subprocess.run(
        [*launch, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == status, process.stdout + process.stderr
    return process


def arguments(models, path, output, *more):
    return [
        "--dataset_name_or_path",
        path,
        "--model_name_or_path",
        models[0],
        "--ref_model_name_or_path",
        models[1],
        "--output_dir",
        output,
        *more,
    ]


def plain(folder, rows, temperature=1.0):
    """Log-probabilities of each response's tokens, {id: K lists}: one sequence at a time, in float64."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager"),
        AutoTokenizer.from_pretrained(folder),
    )
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    found = {}
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        found[row["id"]] = []
        for response, reason in zip(row["responses"], row["finish_reasons"], strict=True):
            ids = tokenizer(response, add_special_tokens=False)["input_ids"] + (
                [end] if reason == "stop" else []
            )
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0] / temperature
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
            found[row["id"]].append(logps.tolist())
    return found


@pytest.mark.parametrize(
    "more, temperature",
    [((), 1.0), (("--share_prompts", "false"), 1.0), (("--temperature", "0.7", "--batch_tokens", "60"), 0.7)],
)
def test_it_is_that_of_plain_passes_in_float64(models, tmp_path, more, temperature):
    rows = answers(tmp_path / "answers.jsonl")
    run(*arguments(models, tmp_path / "answers.jsonl", tmp_path / "divergence.jsonl", *more))
    ours, theirs = (plain(folder, rows, temperature) for folder in models)
    entries = [json.loads(line) for line in (tmp_path / "divergence.jsonl").read_text().splitlines()]
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
    summary = json.loads((tmp_path / "divergence.json").read_text())
    assert summary["kl"] == pytest.approx(statistics.fmean(kl), abs=1e-3) and summary["k3"] == pytest.approx(
        statistics.fmean(k3), rel=1e-3
    )
    assert summary["kl_se"] == pytest.approx(statistics.stdev(kl) / len(kl) ** 0.5, rel=1e-3)
    assert summary["kl_per_token"] == pytest.approx(total / tokens, abs=1e-4) and summary["tokens"] == tokens
    assert (summary["responses"], summary["prompts"], summary["left_out"], summary["temperature"]) == (
        36,
        9,
        0,
        temperature,
    )
    assert summary["exact"] and summary["estimator"] == "k1" and abs(summary["kl"]) > 0.1


def test_samples_of_the_policy_itself_give_its_kl(models, tmp_path):
    """With many samples the estimates come near the KL that is summed over the whole vocabulary along the
    answers.
    """
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in models)
    prompt = [{"role": "user", "content": "Go"}]
    ids = tokenizer(
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    )["input_ids"]
    with torch.no_grad():
        p, q = (
            model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for model in (policy, reference)
        )
    true = float((p.exp() * (p - q)).sum())  # of answers of one token
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(p.exp(), 4000, replacement=True, generator=generator)
    ratios = (p - q)[draws].tolist()
    mean, error = divergence.mean_and_error(ratios)
    entries = [
        {"tokens": [1], "logps": [r], "ref_logps": [0.0], "k3": [math.exp(-r) - 1 + r]} for r in ratios
    ]
    found = divergence.summarise(entries, {})
    assert found["kl"] == pytest.approx(mean, abs=1e-5) and abs(found["kl"] - true) < 4 * error
    assert abs(found["k3"] - true) < 4 * found["k3_se"]


def test_of_a_model_to_itself_it_is_nothing(models, tmp_path):
    """By name without computing it; as a copy, computed, exactly."""
    answers(tmp_path / "answers.jsonl")
    run(*arguments((models[0], models[0]), tmp_path / "answers.jsonl", tmp_path / "same.jsonl"))
    summary = json.loads((tmp_path / "same.json").read_text())
    assert (
        summary["kl"] == summary["kl_se"] == 0.0
        and summary["responses"] == 0
        and "one model" in summary["estimator"]
    )
    assert len((tmp_path / "same.jsonl").read_text().splitlines()) == 9
    copy = micro.make_policy(tmp_path / "copy", seed=1, initializer_range=0.15)
    run(*arguments((models[0], copy), tmp_path / "answers.jsonl", tmp_path / "copy.jsonl"))
    summary = json.loads((tmp_path / "copy.json").read_text())
    assert summary["kl"] == summary["k3"] == 0.0 and summary["responses"] == 36


def test_in_bf16_k3_is_rounding_and_not_shown(models, tmp_path, monkeypatch):
    """Equal weights on both sides, computed in other layouts: kl is nothing within its error, k3 would be
    something, always above 0.
    """
    torch.set_num_threads(1)
    answers(tmp_path / "answers.jsonl", 3)
    ids = torch.randint(3, 250, (6, 60), generator=torch.Generator().manual_seed(0)).tolist()
    groups, found = [(prompt[:20], [prompt[20:40], prompt[40:]]) for prompt in ids], []
    strong = micro.make_policy(tmp_path / "strong", num_hidden_layers=6, initializer_range=0.4)
    for share in (True, False):
        policy = divergence.Policy(str(strong), 1.0, dtype="bfloat16", share_prompts=share)
        policy.load()
        with torch.no_grad():
            found.append(
                [value for _, group in sorted(policy.logps(groups)) for one in group for value in one]
            )
    ratios = [a - b for a, b in zip(*found, strict=True)]
    mean, error = divergence.mean_and_error(ratios)
    k3, k3_error = divergence.mean_and_error([math.exp(-r) - 1 + r for r in ratios])
    assert abs(mean) < 5 * error and k3 > 2 * k3_error
    given = arguments(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", "--dtype", "bfloat16")
    monkeypatch.setattr(sys, "argv", ["divergence.py", *map(str, given)])
    divergence.main()
    summary, entries = (
        json.loads((tmp_path / "d.json").read_text()),
        [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()],
    )
    assert (
        summary["k3"] is summary["k3_se"] is summary["k3_per_token"] is None
        and "--dtype float32" in summary["k3_null"]
    )
    assert (
        summary["kl"] is not None
        and summary["kl_se"] > 0
        and {value for entry in entries for value in entry["k3"]} == {None}
    )


def test_two_processes_find_what_one_finds(models, tmp_path):
    answers(tmp_path / "answers.jsonl", 13)
    run(*arguments(models, tmp_path / "answers.jsonl", tmp_path / "one.jsonl", "--chunk_records", 5))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    run(
        *arguments(models, tmp_path / "answers.jsonl", tmp_path / "two.jsonl", "--chunk_records", 5),
        launch=launch,
    )
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert {k: v for k, v in two.items() if k != "seconds"} == pytest.approx(
        {k: v for k, v in one.items() if k != "seconds"}, abs=1e-4
    )


def test_a_killed_one_continues(models, tmp_path, monkeypatch):
    answers(tmp_path / "answers.jsonl")
    given = [
        str(word)
        for word in arguments(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", "--chunk_records", 2)
    ]
    monkeypatch.setattr(sys, "argv", ["divergence.py", *given])
    torch.set_num_threads(1)
    true, passes = divergence.Policy.logps, []

    def dies(self, groups):
        passes.append(self.name)
        if len(passes) == 7:  # in the second model
            raise KeyboardInterrupt
        return true(self, groups)

    monkeypatch.setattr(divergence.Policy, "logps", dies)
    with pytest.raises(KeyboardInterrupt):
        divergence.main()
    assert not (tmp_path / "d.jsonl").exists() and not (tmp_path / "d.json").exists()
    divergence.main()
    assert len(passes) == 7 + 4 and set(passes[7:]) == {str(models[1])}
    run(*arguments(models, tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"))
    for one, other in zip(
        *(
            [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("d", "whole")
        ),
        strict=True,
    ):
        assert (
            one["id"] == other["id"]
            and one["logps"] == pytest.approx(other["logps"], abs=1e-3)
            and one["k3"] == pytest.approx(other["k3"], abs=1e-3)
        )
    summary = (tmp_path / "d.json").read_text()
    divergence.main()  # nothing is left
    (tmp_path / "d.json").unlink()
    divergence.main()  # but to write it anew
    assert len(passes) == 11 and json.loads((tmp_path / "d.json").read_text()) == json.loads(summary)


def test_temperature_is_read_off_the_manifests_and_greedy_answers_are_refused(models, tmp_path):
    answers(tmp_path / "g.jsonl")
    write_json(
        tmp_path / "g.manifest.json",
        {"script": MADE, "settings": {"temperature": 0.6, "top_p": 0.9, "top_k": -1}, "inputs": {}},
    )
    answers(tmp_path / "r.jsonl")
    write_json(
        tmp_path / "r.manifest.json",
        {"settings": {}, "inputs": {"dataset_name_or_path": {"path": str(tmp_path / "g.jsonl")}}},
    )
    held = divergence.Arguments(str(tmp_path / "r.jsonl"), *map(str, models), str(tmp_path / "o.jsonl"))
    assert divergence.sampling(held) == {"temperature": 0.6, "top_p": 0.9, "top_k": -1}
    write_json(tmp_path / "g.manifest.json", {"script": MADE, "settings": {"temperature": 0.0}, "inputs": {}})
    with pytest.raises(UserError, match="sampled at temperature 0: a KL is estimated"):
        divergence.check(held)
    answers(tmp_path / "b.jsonl")
    write_json(
        tmp_path / "b.manifest.json",
        {"script": MADE, "settings": {"temperature": 1.0, "top_p": 0.9}, "inputs": {}},
    )
    biased = run(*arguments(models, tmp_path / "b.jsonl", tmp_path / "biased.jsonl"))
    assert "biased" in biased.stdout and not json.loads((tmp_path / "biased.json").read_text())["exact"]


@pytest.mark.parametrize("change, named", [
    ({"--dataset_name_or_path": "nowhere.jsonl"}, "no such generated file"),
    ({"--model_name_or_path": "./nowhere"}, "no such folder"),
    ({"--output_dir": "divergence.json"}, "ends in .jsonl"),
    ({"--temprature": "1"}, "did you mean"),
])  # fmt: skip
def test_refusals_are_one_line(models, tmp_path, change, named):
    answers(tmp_path / "answers.jsonl")
    given = (
        dict(zip(*[iter(arguments(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl"))] * 2)) | change
    )
    refused = run(*(word for pair in given.items() for word in pair), status=2)
    assert named in refused.stderr and refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr


def test_other_vocabularies_and_longer_answers_than_the_context(models, tmp_path):
    rows = answers(tmp_path / "answers.jsonl", 3)
    other = micro.make_policy(tmp_path / "other", family="chatml")
    refused = run(*arguments((models[0], other), tmp_path / "answers.jsonl", tmp_path / "d.jsonl"), status=2)
    assert "different vocabularies" in refused.stderr
    rows[1]["responses"][2] = "long " * 200
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run(*arguments(models, tmp_path / "long.jsonl", tmp_path / "long_d.jsonl"))
    summary = json.loads((tmp_path / "long_d.json").read_text())
    assert summary["left_out"] == 1 and summary["responses"] == 11 and "1 responses left out" in told.stdout


def test_text_alone_is_tokenised_as_it_was_sampled_and_not_called_exact(models, tmp_path):
    rows = answers(tmp_path / "ids.jsonl", 4)
    del rows[0]["prompt_token_ids"], rows[0]["response_token_ids"]
    rows[0]["num_tokens"] = [99, 9, 17, 2]  # of "Answer 0" others than were sampled
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run(*arguments(models, tmp_path / "text.jsonl", tmp_path / "text_d.jsonl"))
    summary = json.loads((tmp_path / "text_d.json").read_text())
    assert (summary["from_text"], summary["exact"]) == (
        4,
        False,
    ) and "4 responses have no token ids" in told.stdout
    assert (
        summary["retokenised"] == sum(a != b for a, b in zip(rows[0]["num_tokens"], (9, 9, 10, 2)))
        and "biased" not in told.stdout
    )


def test_an_interrupt_ends_it_with_a_word(models, tmp_path):
    answers(tmp_path / "answers.jsonl", 400)
    process = subprocess.Popen(
        [
            sys.executable,
            SCRIPT,
            *map(
                str, arguments(models, tmp_path / "answers.jsonl", tmp_path / "d.jsonl", "--chunk_records", 1)
            ),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not ((tmp_path / "d.jsonl.partial").exists() and (tmp_path / "d.jsonl.partial").stat().st_size):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and "start the same command again" in errors and "Traceback" not in errors
    )
