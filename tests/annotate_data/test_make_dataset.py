"""The data set of a run's answers and pairs, read by `datasets` and pyarrow and trained on by TRL; runs are
planted.
"""

import json
import math
import random
import shutil
import sys
from unittest.mock import patch

import datasets
import hub_stub
import huggingface_hub
import micro
import pyarrow.parquet
import pytest
import report_runs
from training import ROOT, start

from annotate_data import make_dataset
from common.cli import UserError
from common.hide import without_folders
from common.manifest import write_jsonl
from dpo_iteration.pairs import select_pairs

SECRET = "hf_" + "x" * 30
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def choose(run, i, *files, **choice):
    """Let iteration i have the pairs of these files, as a training chooses them; some are held out."""
    chosen = select_pairs([str(file) for file in files], 0.3, 1, **choice)
    report_runs.write(run / f"iter{i}/pairs.jsonl", chosen.pairs)
    write_jsonl(run / f"iter{i}/pairs.skipped.jsonl", chosen.skipped)


def enrich(run):
    """Put into a run what is rare: parts, sources, tools, a call of one, missing rewards, skipped prompts."""
    first, rng = run / "iter1/rewarded.jsonl", random.Random(0)
    rows = rows_of(first)
    for n, row in enumerate(rows):
        parts = [[rng.gauss(0, 1) for _ in range(4)] for _ in range(2)]
        row["reward_parts"] = dict(zip((f"{run}/models/helpful", "owner/safe"), parts, strict=True))
        row["response_sources"] = [
            {"temperature": t, "model": f"{run}/iter0/model"} for t in (1, 1, 0.7, 0.7)
        ]
        row["prompt_token_ids"] = [1, 2, n]
    rows[3]["rewards"][1] = None
    rows[4]["rewards"] = [2.0] * 4
    rows[5]["prompt"][0]["content"] = "数字\u2028 ‘x’ 🙂"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    rows[6]["prompt"] += [call, {"role": "tool", "content": "seen", "tool_call_id": "1"}]
    rows[6]["tools"] = TOOLS
    report_runs.write(first, rows)
    skipped = [{"id": str(n), "reason": f"prompt has {n} tokens, more than 64"} for n in (70, 71)]
    skipped.append({"id": "b", "reason": f"{run}/mine.jsonl record 3: no text"})
    report_runs.write(run / "iter1/generated.skipped.jsonl", skipped)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three iterations: the second trained on the pairs of both, the third has not begun to train."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    settings = {"train_on": "all", "model_name_or_path": "owner/sft"}
    settings["generation"] = {"K": 4, "temperature": 0.7, "system_prompt": f"token={SECRET}"}
    settings["annotation"] = {"reward_type": ["auto"], "reward_weights": None}
    report_runs.make_run(folder, 3, prompts=20, evaluated=False, settings=settings)
    enrich(folder)
    files = [folder / f"iter{i}/rewarded.jsonl" for i in (1, 2)]
    choose(folder, 1, files[0])
    choose(folder, 2, *files)
    (folder / "iter3/pairs.jsonl").unlink()
    inputs = {"reward_name_or_path": {"path": f"{folder}/models/rm"}}
    inputs["dataset_name_or_path"] = {"path": str(folder / "iter1/generated.jsonl")}
    report_runs.manifest(folder / "iter1/rewarded", script="annotate_data/get_rewards.py", inputs=inputs)
    inputs = {"dataset_name_or_path": {"path": f"{folder}/prompts/mine.jsonl"}}
    report_runs.manifest(folder / "iter1/generated", script="generation/merge_data.py", inputs=inputs)
    inputs = {f"model_name_or_path{name}": {"path": "a"} for name in ("", " of previous", " of start")}
    report_runs.manifest(folder / "iter3/rewarded", script="generation/join_parts.py", inputs=inputs)
    return folder


def make(*words):
    with patch.object(sys, "argv", ["make_dataset.py", *map(str, words)]):
        make_dataset.main()


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    make("--run", run, "--output_dir", folder)
    return folder


@pytest.fixture
def load(tmp_path):
    """`datasets.load_dataset` with a cache of its own, so that nothing of an earlier test is read."""
    return lambda folder, name: datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "cache"))


