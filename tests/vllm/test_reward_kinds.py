"""annotate_data/: ArmoRM, pair preference, functions and sums, each against a computation of one sequence written here."""

import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "vllm")]

import micro
from test_rewards import CPU, annotate, generated, launch, outcome, read, refused, write
from test_rewards import reference as bradley_terry

from annotate_data import preference, reward_models
from common import cli

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: micro models gain nothing from threads


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    for key, value in CPU.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "bt": micro.make_reward_model(folder / "bt"),
        "armorm": micro.make_armorm(folder / "armorm"),
        "pair-preference-model-x": micro.make_pair_preference(folder / "pair-preference-model-x"),
    }


def test_an_encoder_with_one_label_against_its_own_forward(tmp_path):
    """BERT's kind has no linear `score` on the last token: its own head is asked."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = micro.make_tokenizer("llama3")
    config = BertConfig(vocab_size=288, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=1,
                        pad_token_id=tokenizer.pad_token_id, initializer_range=0.3)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = reward_models.BradleyTerry(str(tmp_path), batch_tokens=300)
    scorer.load()
    prompt, responses = [{"role": "user", "content": "q?"}], ["yes", "", "no " * 20]
    [(_, got)] = list(scorer.score([{"prompt": prompt, "responses": responses}]))
    model, tokenizer = BertForSequenceClassification.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for response in responses:
        text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"
                       for role, content in (("user", "q?"), ("assistant", response)))  # fmt: skip
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits[0, 0].item())
    assert got["rewards"] == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.01


# ---- ArmoRM ----------------------------------------------------------------------------------------------------------


def armorm(folder, messages, response, max_length=None):
    """The published formula for one sequence: transformers' Llama and torch operations, the template typed by hand."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    llama = LlamaModel(LlamaConfig(**config, attn_implementation="eager")).float().eval()
    llama.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    text = "<|begin_of_text|>"
    for m in [*messages, {"role": "assistant", "content": response}]:
        text += f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if max_length and len(ids) > max_length:
        ids = ids[:1] + ids[len(ids) - max_length + 1 :]
    eot, header = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|start_header_id|>"])
    ends = [i for i in range(len(ids) - 1) if ids[i] == eot and ids[i + 1] == header]
    if not ends:
        return None
    with torch.no_grad():
        hidden = llama(torch.tensor([ids])).last_hidden_state[0]
        rewards = weights["regression_layer.weight"] @ hidden[-1]
        x = hidden[ends[-1]]
        for i in range(config["gating_n_hidden"]):
            x = (weights[f"gating.layers.{i}.weight"] @ x + weights[f"gating.layers.{i}.bias"]).clamp(min=0)
        i = config["gating_n_hidden"]
        x = weights[f"gating.layers.{i}.weight"] @ x + weights[f"gating.layers.{i}.bias"]
        gating = (x / config["gating_temperature"]).exp() / (x / config["gating_temperature"]).exp().sum()
        return float((gating * weights["gating.logit_scale"] * (weights["reward_transform_matrix"].T @ rewards)).sum())


@pytest.mark.parametrize("shards", [1, 3])
def test_armorm_against_the_published_formula(shards, tmp_path, monkeypatch):
    folder = micro.make_armorm(tmp_path / "rm", shards=shards)
    rows = generated(tmp_path / "gen.jsonl", 6)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder, "--batch_tokens", 700)
    expected = [armorm(folder, r["prompt"], x) for r in rows for x in r["responses"]]
    got = sum((r["rewards"] for r in out), [])
    assert got == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.5
    assert "reward_parts" not in out[0]


def test_armorm_without_its_header_is_null(models, tmp_path, monkeypatch):
    prompt = [{"role": "user", "content": "Hi"}]
    rows = [{"id": "a", "prompt": prompt, "responses": ["short", "x" * 200]}]
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", models["armorm"], "--max_length", 60)
    assert out[0]["rewards"] == [pytest.approx(armorm(models["armorm"], prompt, "short", 60), abs=1e-4), None]
    assert armorm(models["armorm"], prompt, "x" * 200, 60) is None
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert (counts["null_rewards"], counts["truncated"]) == (1, 1)


