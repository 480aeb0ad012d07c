"""annotate_data/: rewards against transformers' own forward pass of one sequence, resume, processes,
refusals.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import micro
from rewarding import (
    FAMILIES,
    annotate,
    generated,
    launch,
    load,
    outcome,
    read,
    reference,
    refused,
    write,
)

from annotate_data import get_rewards, reward_models

pytestmark = pytest.mark.env("vllm")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scores_equal_one_sequence_at_a_time(architecture, model, tmp_path, monkeypatch):
    rows = generated(tmp_path / "gen.jsonl")
    for budget in (1, 4096):  # one by one, and all in few padded batches
        target = tmp_path / f"{budget}.jsonl"
        out = annotate(
            monkeypatch, tmp_path / "gen.jsonl", target, model(architecture), "--batch_tokens", budget
        )
        assert [{k: v for k, v in r.items() if k != "rewards"} for r in out] == rows
        expected = [
            [reference(model(architecture), r["prompt"], x) for x in r["responses"]] for r in rows[:3]
        ]
        assert sum((r["rewards"] for r in out[:3]), []) == pytest.approx(sum(expected, []), abs=1e-4)
        assert len({x for r in out for x in r["rewards"]}) > 20
    assert out[5]["prompt"][-1]["content"].count("\u2028") == 1


def test_last_token_is_found_where_padding_is_the_end_of_turn(model, tmp_path, monkeypatch):
    folder = shutil.copytree(model(), tmp_path / "rm")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        if name == "config.json":
            settings["pad_token_id"] = micro.make_tokenizer().convert_tokens_to_ids("<|eot_id|>")
        else:
            settings["pad_token"] = "<|eot_id|>"
        (folder / name).write_text(json.dumps(settings))
    rows = generated(tmp_path / "gen.jsonl", 3)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder)
    plain = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "plain.jsonl", model())
    assert [r["rewards"] for r in out] == [r["rewards"] for r in plain]
    expected = reference(folder, rows[1]["prompt"], rows[1]["responses"][2])
    assert out[1]["rewards"][2] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("architecture", "keeps"), [("llama", True), ("qwen2", False)])
def test_left_truncation_keeps_bos(architecture, keeps, model, tmp_path, monkeypatch):
    rows = generated(tmp_path / "gen.jsonl", 2)
    out = annotate(
        monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", model(architecture), "--max_length", 60
    )
    expected = [reference(model(architecture), rows[0]["prompt"], x, 60) for x in rows[0]["responses"]]
    assert out[0]["rewards"] == pytest.approx(expected, abs=1e-4)
    scorer = reward_models.BradleyTerry(str(model(architecture)), max_length=60)
    row = scorer.encode(rows[0]["prompt"], "x" * 500)
    assert len(row.ids) == 60 and row.cut > 400 and (row.ids[0] == scorer.tokenizer.bos_token_id) == keeps
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert 0 < counts["truncated"] <= 8 and counts["scoring_seconds"] >= 0


def test_one_bos_and_the_models_own_limit(model, tmp_path):
    scorer = reward_models.BradleyTerry(str(model()), max_length=100000)
    ids = list(scorer.encode([{"role": "user", "content": "hi"}], "yes").ids)
    assert ids.count(scorer.tokenizer.bos_token_id) == 1 and ids[0] == scorer.tokenizer.bos_token_id
    assert scorer.max_length == 512


def processed(tokenizer, front=None, behind=None):
    """`tokenizer` that adds the token `front` and the token `behind` to a text by itself, in place of what it
    added.
    """
    from tokenizers import processors

    single = " ".join(part for part in (front, "$A", behind) if part)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (front, behind) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    return tokenizer


BOS, TURN = "<|begin_of_text|>", "<|eot_id|>"
WRITES = micro.TEMPLATES["llama3"]
SILENT = WRITES.replace("{{ bos_token }}", "")
# name → (template, what the tokenizer adds in front and behind, text that must be tokenised exactly so; {} is
# what SILENT writes)
CONVENTIONS = {
    "both": (WRITES, BOS, None, BOS + "{}"),
    "template alone": (WRITES, None, None, BOS + "{}"),
    "tokenizer alone": (SILENT, BOS, None, BOS + "{}"),
    "neither, though there is one": (SILENT, None, None, "{}"),
    "twice": ("{{ bos_token }}" + WRITES, None, None, BOS + "{}"),
    "twice, and the tokenizer": ("{{ bos_token }}" + WRITES, BOS, None, BOS + "{}"),
    "behind white space": ("\n" + WRITES, BOS, None, "\n" + BOS + "{}"),
    "CLS and SEP": (SILENT, "<|end_of_text|>", "<|pad|>", "<|end_of_text|>{}<|pad|>"),
    "an end that the template writes": (WRITES, BOS, TURN, BOS + "{}"),
    "an end alone": (SILENT, None, "<|end_of_text|>", "{}<|end_of_text|>"),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_one_bos_and_what_the_tokenizer_adds_once(name, model, tmp_path):
    """What the template says, and what the tokenizer adds where the template did not; a BOS in the user's own
    text stays.
    """
    import torch

    template, front, behind, expected = CONVENTIONS[name]
    folder, tokenizer = (
        shutil.copytree(model(), tmp_path / "rm"),
        processed(micro.make_tokenizer(), front, behind),
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    scorer = reward_models.BradleyTerry(str(folder))
    prompt, response = [{"role": "user", "content": f"say {BOS} twice"}], f"{BOS} and {BOS}"
    turns = [*prompt, {"role": "assistant", "content": response}]
    plain = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=SILENT)
    ids = tokenizer(expected.replace("{}", plain), add_special_tokens=False)["input_ids"]
    assert list(scorer.encode(prompt, response).ids) == ids and ids.count(tokenizer.bos_token_id) == 3 + (
        BOS in expected
    )
    if name in ("both", "template alone", "neither, though there is one"):
        assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    scorer.load()
    [(_, found)] = list(scorer.score([{"prompt": prompt, "responses": [response]}]))
    network = load(model())[1]
    with torch.no_grad():
        assert found["rewards"] == pytest.approx([network(torch.tensor([ids])).logits[0, 0].item()], abs=1e-4)
    scorer.max_length = 30
    short = list(scorer.encode(prompt, response).ids)
    keeps = front is not None or BOS in expected
    assert len(short) == 30 and short == ids[:keeps] + ids[len(ids) - 30 + keeps :]


def test_records_of_other_tools_and_several_files(model, tmp_path, monkeypatch):
    write(
        tmp_path / "a.jsonl",
        [{"prompt": "Hi", "responses": ["a", "b"]}, {"prompt": "Hi", "responses": ["c", "d"]}],
    )
    write(
        tmp_path / "b.jsonl",
        [{"id": 7, "prompt": "Ho", "responses": ["e"], "rewards": [9.0], "tag": "\u2028"}],
    )
    arguments = [tmp_path / "b.jsonl", "--output_dir", tmp_path / "A.jsonl"]
    a = annotate(
        monkeypatch,
        tmp_path / "a.jsonl",
        tmp_path / "A.jsonl",
        model(),
        "--dataset_name_or_path",
        tmp_path / "a.jsonl",
        *arguments,
        tmp_path / "B.jsonl",
    )
    b = read(tmp_path / "B.jsonl")
    assert a[0]["id"] != a[1]["id"] and a[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert b[0]["source_id"] == 7 and b[0]["tag"] == "\u2028" and len(b[0]["id"]) == 16
    assert b[0]["rewards"] == pytest.approx([reference(model(), b[0]["prompt"], "e")], abs=1e-4)


def test_bad_input_is_refused_before_the_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(get_rewards, "BradleyTerry", None)  # calling it would be a TypeError
    monkeypatch.setattr(get_rewards, "World", None)
    source, target = tmp_path / "gen_data.json", tmp_path / "out.jsonl"
    rows = generated(source)
    assert (
        "gen_data.json"
        in refused(monkeypatch, tmp_path / "gen_data.jsonl", target, model()).split("there is")[1]
    )
    assert "--K is 8, but 6 of 6 records" in refused(monkeypatch, source, target, model(), "--K", "8")
    text = source.read_text(encoding="utf-8")
    source.write_text(text[:-20], encoding="utf-8")
    assert "line 6 is torn" in refused(monkeypatch, source, target, model())
    changes = [
        ({"responses": ["a"], "finish_reasons": ["stop"], "num_tokens": [1]}, "1 of 6 records"),
        ({"num_tokens": [1, 2]}, "record 3 has 4 responses and 2 num_tokens"),
        ({"finish_reasons": "stop"}, "record 3: `finish_reasons` must be a list"),
        ({"responses": "text"}, "record 3: `responses` must be"),
        ({"responses": ["a", None, "b", "c"]}, "record 3: `responses` must be"),
        ({"id": "r0"}, "record 3 has the id 'r0' of record 1"),
        ({"prompt": [{"role": "robot"}]}, "record 3: a message is"),
        ({"extra": float("nan")}, "record 3 holds NaN"),
    ]
    for change, message in changes:
        write(source, [r | change if i == 2 else r for i, r in enumerate(rows)])
        assert message in refused(monkeypatch, source, target, model())
    write(source, [{"response" if k == "responses" else k: v for k, v in r.items()} for r in rows])
    assert "record 1 has no `responses`, did you mean 'response'?" in refused(
        monkeypatch, source, target, model()
    )
    write(source, rows)
    assert "different files" in refused(monkeypatch, source, source, model())
    assert "1 files in --data" in refused(monkeypatch, source, target, model(), "--output_dir", "a", "b")
    assert "--batch_tokens must be" in refused(monkeypatch, source, target, model(), "--batch_tokens", "0")
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_reward_model_is_refused(model, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    source, target = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    generated(source, 2)
    headless = shutil.copytree(model(), tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    assert "no trained score.weight" in refused(monkeypatch, source, target, headless)
    policy = micro.make_policy(tmp_path / "policy")
    assert "LlamaForCausalLM" in refused(monkeypatch, source, target, policy)
    two = shutil.copytree(model(), tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    assert "num_labels = 2" in refused(monkeypatch, source, target, two)
    assert "nowhere: no such folder" in refused(monkeypatch, source, target, tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)  # looks like a hub name, but its folder is there and it is not
    message = refused(monkeypatch, source, target, "two/rm")
    assert "two/rm: no such folder in two/" in message
    (two / "config.json").write_text(json.dumps(config | {"architectures": ["InternLM2ForRewardModel"]}))
    assert "InternLM2ForRewardModel; known are" in refused(monkeypatch, source, target, two)
    (two / "config.json").write_text("[]")
    assert "is damaged" in refused(monkeypatch, source, target, two)
    (two / "config.json").unlink()
    assert "is a folder without config.json" in refused(monkeypatch, source, target, two)
    # nothing is bound to a model that could not be used
    assert len(annotate(monkeypatch, source, target, model())) == 2


def test_a_template_that_refuses_a_system_turn(model, tmp_path, monkeypatch):
    source, target = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    system = [{"role": "system", "content": "Be kind."}]
    write(source, [r | {"prompt": system + r["prompt"]} for r in generated(source, 2)])
    message = refused(monkeypatch, source, target, model("gemma2"))
    assert "gen.jsonl record" in message and "refuses the turns (system, user, assistant)" in message
    assert "--chat_template" in message
    (tmp_path / "t.jinja").write_text(micro.TEMPLATES["phi"])
    assert (
        len(annotate(monkeypatch, source, target, model("gemma2"), "--chat_template", tmp_path / "t.jinja"))
        == 2
    )


def test_changed_settings_and_complete_output(model, tmp_path, monkeypatch):
    source, target = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    generated(source, 2)
    first = annotate(monkeypatch, source, target, model())
    assert "max_length was 4096 and is now 50" in refused(
        monkeypatch, source, target, model(), "--max_length", "50"
    )
    poison = tmp_path / "poison"
    poison.mkdir()
    for name in ("torch", "transformers"):
        (poison / f"{name}.py").write_text("raise SystemExit('imported')")
    arguments = ["--dataset_name_or_path", source, "--output_dir", target, "--reward_name_or_path", model()]
    code, out, err = outcome(launch(*arguments, env={"PYTHONPATH": str(poison)}))
    assert (code, err) == (0, "") and "complete already" in out
    again = annotate(monkeypatch, source, target, model(), "--max_length", "50", "--overwrite")
    assert [r["rewards"] for r in again] != [r["rewards"] for r in first]

    # more processes than GPUs: refused before torch is there
    smi = poison / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-1)'\necho 'GPU 1: X (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    env = {"PYTHONPATH": str(poison), "PATH": f"{poison}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1"}
    code, out, err = outcome(launch(*arguments, "--overwrite", env=env | {"LOCAL_WORLD_SIZE": "4"}))
    assert code == 2 and err.count("\n") == 1 and "--num_processes 2" in err


def test_two_processes_agree_with_one(model, tmp_path, monkeypatch):
    rows = generated(tmp_path / "gen.jsonl", 9)
    one = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "one.jsonl", model())
    arguments = ["--dataset_name_or_path", tmp_path / "gen.jsonl", "--output_dir", tmp_path / "two.jsonl"]
    code, out, err = outcome(launch(*arguments, "--reward_name_or_path", model(), "--K", "4", processes=2))
    assert code == 0, err
    assert "2 × cpu" in out and out.count("scored 9 records (36 responses)") == 1
    two = read(tmp_path / "two.jsonl")
    assert [r["id"] for r in two] == [r["id"] for r in rows]
    assert sum((r["rewards"] for r in two), []) == pytest.approx(
        sum((r["rewards"] for r in one), []), abs=1e-4
    )
    assert sorted(p.name for p in tmp_path.glob("two*")) == ["two.jsonl", "two.manifest.json"]

    # one bad record meets one rank only: its error is told once, by rank 0
    generated(tmp_path / "bad.jsonl", 6, 1)
    (tmp_path / "f.py").write_text(
        "def score(messages, response, record):\n    return 1 / (record['id'] != 'r4')\n"
    )
    arguments = ["--dataset_name_or_path", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "bad_out.jsonl"]
    code, out, err = outcome(
        launch(*arguments, "--reward_function", f"{tmp_path / 'f.py'}:score", processes=2)
    )
    assert code != 0 and len(re.findall("^error: .*bad.jsonl record 5: ", err, re.M)) == 1


def started_by(target):
    """Ids of processes whose command line names `target`: the launcher and its workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(target).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass
    return [pid for pid in found if pid != os.getpid()]