def test_answers_are_those_of_the_run(run, made, load):
    loaded = load(made, "answers")
    assert list(loaded) == ["train"]
    found, wanted = loaded["train"].to_list(), []
    for i in (1, 2, 3):
        wanted += [(i, row) for row in rows_of(run / f"iter{i}/rewarded.jsonl")]
    assert len(found) == len(wanted) == 60
    for row, (i, record) in zip(found, wanted, strict=True):
        assert row["iteration"] == i and row["policy"] == ("owner/sft" if i == 1 else f"iter{i - 1}")
        for key in ("id", "prompt", "responses", "rewards", "finish_reasons", "num_tokens"):
            assert row[key] == record[key], key
        parts = record.get("reward_parts")
        assert row["reward_parts"] == (
            {"helpful": parts[f"{run}/models/helpful"], "owner/safe": parts["owner/safe"]}
            if parts
            else {"helpful": None, "owner/safe": None}
        )
        sources = [source | {"model": "model"} for source in record.get("response_sources", [])]
        assert [json.loads(source) for source in row["response_sources"] or []] == sources
        assert (json.loads(row["tools"]) if row["tools"] else None) == record.get("tools")
    assert not any("token_ids" in key for key in found[0])
    whole = [pyarrow.parquet.read_table(path) for path in sorted((made / "answers").iterdir())]
    texts = [text for table in whole for texts in table["responses"].to_pylist() for text in texts]
    assert texts == [text for _, record in wanted for text in record["responses"]]


def test_pairs_are_those_of_each_iterations_own_answers(run, made, load):
    """Once each, though the second training took those of the first, too."""
    loaded = load(made, "pairs")
    for split, ours in (("train", "train"), ("test", "eval")):
        wanted = []
        for i in (1, 2):
            pairs = rows_of(run / f"iter{i}/pairs.jsonl")
            wanted += [(i, p) for p in pairs if f"iter{i}/" in p["source"] and p["split"] == ours]
        found = loaded[split].to_list()
        assert len(found) == len(wanted) > 5
        for row, (i, pair) in zip(found, wanted, strict=True):
            keys = ("id", "prompt", "chosen", "rejected", "margin", "chosen_index", "rejected_index")
            assert {key: row[key] for key in keys} == {key: pair[key] for key in keys}
            scores = (row["score_chosen"], row["score_rejected"])
            assert scores == (pair["chosen_reward"], pair["rejected_reward"]) and row["iteration"] == i
    assert len(loaded["train"]) + len(loaded["test"]) == 39  # one prompt of 40 has equal rewards


