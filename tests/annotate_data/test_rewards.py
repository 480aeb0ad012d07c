"""Rewards against transformers' own forward pass of one sequence; resume, processes, refusals."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import micro
import pytest
from rewarding import FAMILIES, command, flat, generated, launch, load, outcome, read, reference, write

from annotate_data import get_rewards, reward_models

pytestmark = pytest.mark.env("vllm")


def counts(path):
    return json.loads(path.read_text())["counts"]


def change(path, **values):
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scores_equal_one_sequence_at_a_time(architecture, model, annotate, tmp_path):
    rows = generated(tmp_path / "gen.jsonl")
    expected = [reference(model(architecture), r["prompt"], x) for r in rows[:3] for x in r["responses"]]
    for budget in (1, 4096):  # one by one, and all in few padded batches
        out = annotate(model(architecture), target=f"{budget}.jsonl", batch_tokens=budget)
        assert [{k: v for k, v in r.items() if k != "rewards"} for r in out] == rows
        assert flat(out[:3]) == pytest.approx(expected, abs=1e-4) and len(set(flat(out))) > 20
    assert out[5]["prompt"][-1]["content"].count("\u2028") == 1


def test_last_token_is_found_where_padding_is_the_end_of_turn(model, annotate, tmp_path):
    folder = shutil.copytree(model(), tmp_path / "rm")
    change(folder / "config.json", pad_token_id=micro.make_tokenizer().convert_tokens_to_ids("<|eot_id|>"))
    change(folder / "tokenizer_config.json", pad_token="<|eot_id|>")
    rows = generated(tmp_path / "gen.jsonl", 3)
    out = annotate(folder)
    assert flat(out) == flat(annotate(model(), target="plain.jsonl"))
    expected = reference(folder, rows[1]["prompt"], rows[1]["responses"][2])
    assert out[1]["rewards"][2] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("architecture", "keeps"), [("llama", True), ("qwen2", False)])
def test_left_truncation_keeps_bos(architecture, keeps, model, annotate, tmp_path):
    rows = generated(tmp_path / "gen.jsonl", 2)
    out = annotate(model(architecture), max_length=60)
    expected = [reference(model(architecture), rows[0]["prompt"], x, 60) for x in rows[0]["responses"]]
    assert out[0]["rewards"] == pytest.approx(expected, abs=1e-4)
    scorer = reward_models.BradleyTerry(str(model(architecture)), max_length=60)
    row = scorer.encode(rows[0]["prompt"], "x" * 500)
    assert len(row.ids) == 60 and row.cut > 400 and (row.ids[0] == scorer.tokenizer.bos_token_id) == keeps
    made = counts(tmp_path / "out.manifest.json")
    assert 0 < made["truncated"] <= 8 and made["scoring_seconds"] >= 0


BOS, TURN, END = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
WRITES = micro.TEMPLATES["llama3"]
SILENT = WRITES.replace("{{ bos_token }}", "")
# name → (template, what the tokenizer adds in front and behind, text that must be tokenised exactly so; {} is
# what SILENT writes)
CONVENTIONS = {
    "both": (WRITES, BOS, None, BOS + "{}"),
    "template alone": (WRITES, None, None, BOS + "{}"),
    "tokenizer alone": (SILENT, BOS, None, BOS + "{}"),
    "neither, though there is one": (SILENT, None, None, "{}"),
    "twice, and the tokenizer": ("{{ bos_token }}" + WRITES, BOS, None, BOS + "{}"),
    "behind white space": ("\n" + WRITES, BOS, None, "\n" + BOS + "{}"),
    "CLS and SEP": (SILENT, END, "<|pad|>", END + "{}<|pad|>"),
    "an end that the template writes": (WRITES, BOS, TURN, BOS + "{}"),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_one_bos_and_what_the_tokenizer_adds_once(name, model, tmp_path):
    """What the template says, and what the tokenizer adds where the template did not; a user's BOS stays."""
    import torch
    from tokenizers import processors

    template, front, behind, expected = CONVENTIONS[name]
    folder, tokenizer = shutil.copytree(model(), tmp_path / "rm"), micro.make_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (front, behind) if token]
    single = " ".join(part for part in (front, "$A", behind) if part)
    adds = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor, tokenizer.chat_template = adds, template
    tokenizer.save_pretrained(folder)
    scorer = reward_models.BradleyTerry(str(folder), max_length=100000)
    assert scorer.max_length == 512  # the model's own
    prompt, response = [{"role": "user", "content": f"say {BOS} twice"}], f"{BOS} and {BOS}"
    turns = [*prompt, {"role": "assistant", "content": response}]
    plain = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=SILENT)
    ids = tokenizer(expected.replace("{}", plain), add_special_tokens=False)["input_ids"]
    assert list(scorer.encode(prompt, response).ids) == ids
    assert ids.count(tokenizer.bos_token_id) == 3 + (BOS in expected)
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