@pytest.mark.parametrize("lost", ["gating.layers.1.bias", "regression_layer.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("shards", [1, 2])
def test_armorm_with_missing_weights_is_refused(lost, shards, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    folder = micro.make_armorm(tmp_path / "rm", shards=shards)
    for path in folder.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if k != lost}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if shards > 1:
        values = json.loads(index.read_text())
        values["weight_map"].pop(lost)
        index.write_text(json.dumps(values))
    generated(tmp_path / "gen.jsonl", 2)
    message = refused(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder)
    assert f"no trained {lost.removeprefix('model.')}" in message


# ---- Pair preference -------------------------------------------------------------------------------------------------


def prefers(folder, messages, a, b):
    """P(a is better than b): both orders, each one sequence, the template typed by hand."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    context = "\n"
    for m in messages:
        context += "\n<turn> assistant\n " + m["content"] if m["role"] == "assistant" else "\n<turn> user\n " + m["content"]
    context += "\n"
    better = []
    for first, second, letter in ((a, b, "A"), (b, a, "B")):
        question = "[CONTEXT] " + context + " [RESPONSE A] " + first + " [RESPONSE B] " + second + " \n"
        text = "<|start_header_id|>user<|end_header_id|>\n\n" + question.strip() + "<|eot_id|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        x = {k: math.exp(logits[tokenizer.convert_tokens_to_ids(k)].item()) for k in "AB"}
        better.append(x[letter] / (x["A"] + x["B"]))
    return sum(better) / 2


def test_the_context_is_what_the_published_jinja_template_renders():
    """The template as RLHFlow prints it; jinja as transformers sets it trims one newline behind each block."""
    from transformers.utils.chat_template_utils import render_jinja_template

    published = (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
        "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
    )
    turns = [{"role": role, "content": text} for role, text in
             (("user", "How?"), ("assistant", "So.\n"), ("user", " And\n\nthen?"))]  # fmt: skip
    for count in (1, 3):
        rendered, _ = render_jinja_template([turns[:count]], chat_template=published)
        assert preference.context_of(turns[:count]) == rendered[0]
    assert preference.context_of(turns[:1]) == "\n\n<turn> user\n How?\n"  # as in the training data that RLHFlow shows


def test_round_robin_against_one_pair_at_a_time(models, tmp_path, monkeypatch):
    folder = models["pair-preference-model-x"]
    rows = generated(tmp_path / "gen.jsonl", 4, K=3, longest=60)
    rows[2]["responses"][2] = rows[2]["responses"][0]  # a tie
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder,
                   "--save_pair_probabilities", "--batch_tokens", 900)  # fmt: skip
    for record, row in zip(out, rows, strict=True):
        p = [[None if i == j else prefers(folder, row["prompt"], a, b) for j, b in enumerate(row["responses"])]
             for i, a in enumerate(row["responses"])]  # fmt: skip
        for i in range(3):
            others = [x for x in p[i] if x is not None]
            assert record["pair_probabilities"][i][i] is None
            assert [x for x in record["pair_probabilities"][i] if x is not None] == pytest.approx(others, abs=1e-5)
            assert record["rewards"][i] == pytest.approx(sum(others) / 2, abs=1e-5)
    spread = [x for r in out for x in r["rewards"]]
    assert max(spread) - min(spread) > 0.05 and out[2]["pair_probabilities"][0][2] == 0.5
    settings = json.loads((tmp_path / "out.manifest.json").read_text())["settings"]
    assert settings["save_pair_probabilities"] is True and "ranking" not in settings
    assert "ranking was None and is now 'tournament'" in refused(
        monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder, "--save_pair_probabilities", "--ranking", "tournament"
    )


def test_tournament_against_one_pair_at_a_time(models, tmp_path, monkeypatch):
    folder = models["pair-preference-model-x"]
    rows = generated(tmp_path / "gen.jsonl", 3, K=5, longest=40)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder,
                   "--ranking", "tournament", "--save_pair_probabilities")  # fmt: skip
    for record, row in zip(out, rows, strict=True):
        asked = [(i, j) for i in range(5) for j in range(i) if record["pair_probabilities"][i][j] is not None]
        assert len(asked) == 6  # 3 * (5 // 2)
        for i, j in asked:
            expected = prefers(folder, row["prompt"], row["responses"][i], row["responses"][j])
            assert record["pair_probabilities"][i][j] == pytest.approx(expected, abs=1e-5)
        best, worst = record["rewards"].index(1.0), record["rewards"].index(0.0)
        assert record["rewards"].count(1.0) == record["rewards"].count(0.0) == 1
        assert all(p is None or p >= 0.5 for p in record["pair_probabilities"][best])
        assert all(p is None or p <= 0.5 for p in record["pair_probabilities"][worst])


@pytest.mark.parametrize("family, architecture", [("chatml", "qwen2"), ("gemma", "gemma2")])
def test_pair_preference_of_other_families_against_the_whole_model(family, architecture, tmp_path):
    """Logits from two rows of the head, soft-capped where the model does so, are the model's own."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = micro.make_pair_preference(tmp_path / "rm", family, architecture)
    scorer = preference.PairPreference(str(folder), save_pairs=True)
    scorer.load()
    prompt, responses = [{"role": "system", "content": "s"}, {"role": "user", "content": "q?"}], ["yes", "no no", "x" * 30]
    [(_, found)] = list(scorer.score([{"prompt": prompt, "responses": responses}]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for i, j in ((0, 1), (1, 2)):
        forth, back, cut = scorer.encode_pair(prompt, responses[i], responses[j])
        with torch.no_grad():
            a, b = (torch.softmax(model(torch.tensor([list(ids)])).logits[0, -1, scorer.letters], 0)[0].item() for ids in (forth, back))
        assert found["pairs"][i][j] == pytest.approx((a + 1 - b) / 2, abs=1e-5) and not cut


def test_long_pairs_lose_context_first_and_are_left_out_last(models, tmp_path, monkeypatch):
    folder = models["pair-preference-model-x"]
    scorer = preference.PairPreference(str(folder), max_length=150)
    prompt = [{"role": "user", "content": "long " * 100 + "end"}]
    forth, back, cut = scorer.encode_pair(prompt, "abc", "defg")
    text = scorer.tokenizer.decode(list(forth))
    assert cut and max(len(forth), len(back)) <= 150 and len(forth) > 140
    assert "[CONTEXT]" in text and "end\n [RESPONSE A] abc [RESPONSE B] defg" in text
    assert scorer.encode_pair(prompt, "a" * 100, "b" * 100) == (None, None, True)
    rows = [{"id": "r", "prompt": prompt, "responses": ["abc", "b" * 200, "defg"]}]
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder, "--max_length", 150)
    first, none, last = out[0]["rewards"]
    assert none is None and first + last == pytest.approx(1, abs=1e-5)
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert (counts["null_rewards"], counts["truncated"]) == (1, 6)


def test_a_policy_is_not_taken_for_a_preference_model(models, tmp_path, monkeypatch):
    generated(tmp_path / "gen.jsonl", 2)
    files = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    policy = micro.make_policy(tmp_path / "policy", max_position_embeddings=1024)
    assert "--reward_type pair_preference" in refused(monkeypatch, *files, policy)
    assert "which is pair_preference, not --reward_type armorm" in refused(monkeypatch, *files, policy, "--reward_type", "armorm")
    message = refused(monkeypatch, *files, models["bt"], "--reward_type", "pair_preference")
    assert "which is bradley_terry, not --reward_type pair_preference" in message
    assert "not one of auto" in refused(monkeypatch, *files, policy, "--reward_type", "pairs")
    assert "--ranking is for pair-preference models" in refused(monkeypatch, *files, models["bt"], "--ranking", "tournament")
    assert len(annotate(monkeypatch, *files, policy, "--reward_type", "pair_preference")) == 2  # told so, it is believed


def test_a_tokenizer_without_single_letters_is_refused(models, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    folder = micro.make_pair_preference(tmp_path / "rm")
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"x": 0, "?": 1}, unk_token="?")), unk_token="?")
    odd.chat_template = micro.TEMPLATES["llama3"]
    odd.save_pretrained(folder)
    with pytest.raises(cli.UserError, match='no single tokens for "A" and "B"'):
        preference.PairPreference(str(folder))


