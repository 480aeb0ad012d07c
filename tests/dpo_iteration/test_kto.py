"""KTO through run_dpo.py against TRL's KTOTrainer; its KL is one of an optimizer step, however that is laid
out.
"""

import json
import shutil

import micro
import pytest
from datasets import Dataset
from training import argv, furthest, launch, logged, make_rows, read_json, read_jsonl, start, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from common.chat import ChatTemplate
from common.cli import UserError
from dpo_iteration.packing import Steps
from dpo_iteration.rows import PairTokenizer, add_mismatched

BETA, PER_STEP, STEPS = 0.5, 7, 4
LEARNING = {"learning_rate": 5e-4, "max_steps": STEPS, "seed": 42}
# 14 of the 24 pairs are trained on, in steps of 7.
KTO = (
    f"--loss_type kto --label_smoothing 0 --bf16 false --eval_fraction 0.25 --beta {BETA} "
    f"--gradient_accumulation_steps {PER_STEP} --desirable_weight 1.5 --undesirable_weight 0.7 "
    + " ".join(f"--{key} {value}" for key, value in LEARNING.items())
)


@pytest.fixture(scope="module")
def begin(work):
    return micro.make_policy(work / "begin", seed=7)


@pytest.fixture
def kto(work, begin, train):
    """Train by KTO in this process: `kto(NAME, WORDS…)`."""
    return lambda name, *more: train(name, *words(work), *more)


def words(work):
    """With another reference than the start, so that the first KL is not 0."""
    return KTO, f"--model_name_or_path {work}/begin --ref_model_name_or_path {work}/policy"


def rows_of(work, name):
    """{split: rows of the chosen pairs}, each with the next one of them, which has other answers."""
    to_row = PairTokenizer(ChatTemplate(AutoTokenizer.from_pretrained(work / "policy")), 2048, 1024)
    found = {"train": [], "eval": []}
    for pair in read_jsonl(work / f"{name}.pairs.jsonl"):
        found[pair["split"]].append(to_row(pair)[0])
    for split, rows in found.items():
        following = [*rows[1:], (rows if split == "train" else found["train"])[0]]
        for row, other in zip(rows, following, strict=True):
            row["others"] = other
    return found


class Plain(KTOTrainer):
    """TRL's own trainer on rows that are tokenised."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def examples(rows):
    """Both responses of each row as TRL's examples."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": row[f"{side}_ids"],
                "KL_completion_ids": row["others"][f"{side}_ids"],
                "label": side == "chosen",
            }
            for row in rows
            for side in ("chosen", "rejected")
        ]
    )


