"""run_dpo.py on preference data: the layouts of the hub's sets, alone, and beside rewarded answers."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from training import ROOT, alone, logged, read_json, read_jsonl, write_rewarded
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.chat import ChatTemplate
from common.cli import UserError
from dpo_iteration.rows import PairTokenizer

FEW = "--bf16 false --max_steps 2 --gradient_accumulation_steps 4 --learning_rate 1e-3"
COUNT = 12


def turn(role, text):
    return {"role": role, "content": text}


def binarized(i, asked, good, bad):
    sides = {"chosen": good, "rejected": bad}
    return {side: [turn("user", asked), turn("assistant", text)] for side, text in sides.items()} | {
        "prompt": asked,
        "score_chosen": 7.0 + i,
        "score_rejected": 7.0,
    }


def strings(i, asked, good, bad):
    return {"prompt": asked, "chosen": good, "rejected": bad}


def helpsteer(i, asked, good, bad):
    first, second = (good, bad) if i % 2 else (bad, good)
    strength = -2 if i % 2 else 2
    return {"prompt": asked, "response_1": first, "response_2": second, "preference_strength": strength}


def nectar(i, asked, good, bad):
    answers = [{"answer": text, "rank": rank} for text, rank in ((bad, 3), (f"{good}?", 2), (good, 1))]
    return {"prompt": f"\n\nHuman: {asked}\n\nAssistant: ", "answers": answers}


def ultrafeedback(i, asked, good, bad):
    rated = [{"response": text, "overall_score": score} for text, score in ((bad, 3.5), (good, 8.0))]
    return {"instruction": asked, "completions": rated}


def anthropic(i, asked, good, bad):
    sides = {"chosen": good, "rejected": bad}
    return {side: f"\n\nHuman: {asked}\n\nAssistant: {text}" for side, text in sides.items()}


MARGINS = {binarized: None, strings: 1.0, helpsteer: 2.0, nectar: 2.0, ultrafeedback: 4.5, anthropic: 1.0}


def write(path, make, count=COUNT):
    rows = [make(i, f"Question {i}?", f"a{'a' * (i % 5)} {i}", f"b {i}") for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("make", MARGINS, ids=lambda make: make.__name__)
def test_every_layout_trains_on_what_it_prefers(work, train, make):
    out = train(f"from_{make.__name__}", FEW, f"--train_dir {write(work / f'{make.__name__}.jsonl', make)}")
    pairs = read_jsonl(f"{out}.pairs.jsonl")
    # Its first record has equal scores in one layout: that is no preference.
    first = 1 if make is binarized else 0
    assert len(pairs) == COUNT - first
    for i, pair in enumerate(pairs, first):
        assert pair["prompt"] == [turn("user", f"Question {i}?")]
        assert pair["chosen"] == [turn("assistant", f"a{'a' * (i % 5)} {i}")]
        assert pair["rejected"] == [turn("assistant", f"b {i}")]
        assert pair["margin"] == (MARGINS[make] or i)
    counts, card = read_json(f"{out}.manifest.json")["counts"], (out / "README.md").read_text()
    assert counts["train_pairs"] == len(pairs) and len(logged(out)) == 2
    assert "online" not in card and "on pairs chosen from preference data." in card
    assert "| rewards from | the preference data |" in card


def test_broken_records_are_listed_and_the_others_train(work, train, capsys):
    path = write(work / "broken.jsonl", strings)
    with open(path, "a") as file:
        file.write('{"prompt": "a", "chosen": 1, "rejected": "b"}\n{"prompt": "a", "chosen": "x"\n')
    out = train("from_broken", FEW, f"--train_dir {path}")
    skipped = read_jsonl(f"{out}.pairs.skipped.jsonl")
    assert len(skipped) == 2 and all(one["reason"].startswith("bad record: ") for one in skipped)
    assert "`chosen` is '1', a text or a list of messages was expected (record 13)" in skipped[0]["reason"]
    assert "skipped 2 (2 bad record)" in capsys.readouterr().out
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match="holds neither rewarded answers .* its fields are prompt, answer"):
        train("no_layout", FEW, f"--train_dir {path}")
    with pytest.raises(UserError, match="no such .*missing.parquet|missing.parquet"):
        train("missing", FEW, f"--train_dir {work}/missing.parquet")


@pytest.fixture(scope="module")
def to_row(work):
    return PairTokenizer(ChatTemplate(AutoTokenizer.from_pretrained(work / "policy")), 2048, 1024)


def test_mixed_with_rewarded_answers_by_weight(work, train, to_row):
    """The first step's loss is Σ w·loss / Σ w over all pairs of both, each computed alone in float64."""
    write_rewarded(work / "online.jsonl", count=7)
    offline, more = write(work / "offline.jsonl", strings, count=5), "--loss_type simpo --label_smoothing 0"
    files = f"--train_dir {work}/online.jsonl {offline} --train_weights 1.0 0.25 --beta 2"
    out = train("mixed", FEW, files, more, "--gradient_accumulation_steps 12 --num_train_epochs 1")
    model, losses, weights = AutoModelForCausalLM.from_pretrained(work / "policy"), [], []
    for pair in read_jsonl(f"{out}.pairs.jsonl"):
        row = to_row(pair)[0]
        with torch.no_grad():
            chosen, rejected = alone(model, row)
        difference = 2 * (chosen / len(row["chosen_ids"]) - rejected / len(row["rejected_ids"])) - 0.5
        losses.append(float(torch.nn.functional.softplus(-difference)))
        weights.append(pair["loss_weight"])
        assert pair["loss_weight"] == (1.0 if pair["source"].endswith("online.jsonl") else 0.25)
    assert sorted(weights) == [0.25] * 5 + [1.0] * 7
    want = sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
    assert logged(out)[0]["loss"] == pytest.approx(want, abs=1e-5)
    assert abs(want - sum(losses) / 12) > 1e-4  # the weights matter
    card = (out / "README.md").read_text()
    assert f"{offline} (chosen and rejected, weight 0.25)" in card
    assert f"{work}/online.jsonl (rewarded answers, weight 1)" in card
    assert "from rewarded answers and preference data" in card and "online-rlhf" in ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--train_weights 1 2",
            "1.0 2.0: a number above 0 for each of --train_dir was expected, which names 1",
        ),
        ("--train_weights 0", "a number above 0"),
        ("--train_weights 2 --ld_alpha 0.5", "--train_weights cannot be used where ld_alpha"),
    ],
)
def test_weights_that_mean_nothing_are_refused(train, words, message):
    with pytest.raises(UserError, match=message):
        train("refused", FEW, words)


def test_a_split_of_a_saved_data_set(work, train):
    from datasets import Dataset, DatasetDict

    rows = read_jsonl(write(work / "split.jsonl", binarized))
    DatasetDict({"train_prefs": Dataset.from_list(rows)}).save_to_disk(work / "saved")
    out = train("from_split", FEW, f"--train_dir {work}/saved --dataset_split train_prefs")
    assert len(read_jsonl(f"{out}.pairs.jsonl")) == COUNT - 1
    train("from_split", FEW, f"--train_dir {work}/saved --dataset_split train_prefs")  # nothing to do
    with pytest.raises(UserError, match="has no split 'train'; it has train_prefs"):
        train("other_split", FEW, f"--train_dir {work}/saved")


def test_the_offline_configs_are_the_recipe_on_preferences():
    """The baseline differs from the loop's training in its data and epochs alone, as it says."""
    for offline, online in (("llama3_8b", "training"), ("tiny", "training_tiny")):
        one, other = (
            yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
            for name in (f"offline_dpo_{offline}", online)
        )
        differ = {key for key in one if key in other and one[key] != other[key]}
        assert differ == {"train_dir", "output_dir", "num_train_epochs"} & other.keys()