# ---- Functions and sums ----------------------------------------------------------------------------------------------

FUNCTIONS = '''
def length(messages, response):
    return len(response) / 10

def tagged(messages, response, record):
    return record["number"] + len(messages) * 100

def optional(messages, response, strict=False):
    return float(strict)

def sometimes(messages, response):
    return float("nan") if len(response) % 2 else len(response)

def broken(messages, response):
    if "Question 3" in messages[-1]["content"]:
        raise KeyError("who")
    return 0

def careless(messages, response, record):
    messages.append({"role": "user", "content": "z"})
    record["number"] += 1
    return len(messages) + 100 * record["number"]

def huge(messages, response):
    return 1e308

def slow(messages, response):
    import time
    time.sleep(0.05)
    return 1.0
'''


@pytest.fixture
def function(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return lambda name: f"{tmp_path / 'f.py'}:{name}"


def by_function(monkeypatch, tmp_path, spec, *more, target="out.jsonl"):
    monkeypatch.setattr(sys, "argv", ["x"])
    arguments = ["--dataset_name_or_path", str(tmp_path / "gen.jsonl"), "--output_dir", str(tmp_path / target)]
    from annotate_data import get_rewards

    monkeypatch.setattr(sys, "argv", ["get_rewards.py", *arguments, "--reward_function", spec, *map(str, more)])
    get_rewards.main()
    return read(tmp_path / target)


def test_a_function_cannot_reach_the_next_call_nor_the_summary(tmp_path, monkeypatch, function):
    rows = generated(tmp_path / "gen.jsonl", 3)
    rows[1]["num_tokens"] = 3  # another tool's field of that name
    rows[2]["num_tokens"] = ["a", "b", "c", "d"]
    write(tmp_path / "gen.jsonl", rows)
    out = by_function(monkeypatch, tmp_path, function("careless"))
    assert [r["rewards"] for r in out] == [[len(r["prompt"]) + 1 + 100 * (r["number"] + 1)] * 4 for r in rows]
    assert [r["num_tokens"] for r in out[1:]] == [3, ["a", "b", "c", "d"]]
    assert by_function(monkeypatch, tmp_path, function("huge"), target="b.jsonl")[0]["rewards"] == [None] * 4


def test_a_function_alone_needs_no_model(tmp_path, monkeypatch, function):
    rows = generated(tmp_path / "gen.jsonl", 7)
    out = by_function(monkeypatch, tmp_path, function("length"))
    assert [r["rewards"] for r in out] == [[pytest.approx(len(x) / 10) for x in r["responses"]] for r in rows]
    assert [{k: v for k, v in r.items() if k != "rewards"} for r in out] == rows
    out = by_function(monkeypatch, tmp_path, function("tagged"), target="b.jsonl")
    assert [r["rewards"] for r in out] == [[r["number"] + len(r["prompt"]) * 100.0] * 4 for r in rows]
    assert by_function(monkeypatch, tmp_path, function("optional"), target="c.jsonl")[0]["rewards"] == [0.0] * 4
    out = by_function(monkeypatch, tmp_path, function("sometimes"), target="d.jsonl")
    assert [r["rewards"] for r in out] == [[None if len(x) % 2 else len(x) for x in r["responses"]] for r in rows]
    # its file is an input like a model's folder
    (tmp_path / "f.py").write_text(FUNCTIONS + "\n# other\n")
    with pytest.raises(cli.UserError, match="f.py\\) has changed"):
        by_function(monkeypatch, tmp_path, function("length"))


def test_a_partial_file_of_single_responses_is_refused(tmp_path, monkeypatch, function):
    """Earlier versions saved response by response: their numbers mean something else."""
    generated(tmp_path / "gen.jsonl", 3)
    by_function(monkeypatch, tmp_path, function("length"))
    (tmp_path / "out.jsonl").unlink()
    entries = [{"id": "started"}, {"id": 11, "reward": 1.0, "cut": 0}]
    write(tmp_path / "out.jsonl.partial", entries)
    with pytest.raises(cli.UserError, match="of an earlier version of this script; give --overwrite"):
        by_function(monkeypatch, tmp_path, function("length"))
    gc.collect()
    assert len(by_function(monkeypatch, tmp_path, function("length"), "--overwrite")) == 3


def test_what_is_wrong_with_a_function_is_one_line(tmp_path, monkeypatch, function):
    generated(tmp_path / "gen.jsonl", 7)
    with pytest.raises(cli.UserError, match="f.py has no function nowhere"):
        by_function(monkeypatch, tmp_path, function("nowhere"))
    rows = read(tmp_path / "gen.jsonl")
    with pytest.raises(cli.UserError, match="gen.jsonl record 4: the reward function .*:broken fails: KeyError"):
        by_function(monkeypatch, tmp_path, function("broken"))
    assert "Question 3" in rows[3]["prompt"][-1]["content"]
    for spec, said in (("f.py", "give FILE.py:NAME"), (str(tmp_path / "g.py") + ":f", "no such reward function file")):
        with pytest.raises(cli.UserError, match=said):
            by_function(monkeypatch, tmp_path, spec)
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    with pytest.raises(cli.UserError, match="bad.py does not import: ModuleNotFoundError"):
        by_function(monkeypatch, tmp_path, f"{tmp_path / 'bad.py'}:f")


def test_a_weighted_sum_of_three_kinds(models, tmp_path, monkeypatch, function):
    rows = generated(tmp_path / "gen.jsonl", 5)
    names = [str(models["bt"]), str(models["armorm"]), function("sometimes")]
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", names[0], names[1], "--reward_function", names[2],
                   "--reward_weights", 0.7, -0.3, 2, "--chunk_records", 2)  # fmt: skip
    for record, row in zip(out, rows, strict=True):
        parts = record["reward_parts"]
        assert list(parts) == names
        for k, text in enumerate(row["responses"]):
            a, b = bradley_terry(models["bt"], row["prompt"], text), armorm(models["armorm"], row["prompt"], text)
            assert parts[names[0]][k] == pytest.approx(a, abs=1e-4) and parts[names[1]][k] == pytest.approx(b, abs=1e-4)
            if len(text) % 2:
                assert parts[names[2]][k] is None and record["rewards"][k] is None
            else:
                assert record["rewards"][k] == pytest.approx(0.7 * a - 0.3 * b + 2 * len(text), abs=2e-4)
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert set(manifest["inputs"]) == {"dataset_name_or_path", "reward_name_or_path", "reward_name_or_path 2", "reward_function"}
    message = refused(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", names[0], names[1], "--reward_function", names[2],
                      "--reward_weights", 0.7, -0.3, 1)  # fmt: skip
    assert "reward_weights was [0.7, -0.3, 2.0] and is now [0.7, -0.3, 1.0]" in message
    # annotated anew, the fields of the earlier annotation go
    again = annotate(monkeypatch, tmp_path / "out.jsonl", tmp_path / "again.jsonl", models["bt"])
    assert "reward_parts" not in again[0] and again[0]["rewards"] == out[0]["reward_parts"][names[0]]