def trls(work, rows):
    order = Steps([0] * len(rows["train"]), PER_STEP, seed=42)
    steps = [step for epoch in (0, 1) for step in order.steps(epoch)][:STEPS]
    args = KTOConfig(
        output_dir=str(work / "trls"),
        **LEARNING,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        per_device_train_batch_size=2 * PER_STEP,
        per_device_eval_batch_size=2 * len(rows["eval"]),
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    load = AutoModelForCausalLM.from_pretrained
    trainer = Plain(
        load(work / "begin"),
        load(work / "policy"),
        args,
        train_dataset=examples([rows["train"][i] for step in steps for i in step]),
        eval_dataset=examples(rows["eval"]),
        processing_class=AutoTokenizer.from_pretrained(work / "policy"),
    )
    trainer.train()
    return trainer


SHARED = (
    "loss grad_norm kl rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected".split()
)


@pytest.mark.parametrize("how", ["packed", "padded"])
def test_it_is_trls(work, kto, how):
    """Losses, gradients, KL, log and weights of four steps, and what is measured on held-out pairs."""
    more = "--max_row_tokens 400" if how == "packed" else "--share_prompts false"
    out = kto(how, more)
    theirs = trls(work, rows_of(work, how))
    steps = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert min(entry["kl"] for entry in steps) > 0.01  # else it would have been cut off at 0
    for mine, his in zip(logged(out), steps, strict=True):
        assert {key: mine[key] for key in SHARED} == pytest.approx(
            {key: his[key] for key in SHARED}, rel=1e-4
        )
    metrics, held_out = read_json(f"{out}.manifest.json")["metrics"], theirs.evaluate()
    for key in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected"):
        assert metrics[key] == pytest.approx(held_out[key], rel=1e-4)
    final = dict(theirs.model.named_parameters())
    assert furthest(weights(out), final) < 1e-5 < 1e-3 < furthest(weights(work / "begin"), final)


LONG = pytest.mark.long


@pytest.mark.parametrize("config", ["zero2", *(pytest.param(one, marks=LONG) for one in ("zero3", "fsdp2"))])
def test_two_processes_train_what_one_trains(work, kto, config):
    """A mean of each process' own would be another KL: they have different pairs."""
    one = kto("one", "--gradient_accumulation_steps 6 --overwrite true")
    more = "--gradient_accumulation_steps 3 --gradient_checkpointing true"
    start(*argv(work, config, *words(work), more), launcher=launch(config))
    for mine, theirs in zip(logged(work / config), logged(one), strict=True):
        assert {key: mine[key] for key in ("loss", "kl")} == pytest.approx(
            {key: theirs[key] for key in ("loss", "kl")}, abs=1e-5
        )
    assert furthest(weights(work / config), weights(one)) < 1e-5


def test_a_training_continues_inside_an_epoch(work, kto, capfd):
    """After step 3 of 4, of which 2 are an epoch."""
    whole = weights(kto("whole", "--save_steps 3 --keep_checkpoints"))
    (work / "whole" / "config.json").unlink()  # as if it had been killed
    manifest = read_json(work / "whole.manifest.json") | {"complete": False}
    (work / "whole.manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(work / "whole" / "checkpoint-4", ignore_errors=True)
    capfd.readouterr()
    again = kto("whole", "--save_steps 3 --keep_checkpoints")
    said = capfd.readouterr().out
    assert "continuing from" in said and "step 4/4" in said and "step 3/4" not in said
    assert furthest(weights(again), whole) < 1e-6


def test_a_kl_below_0_is_0(work, begin, train):
    """Policy and reference exchanged: the mean log-ratio of the first step has the other sign."""
    models = f"--model_name_or_path {work}/policy --ref_model_name_or_path {work}/begin"
    [step] = logged(train("exchanged", KTO, models, "--max_steps 1"))
    assert step["kl"] == 0 and step["loss"] > 0


def test_what_it_is_called(work, kto):
    out = kto("called")
    card, manifest = (out / "README.md").read_text(), read_json(f"{out}.manifest.json")
    assert "by preference optimization (loss `kto`) on pairs chosen" in card and "\n- kto\n" in card
    assert f"| z0 | {manifest['metrics']['kl']:.4f} | {manifest['metrics']['eval_kl']:.4f} |" in card
    assert manifest["settings"]["desirable_weight"] == 1.5


# Answers to other prompts


def test_they_are_of_the_next_pair_with_another_prompt(tmp_path):
    rows = make_rows(6)
    for i, prompt in enumerate(("a", "a", "b", "c", "c", "a")):  # several pairs of a prompt
        rows[i]["prompt_ids"] = [1, *map(ord, prompt * 5)]
    limit = 20
    add_mismatched(rows, rows, limit)
    for row, other in zip(rows, (2, 2, 3, 5, 5, 2), strict=True):
        found = row["mismatched"]
        assert found["prompt_ids"] == row["prompt_ids"]
        for side in ("chosen_ids", "rejected_ids"):
            assert found[side] == rows[other][side][: limit - 6]
    assert any(len(rows[other]["chosen_ids"]) > limit - 6 for other in (2, 3, 5))  # some were cut


def test_held_out_pairs_change_no_answer_of_a_trained_one():
    rows = make_rows(5)
    add_mismatched(rows[:4], rows[:4], 2048)
    add_mismatched(rows[4:], rows[4:] + rows[:4], 2048)
    assert rows[3]["mismatched"]["chosen_ids"] == rows[0]["chosen_ids"]
    assert rows[4]["mismatched"]["chosen_ids"] == rows[0]["chosen_ids"]


def test_one_prompt_alone_is_refused():
    rows = [row | {"prompt_ids": [1, 2]} for row in make_rows(3)]
    with pytest.raises(UserError, match="all pairs have the same one"):
        add_mismatched(rows, rows, 2048)