def test_the_card_tells_lineage_and_counts_and_nothing_of_this_machine(run, made):
    text, data = (made / "README.md").read_text(), huggingface_hub.DatasetCard.load(made / "README.md").data
    assert data.license == "unknown" and "licences of the models" in text
    named = [f for c in data.configs for split in c["data_files"] for f in split["path"]]
    assert {str(path.relative_to(made)) for path in made.rglob("*.parquet")} == set(named)
    pairs = [row["split"] for row in rows_of(run / "iter1/pairs.jsonl")]
    for row in (
        "start policy | owner/sft",
        "rewards from | rm",
        "prompts | mine.jsonl",
        f"1 | owner/sft | 20 | 80 | {pairs.count('train')} | {pairs.count('eval')}",
        "3 | iter2, iter1, owner/sft | 20 | 80 | 0 | 0",
        "generation | temperature | `0.7`",
        'run | train_on | `"all"`',
        "prompt has N tokens, more than N | 2",
        "mine.jsonl record N: no text | 1",
        "equal rewards | 1",
        "pairs that training took from elsewhere, or from an earlier iteration | 19",
    ):
        assert f"| {row} |" in text, row
    assert "Pairs of iteration 3 were not chosen yet." in text and "torch 2.13.0+cpu" in text
    for path in (path for path in made.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert str(run.parent).encode() not in content and SECRET.encode() not in content, path


def test_a_second_start_does_nothing_and_another_folder_gets_the_same_bytes(run, made, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make("--run", run, "--output_dir", made)
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    (tmp_path / "again.tmp").mkdir()
    (tmp_path / "again.tmp/torn.parquet").write_text("of a start that was killed")
    make("--run", run, "--output_dir", tmp_path / "again")
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    assert len(files) == 8 and sorted(p.name for p in tmp_path.iterdir()) == ["again", "again.manifest.json"]
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes(), name


def test_a_run_that_went_on_is_refused_by_name_and_made_again_when_told(run, tmp_path, load):
    copy, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(run, copy)
    later = (copy / "iter3").rename(tmp_path / "later")
    make("--run", copy, "--output_dir", out)
    later.rename(copy / "iter3")
    with pytest.raises(UserError, match=r"iterations was \[1, 2\] and is now \[1, 2, 3\].*--overwrite true$"):
        make("--run", copy, "--output_dir", out)
    assert len(load(out, "answers")["train"]) == 40
    make("--run", copy, "--output_dir", out, "--overwrite", "true")
    assert len(load(out, "answers")["train"]) == 60
    choose(copy, 3, copy / "iter3/rewarded.jsonl")
    with pytest.raises(UserError, match=r"pairs was \[1, 2\] and is now \[1, 2, 3\]"):
        make("--run", copy, "--output_dir", out)


def test_what_cannot_be_read_is_counted(tmp_path, capsys, load):
    run = report_runs.make_run(tmp_path / "run", 1, prompts=6, evaluated=False)
    choose(run, 1, run / "iter1/rewarded.jsonl")
    for name in ("rewarded", "pairs"):
        rows = rows_of(run / f"iter1/{name}.jsonl")
        rows[1].pop("prompt")
        report_runs.write(run / f"iter1/{name}.jsonl", rows)
    make("--run", run, "--output_dir", tmp_path / "out")
    told = capsys.readouterr().out
    assert "left out: 1 answers that cannot be read" in told and "1 pairs that cannot be read" in told
    assert len(load(tmp_path / "out", "answers")["train"]) == 5


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("rewarded", "num_tokens", [2**40, 1, 2, 3]), ("pairs", "chosen_index", "first")],
)
def test_a_value_that_no_column_can_hold_is_refused_and_nothing_left(tmp_path, name, field, value, load):
    run = report_runs.make_run(tmp_path / "run", 1, prompts=6, evaluated=False)
    choose(run, 1, run / "iter1/rewarded.jsonl")
    path = run / f"iter1/{name}.jsonl"
    rows = rows_of(path)
    report_runs.write(path, [rows[0] | {field: value}, *rows[1:]])
    with pytest.raises(UserError, match=r"iter1.parquet of the data set cannot hold .*; repair the record$"):
        make("--run", run, "--output_dir", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    report_runs.write(path, rows)
    make("--run", run, "--output_dir", tmp_path / "out")
    assert len(load(tmp_path / "out", "answers")["train"]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--run RUN", "give --output_dir FOLDER, --push_dataset NAME, or both"),
        ("--run RUN/iter1 --output_dir OUT", "is no run's folder: it has no loop.yaml"),
        ("--run RUN/ppo --output_dir OUT", "was trained by PPO, which keeps no rewarded answers"),
        ("--run RUN/fresh --output_dir OUT", "has rewarded answers yet"),
        ("--run RUN --output_dir .", "--output_dir . is there already: name a folder in it"),
        ("--run RUN --output_dir RUN/iter1", "is there and was not made by this script"),
        ("--run RUN --output_dir RUN/iter1 --overwrite true", "is there and was not made by this script"),
    ],
)
def test_refusals(tmp_path, words, message):
    run = report_runs.make_run(tmp_path / "run", 1, prompts=4, evaluated=False)
    report_runs.make_run(run / "ppo", 1, kind="ppo", prompts=4, evaluated=False)
    report_runs.make_run(run / "fresh", 1, upto=0, prompts=4, evaluated=False)
    before = {path: path.stat().st_mtime_ns for path in (run / "iter1").rglob("*")}
    with pytest.raises(UserError, match=message):
        make(*words.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")).split())
    assert before == {path: path.stat().st_mtime_ns for path in (run / "iter1").rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no lock either


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "messages with more fields, and tools"])
def test_trl_trains_on_the_pairs_as_they_are(tmp_path, load, rich):
    """Before its first step the policy is the reference, so the loss is ln 2; then it falls."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    run = report_runs.make_run(tmp_path / "run", 1, prompts=24, evaluated=False)
    rows = rows_of(run / "iter1/rewarded.jsonl")
    if rich:
        rows[0]["prompt"][0]["name"], rows[1]["tools"] = "Ann", TOOLS
        report_runs.write(run / "iter1/rewarded.jsonl", rows)
    choose(run, 1, run / "iter1/rewarded.jsonl")
    make("--run", run, "--output_dir", tmp_path / "out")
    pairs = load(tmp_path / "out", "pairs")
    policy = micro.make_policy(tmp_path / "policy")
    config = DPOConfig(
        str(tmp_path / "trained"), max_steps=2, per_device_train_batch_size=8, logging_steps=1, use_cpu=True,
        bf16=False, report_to=[], learning_rate=1e-2, lr_scheduler_type="constant", max_length=128,
        gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy),
        args=config,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
    )
    first, row = pairs["train"][0], trainer.train_dataset[0]
    written = tokenizer.apply_chat_template(first["prompt"], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(row["prompt_ids"]) == written
    assert tokenizer.decode(row["chosen_ids"]).startswith(first["chosen"][0]["content"])
    assert len(trainer.train_dataset) == len(pairs["train"]) > len(trainer.eval_dataset) > 1
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and len(losses) == 2
    assert trainer.evaluate()["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_trl_s_sft_trainer_trains_on_what_sft_chose(tmp_path, load):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    run = report_runs.make_run(tmp_path / "run", 1, prompts=24, evaluated=False)
    choose(run, 1, run / "iter1/rewarded.jsonl", rejected=False)
    make("--run", run, "--output_dir", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "SFTTrainer" in text and "rejected" not in text and "cannot be read" not in text
    pairs, best = load(tmp_path / "out", "pairs"), {}
    for row in rows_of(run / "iter1/rewarded.jsonl"):
        k = row["rewards"].index(max(row["rewards"]))
        best[row["id"]] = (k, row["responses"][k], row["rewards"][k])
    for row in [*pairs["train"], *pairs["test"]]:
        [completion] = row["completion"]
        assert (row["chosen_index"], completion["content"], row["score_chosen"]) == best.pop(row["id"])
        assert not [key for key in row if "rejected" in key]
    assert not best
    policy = micro.make_policy(tmp_path / "policy")
    config = SFTConfig(
        str(tmp_path / "trained"), max_steps=1, per_device_train_batch_size=8, logging_steps=1, use_cpu=True,
        bf16=False, report_to=[], gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(policy),
        args=config,
        train_dataset=pairs["train"],
        processing_class=(tokenizer := AutoTokenizer.from_pretrained(policy)),
    )
    assert len(trainer.train_dataset) == len(pairs["train"])
    learnt = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(learnt).startswith(pairs["train"][0]["completion"][0]["content"])
    trainer.train()


# The hub, which cannot be reached from here; see tests/hub_stub.py.


def test_push_uploads_what_the_folder_holds(run, made, tmp_path):
    """Alone, without a folder that is kept, a private data set; what earlier iterations left is replaced."""
    script = ROOT / make_dataset.SCRIPT
    with hub_stub.serving() as stub:
        stub.files["answers/iter9.parquet"] = b"of another run"
        start(
            *("--run", run, "--push_dataset", "someone/mine"),
            script=script, HF_TOKEN="hf_secret", **stub.environment,
        )  # fmt: skip
        [asked] = stub.created
        assert (asked["name"], asked["type"], asked["visibility"]) == ("mine", "dataset", "private")
        files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
        assert set(stub.files) == files
        for name in files - {"README.md"}:
            assert stub.files[name] == (made / name).read_bytes()
        refused = start(
            *("--run", run, "--push_dataset", "someone/mine", "--output_dir", tmp_path / "kept"),
            script=script, status=2, HF_TOKEN="hf_wrong", **stub.environment,
        )  # fmt: skip
    assert "cannot make or reach the repository someone/mine; log in with `hf auth login`" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "kept").exists()


def test_a_push_that_fails_names_the_command_for_later(run, tmp_path, monkeypatch):
    monkeypatch.setattr(make_dataset, "make_repository", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **args: 1 / 0)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"later: hf upload me/x {out} --repo-type dataset$"):
        make("--run", run, "--output_dir", out, "--push_dataset", "me/x")
    assert (out / "README.md").is_file()
    with pytest.raises(UserError, match="later: start the same command again$"):
        make("--run", run, "--push_dataset", "me/x")


def test_folders_of_this_machine_are_cut_and_addresses_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/rm").mkdir(parents=True)
    for text, shown in {
        "/root/a b/c": "a b/c",
        "/data/x/rm": "rm",
        "~/models/rm/": "",
        "./models/rm": "rm",
        "models/rm": "rm",
        "owner/name": "owner/name",
        "see /data/x/y.jsonl record 3": "see y.jsonl record 3",
        "'/data/x/y', /z/w": "'y', w",
        "https://host/a/b": "https://host/a/b",
        "file:///data/x": "x",
        "and/or, 1/2": "and/or, 1/2",
    }.items():
        assert without_folders({"k": [text]}) == {"k": [shown]}, text