def test_sums_that_make_no_sense_are_refused(models, tmp_path, monkeypatch, function):
    generated(tmp_path / "gen.jsonl", 2)
    files, bt, other = (tmp_path / "gen.jsonl", tmp_path / "out.jsonl"), models["bt"], models["armorm"]
    assert "2 scorers need --reward_weights" in refused(monkeypatch, *files, bt, other)
    assert "3 numbers in --reward_weights for 2" in refused(monkeypatch, *files, bt, other, "--reward_weights", 1, 2, 3)
    assert "finite numbers other than 0" in refused(monkeypatch, *files, bt, other, "--reward_weights", 1, "nan")
    assert "named twice" in refused(monkeypatch, *files, bt, bt, "--reward_weights", 1, 2)
    message = refused(monkeypatch, *files, bt, other, "--reward_weights", 1, 2, "--reward_type", "auto", "auto", "auto")
    assert "3 in --reward_type for 2 reward models" in message
    assert "--max_length must be" in refused(monkeypatch, *files, bt, "--max_length", 0)
    assert not list(tmp_path.glob("out*"))


def test_a_run_of_two_scorers_is_continued_by_two_processes(models, tmp_path, monkeypatch, function):
    """Stopped in the second scorer: what is saved is not scored again, by however many processes."""
    rows = generated(tmp_path / "gen.jsonl", 12)
    name, files = str(models["bt"]), (tmp_path / "gen.jsonl", tmp_path / "out.jsonl")
    fragile = function("fragile")
    (tmp_path / "f.py").write_text(FUNCTIONS + f"""
def fragile(messages, response):
    import os
    if "Question 3" in messages[-1]["content"] and not os.path.exists({str(tmp_path / 'mended')!r}):
        raise OSError("no server")
    return len(response)
""")  # fmt: skip
    arguments = ["--reward_function", fragile, "--reward_weights", 1, 0.5]
    message = refused(monkeypatch, *files, name, *arguments, "--chunk_records", 2)
    assert "record 4: the reward function" in message and "OSError: no server" in message
    saved = [json.loads(line)["id"] for line in Path(f"{files[1]}.partial").read_text().splitlines()]
    assert sorted(saved[1:]) in ([*range(14)], [*range(15)]) and saved[0] == "records"  # 12 + i: the function on record i
    (tmp_path / "mended").touch()
    gc.collect()  # the refusal's traceback still holds the lock on the output
    code, out, err = outcome(launch("--dataset_name_or_path", files[0], "--output_dir", files[1], "--reward_name_or_path", name,
                                    *arguments, processes=2))  # fmt: skip
    assert code == 0, err
    assert out.count("scoring ") == 1 and f"scored {25 - len(saved)} records" in out
    for record, row in zip(read(files[1]), rows, strict=True):
        expected = [bradley_terry(models["bt"], row["prompt"], x) + len(x) / 2 for x in row["responses"]]
        assert record["rewards"] == pytest.approx(expected, abs=1e-4)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_an_error_of_one_process_is_told_once_and_at_once(tmp_path, function):
    generated(tmp_path / "gen.jsonl", 40)
    arguments = ["--dataset_name_or_path", tmp_path / "gen.jsonl", "--output_dir", tmp_path / "out.jsonl", "--chunk_records", 8]
    code, out, err = outcome(launch(*arguments, "--reward_function", function("broken"), processes=2))
    assert code != 0 and err.count("error: ") >= 1
    assert len([line for line in err.splitlines() if line.startswith("error: ") and "record 4: the reward function" in line]) == 1


