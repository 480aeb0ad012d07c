"""Sisters of DPO by one setting, through run_dpo.py: SFT on the best of K and on a random one, SimPO, CPO."""

import pytest
import torch
from training import (
    LLAMA_8B,
    alone,
    argv,
    launch,
    logged,
    read_json,
    read_jsonl,
    save_config,
    start,
    weights,
    write_rewarded,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.chat import ChatTemplate
from dpo_iteration import fitting, memory
from dpo_iteration.checks import arguments
from dpo_iteration.rows import PairTokenizer

ONE = "--bf16 false --learning_rate 2e-3 --gradient_accumulation_steps 24 --max_steps 2 --eval_fraction 0.25"


def rows_of(work, pairs):
    template = ChatTemplate(AutoTokenizer.from_pretrained(work / "policy"))
    to_row = PairTokenizer(template, 2048, 1024)
    return [to_row(pair)[0] for pair in pairs]


@pytest.fixture(scope="module")
def model(work):
    return AutoModelForCausalLM.from_pretrained(work / "policy")


def test_sft_trains_on_the_best_of_k_without_a_reference(work, train, model, capsys):
    """Its first loss is the mean -log p of the chosen tokens, computed one sequence at a time in float64."""
    nowhere = f"--ref_model_name_or_path {work}/none --reference_cache {work}/no_cache"
    out = train("sft", ONE, "--loss_type sft", nowhere)
    pairs = read_jsonl(work / "sft.pairs.jsonl")
    for pair, row in zip(pairs, read_jsonl(work / "rewarded.jsonl"), strict=True):
        assert pair["chosen_reward"] == max(row["rewards"])
        assert pair["chosen"][0]["content"] == row["responses"][pair["chosen_index"]]
        assert pair["margin"] == max(row["rewards"]) - min(row["rewards"])
        assert not [key for key in pair if key.startswith("rejected")]
    nll = tokens = 0
    for row in rows_of(work, [pair for pair in pairs if pair["split"] == "train"]):
        with torch.no_grad():
            nll -= alone(model, row | {"rejected_ids": row["chosen_ids"]})[0]
        tokens += len(row["chosen_ids"])
    first, second = logged(out)
    assert first["loss"] == pytest.approx(float(nll / tokens), abs=1e-5) and second["loss"] < first["loss"]
    assert not [name for name in first if "rewards/" in name or "rejected" in name]
    said, card = capsys.readouterr().out, (out / "README.md").read_text()
    counts = read_json(work / "sft.manifest.json")["counts"]
    assert f"training on {counts['train_pairs']} responses" in said and "no reference" in said
    assert "rejected" not in said and not (work / "no_cache").exists()
    assert (
        "supervised fine-tuning (loss `sft`) on the best one of the answers to each prompt, from rewarded"
        in card
    )
    assert "| reference | none: the loss looks at none |" in card and "accuracy" not in card
    assert "\n- sft\n" in card and "label_smoothing" not in card and "| beta" not in card


def test_padded_sft_is_packed_sft(work, train):
    packed = train("packed", ONE, "--loss_type sft")
    padded = train("padded", ONE, "--loss_type sft --share_prompts false --per_device_train_batch_size 2")
    assert logged(padded)[1]["loss"] == pytest.approx(logged(packed)[1]["loss"], abs=1e-5)


def test_the_control_is_a_random_one_of_k(work, train):
    """As many prompts, responses that the reward did not choose."""
    out = train("control", ONE, "--loss_type sft --choose_type blind")
    picked = [pair["chosen_index"] for pair in read_jsonl(work / "control.pairs.jsonl")]
    assert len(picked) == 24 and set(picked) == {0, 1, 2, 3}
    assert (
        "on a random one of the answers to each prompt, from rewarded answers"
        in (out / "README.md").read_text()
    )
    two = train("control2", ONE, "--choose_type blind")
    margins = [pair["margin"] for pair in read_jsonl(work / "control2.pairs.jsonl")]
    assert len(margins) == 24 and min(margins) < 0 < max(margins)
    assert "drawn without a look at the rewards" in (two / "README.md").read_text()


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_preference_losses_without_a_reference_train(work, train, model, name):
    out = train(name, ONE, f"--loss_type {name} --label_smoothing 0 --beta 2 --simpo_gamma 0.8")
    pairs, losses = [p for p in read_jsonl(f"{out}.pairs.jsonl") if p["split"] == "train"], []
    rows = rows_of(work, pairs)
    mean = sum(len(row["chosen_ids"]) for row in rows) / len(rows)
    for row in rows:
        with torch.no_grad():
            chosen, rejected = (float(value) for value in alone(model, row))
        a, b = len(row["chosen_ids"]), len(row["rejected_ids"])
        difference = 2 * (chosen / a - rejected / b) - 0.8 if name == "simpo" else 2 * (chosen - rejected)
        loss = torch.nn.functional.softplus(torch.tensor(-difference, dtype=torch.float64))
        losses.append(float(loss) - (chosen / mean if name == "cpo" else 0.0))
    log = logged(out)
    assert (
        log[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4) and "rewards/margins" in log[0]
    )
    card, settings = (out / "README.md").read_text(), read_json(f"{out}.manifest.json")["settings"]
    assert f"by preference optimization (loss `{name}`) on pairs" in card and f"\n- {name}\n" in card
    assert settings.get("simpo_gamma") == (0.8 if name == "simpo" else None)


def test_one_answer_a_prompt_is_enough_for_sft(work, train, tmp_path):
    write_rewarded(tmp_path / "one.jsonl", count=8, K=1)
    before = weights(work / "policy")
    after = weights(train("single", ONE, "--loss_type sft", f"--train_dir {tmp_path}/one.jsonl"))
    assert max((after[name] - before[name]).abs().max() for name in before) > 0
    assert len(read_jsonl(work / "single.pairs.jsonl")) == 8


def test_memory_counts_no_reference_where_there_is_none(tmp_path):
    given = {"model_name_or_path": save_config(tmp_path, **LLAMA_8B), "train_dir": "r", "output_dir": "o"}
    shape = memory.shape_of(given["model_name_or_path"])
    for loss_type, there in (("sigmoid", True), ("sft", False)):
        args = arguments(given | {"loss_type": loss_type})
        needed = memory.need("zero2", shape, 8, 1, 512, **fitting.adapted(args, shape))
        assert bool(needed.reference) == there
    table = fitting.report(arguments(given | {"loss_type": "sft"}), 8, 80.0)
    assert [line for line in table if line.startswith("zero2 ")][0].split()[4] == "0.0"


def test_sft_under_zero2_is_that_of_one_process(work, train):
    """Means over tokens of both processes, not means of their means."""
    more = "--bf16 false --loss_type sft --max_steps 1 --learning_rate 2e-3"
    one = train("alone", more, "--gradient_accumulation_steps 8")
    start(*argv(work, "two", more, "--gradient_accumulation_steps 4"), launcher=launch("zero2"))
    assert logged(work / "two")[0]["loss"] == pytest.approx(logged(one)[0]["loss"], abs=1e-5)
    grads = [logged(folder)[0]["grad_norm"] for folder in (one, work / "two")]
    assert grads[0] == pytest.approx(grads[1], rel=1e-4)