def test_records_of_other_tools_and_several_files(model, annotate, tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "Hi", "responses": texts} for texts in (["a", "b"], ["c", "d"])])
    other = {"id": 7, "prompt": "Ho", "responses": ["e"], "rewards": [9.0], "tag": "\u2028"}
    write(tmp_path / "b.jsonl", [other])
    sources, targets = ([tmp_path / name for name in names] for names in (("a.jsonl", "b.jsonl"), ("A", "B")))
    a = annotate(model(), target="A", dataset_name_or_path=sources, output_dir=targets)
    [b] = read(tmp_path / "B")
    assert a[0]["id"] != a[1]["id"] and a[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert b["source_id"] == 7 and b["tag"] == "\u2028" and len(b["id"]) == 16
    assert b["rewards"] == pytest.approx([reference(model(), b["prompt"], "e")], abs=1e-4)


def test_bad_input_is_refused_before_the_model(model, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(get_rewards, "make_scorers", None)  # calling it would be a TypeError
    monkeypatch.setattr(get_rewards, "World", None)
    source, rows = tmp_path / "gen.jsonl", generated(tmp_path / "gen.jsonl")
    assert "gen.jsonl" in refused(model(), source="gen.json").split("there is")[1]
    assert "--K is 8, but 6 of 6 records" in refused(model(), K=8)
    source.write_text(source.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert "line 6 is torn" in refused(model())
    changes = [
        ({"responses": ["a"], "finish_reasons": ["stop"], "num_tokens": [1]}, "1 of 6 records"),
        ({"num_tokens": [1, 2]}, "record 3 has 4 responses and 2 num_tokens"),
        ({"finish_reasons": "stop"}, "record 3: `finish_reasons` must be a list"),
        ({"responses": ["a", None, "b", "c"]}, "record 3: `responses` must be"),
        ({"id": "r0"}, "record 3 has the id 'r0' of record 1"),
        ({"prompt": [{"role": "robot"}]}, "record 3: a message is"),
        ({"extra": float("nan")}, "record 3 holds NaN"),
    ]
    for change, message in changes:
        write(source, [r | change if i == 2 else r for i, r in enumerate(rows)])
        assert message in refused(model())
    write(source, [{"response" if k == "responses" else k: v for k, v in r.items()} for r in rows])
    assert "record 1 has no `responses`, did you mean 'response'?" in refused(model())
    write(source, rows)
    assert "different files" in refused(model(), target="gen.jsonl")
    assert "1 files in --data" in refused(model(), output_dir=["a", "b"])
    assert "--batch_tokens must be" in refused(model(), batch_tokens=0)
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_reward_model_is_refused(model, annotate, refused, tmp_path):
    from safetensors.torch import load_file, save_file

    generated(tmp_path / "gen.jsonl", 2)
    headless = shutil.copytree(model(), tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    assert "no trained score.weight" in refused(headless)
    two = shutil.copytree(model(), tmp_path / "two")
    change(two / "config.json", id2label={"0": "a", "1": "b"})
    assert "num_labels = 2" in refused(two)
    assert "nowhere: no such folder" in refused(tmp_path / "nowhere")
    change(two / "config.json", architectures=["InternLM2ForRewardModel"])
    assert "InternLM2ForRewardModel; known are" in refused(two)
    (two / "config.json").write_text("[]")
    assert "is damaged" in refused(two)
    (two / "config.json").unlink()
    assert "is a folder without config.json" in refused(two)
    assert len(annotate(model())) == 2  # nothing is bound to a model that could not be used


def test_a_template_that_refuses_a_system_turn(model, annotate, refused, tmp_path):
    system = [{"role": "system", "content": "Be kind."}]
    rows = generated(tmp_path / "gen.jsonl", 2)
    write(tmp_path / "gen.jsonl", [r | {"prompt": system + r["prompt"]} for r in rows])
    told = refused(model("gemma2"))
    assert "gen.jsonl record" in told and "refuses the turns (system, user, assistant)" in told
    assert "--chat_template" in told
    (tmp_path / "t.jinja").write_text(micro.TEMPLATES["phi"])
    assert len(annotate(model("gemma2"), chat_template=tmp_path / "t.jinja")) == 2


def test_changed_settings_and_complete_output(model, annotate, refused, tmp_path):
    source, target = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    generated(source, 2)
    first = annotate(model())
    assert "max_length was 4096 and is now 50" in refused(model(), max_length=50)
    poison = tmp_path / "poison"
    poison.mkdir()
    for name in ("torch", "transformers"):
        (poison / f"{name}.py").write_text("raise SystemExit('imported')")
    env = {"PYTHONPATH": str(poison)}
    code, out, err = outcome(launch(command(source, target, model()), env=env))
    assert (code, err) == (0, "") and "complete already" in out
    assert flat(annotate(model(), max_length=50, overwrite=True)) != flat(first)

    # more processes than GPUs: refused before torch is there
    smi = poison / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-1)'\necho 'GPU 1: X (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    env |= {"PATH": f"{poison}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_WORLD_SIZE": "4"}
    code, out, err = outcome(launch(command(source, target, model(), overwrite=True), env=env))
    assert code == 2 and err.count("\n") == 1 and "--num_processes 2" in err


def started_by(target):
    """Ids of processes whose command line names `target`: the launcher and its workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(target).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def test_killed_and_resumed_with_another_number_of_processes(model, annotate, refused, tmp_path, capsys):
    source, target = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    generated(source, 120, longest=300)
    whole = annotate(model(), target="whole.jsonl")
    process = launch(command(source, target, model(), batch_tokens=1), processes=2)
    files = [Path(f"{target}.partial"), Path(f"{target}.partial.rank1")]
    deadline = time.monotonic() + 200
    while not all(f.exists() and f.stat().st_size > 400 for f in files) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in started_by(target):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    entries = [json.loads(line) for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    saved = {entry["id"]: entry for entry in entries if isinstance(entry["id"], int)}
    assert 4 < len(saved) < 120 and all(len(entry["rewards"]) == 4 for entry in saved.values())
    with open(files[1], "ab") as file:
        file.write(b'{"id": 1, "rew')  # a torn line
    # settings that changed are refused although rank 1's file is another's
    told = refused(model(), max_length=50)
    assert "half done" in told and "max_length" in told
    capsys.readouterr()
    out = annotate(model())
    assert f"scored {120 - len(saved)} records" in capsys.readouterr().out
    assert flat(out) == pytest.approx(flat(whole), abs=1e-4)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