@pytest.mark.parametrize("processes", [0, 2])
def test_ctrl_c_says_how_to_go_on(processes, tmp_path, function):
    generated(tmp_path / "gen.jsonl", 300)
    target = tmp_path / "out.jsonl"
    arguments = ["--dataset_name_or_path", tmp_path / "gen.jsonl", "--output_dir", target, "--reward_function", function("slow")]
    process = launch(*arguments, processes=processes, start_new_session=True)
    partial, deadline = Path(f"{target}.partial"), time.monotonic() + 90
    while not (partial.exists() and partial.stat().st_size > 300) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("stopped; start the same command again to continue") == 1, err
    assert not target.exists() and partial.stat().st_size > 300


# ---- Memory ----------------------------------------------------------------------------------------------------------


def peak(tmp_path, count):
    """MB at the peak of a run over `count` records, as the kernel counts its one child."""
    source, rng = tmp_path / f"{count}.jsonl", random.Random(0)
    with open(source, "w", encoding="utf-8") as file:
        for i in range(count):
            responses = [f"{rng.random()} some text" * 3 for _ in range(4)]
            record = {"id": f"r{i}", "prompt": f"question {i}", "responses": responses, "num_tokens": [5, 6, 7, 8]}
            file.write(json.dumps(record) + "\n")
    (tmp_path / "f.py").write_text("def f(messages, response):\n    return float(response[:9])\n")
    script = str(ROOT / "annotate_data" / "get_rewards.py")
    arguments = ["--dataset_name_or_path", source, "--output_dir", tmp_path / f"{count}.out.jsonl"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    command = [sys.executable, script, *arguments, "--reward_function", f"{tmp_path / 'f.py'}:f"]
    answer = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert sum(1 for _ in open(tmp_path / f"{count}.out.jsonl", "rb")) == count
    return float(answer.stdout)


def test_memory_does_not_grow_with_the_records(tmp_path):
    few, many = peak(tmp_path, 2000), peak(tmp_path, 60000)
    print(f"{few:.0f} MB with 2,000 records, {many:.0f} MB with 60,000")
    # SQLite's two tables may fill 16 MiB of pages each; 58,000 records of 4 responses held in memory take 100 MB
    assert many < few + 25, (few, many)


def test_kinds_go_by_the_config():
    kind = reward_models.kind_of
    assert kind({"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "x"}}, "auto", "m") == "bradley_terry"
    assert kind({"architectures": ["LlamaForRewardModelWithGating"]}, "auto", "m") == "armorm"
    assert kind({"architectures": ["LlamaForCausalLM"]}, "auto", "RLHFlow/pair-preference-model-LLaMA3-8B") == "pair_preference"
    assert kind({"architectures": ["LlamaForCausalLM"]}, "pair_preference", "my/model") == "pair_preference"
    for config in ({"architectures": ["LlamaForCausalLM"]}, {"architectures": ["LlamaForRewardModelWithGating31"]},
                   {"architectures": ["XForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}):  # fmt: skip
        with pytest.raises(cli.UserError):
            kind(config, "auto", "my/model")