def test_killed_and_resumed_with_another_number_of_processes(model, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    generated(source, 120, longest=300)
    whole = annotate(monkeypatch, source, tmp_path / "whole.jsonl", model())
    arguments = ["--dataset_name_or_path", source, "--output_dir", target, "--reward_name_or_path", model()]
    process = launch(*arguments, "--batch_tokens", "1", processes=2)
    files = [Path(f"{target}.partial"), Path(f"{target}.partial.rank1")]
    deadline = time.monotonic() + 60
    while not all(f.exists() and f.stat().st_size > 400 for f in files) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in started_by(target):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    with open(files[1], "ab") as file:
        file.write(b'{"id": 1, "rew')  # a torn line
    saved = {}
    for file in files:
        for line in file.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            saved |= {entry["id"]: entry} if isinstance(entry["id"], int) else {}
    assert 4 < len(saved) < 120 and all(len(entry["rewards"]) == 4 for entry in saved.values())
    # settings that changed are refused although rank 1's file is another's
    message = refused(monkeypatch, source, target, model(), "--max_length", "50")
    assert "half done" in message and "max_length" in message
    capsys.readouterr()
    out = annotate(monkeypatch, source, target, model())
    assert f"scored {120 - len(saved)} records" in capsys.readouterr().out
    assert sum((r["rewards"] for r in out), []) == pytest.approx(
        sum((r["rewards"] for r in whole), []), abs=1e-4
    )
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
