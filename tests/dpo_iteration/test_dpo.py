"""The trainer against TRL's: the same steps, the same losses, the same log; what it refuses; what it leans
on.
"""

import dataclasses
import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from training import make_rows, reset
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer

from common import shared_prompts
from common.cli import UserError
from dpo_iteration import models
from dpo_iteration.dpo import IterativeDPOTrainer, loss_settings, robust_equivalent
from dpo_iteration.losses import LOSSES, Loss
from dpo_iteration.packing import Steps, collate_packed, columns_of

ROOT = Path(__file__).resolve().parents[2]
PAIRS, PER_STEP = 22, 8


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Nothing of other tests' mixed precision, which accelerate keeps for the process; one thread."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    reset()


def rows_with_reference(count=PAIRS, seed=0):
    """Rows whose reference is another model than the policy, so that losses and margins are not those of step
    0.
    """
    rows = make_rows(count, seed)
    for i, row in enumerate(rows):
        row |= {
            "ref_chosen_logps": -5.0 * len(row["chosen_ids"]) - i % 3,
            "ref_rejected_logps": -5.2 * len(row["rejected_ids"]),
        }
    return rows


def settings(folder, **more):
    defaults = {
        "max_steps": 10,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": PER_STEP,
        "per_device_eval_batch_size": 8,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
        "seed": 5,
    }
    return DPOConfig(output_dir=str(folder), **defaults | more)


def policy(architecture="llama"):
    torch.manual_seed(0)
    config = micro.make_config(micro.make_tokenizer(), architecture, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


class Plain(DPOTrainer):
    """TRL's own trainer on rows that are tokenised and have their reference."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset


def trl(folder, rows, held_out, architecture="llama", **more):
    return Plain(
        model=policy(architecture),
        args=settings(folder, **more),
        processing_class=micro.make_tokenizer(),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
    )


def ours(
    folder, rows, held_out, sharing=True, architecture="llama", own=True, weights=None, budget=200, **more
):
    """Our trainer; `own` false: with TRL's batches and loss."""
    margin_scale, budget = more.pop("margin_scale", 0.0), budget if sharing else None
    args, steps = settings(folder, **more), [None, None]
    if own:
        costs = [[columns_of(row) for row in part] for part in (rows, held_out)]
        tokens = [[len(row["chosen_ids"]) for row in part] for part in (rows, held_out)]
        steps = [
            Steps(costs[0], PER_STEP, budget, 4, weights=weights, tokens=tokens[0], seed=args.seed, epochs=4),
            Steps(costs[1], len(held_out), budget, 4, tokens=tokens[1]),
        ]
        args.gradient_accumulation_steps = steps[0].accumulation
    data = [Dataset.from_list(part) for part in (rows, held_out)]
    return IterativeDPOTrainer(
        model=policy(architecture),
        args=args,
        processing_class=micro.make_tokenizer(),
        train_dataset=data[0],
        eval_dataset=data[1],
        rows={"train": rows, "eval": held_out},
        steps=steps[0],
        eval_steps=steps[1],
        sharing=sharing and own,
        settings=dataclasses.replace(loss_settings(args), margin_scale=margin_scale),
    )


def run(trainer):
    """(logs of the steps, metrics of the evaluation, weights)."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    evaluation = trainer.evaluate()
    return steps, evaluation, {name: one.detach().clone() for name, one in trainer.model.named_parameters()}


def assert_same_course(one, other, tolerance=1e-4):
    """Losses, gradients and what is logged of two runs agree step by step; so do evaluation and weights."""
    (steps, evaluation, weights), (steps2, evaluation2, weights2) = one, other
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
    times = ("runtime", "per_second", "epoch", "num_tokens", "total_flos", "tokens/")
    for mine, theirs in [*zip(steps, steps2, strict=True), (evaluation, evaluation2)]:
        for name in {name for name in theirs if not any(part in name for part in times)}:
            where = (name, theirs.get("step"))
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), where
    for name, weight in weights.items():
        assert (weight - weights2[name]).norm() <= tolerance * weights2[name].norm(), name


# Rows that fill the steps without a rest, which TRL computes in one pass each: its means of means are means
# then.
WHOLE = rows_with_reference(24), rows_with_reference(8, seed=1)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_ten_steps_follow_trls(tmp_path, architecture):
    theirs = run(trl(tmp_path, *WHOLE, architecture))
    for sharing in (True, False):
        assert_same_course(run(ours(tmp_path, *WHOLE, sharing, architecture)), theirs)


def test_checkpointing_and_the_size_of_rows_change_nothing(tmp_path):
    want = run(ours(tmp_path, *WHOLE))
    for budget, checkpointing in ((90, False), (5000, True)):
        assert_same_course(
            run(ours(tmp_path, *WHOLE, budget=budget, gradient_checkpointing=checkpointing)), want, 1e-5
        )


LOSSES_OF_TRL = [  # each formula is held against TRL's in test_losses.py
    {"loss_type": "ipo"},
    {"loss_type": "exo_pair", "label_smoothing": 0.1},
    {"loss_type": "discopop", "discopop_tau": 0.1},
]


@pytest.mark.parametrize("more", LOSSES_OF_TRL)
def test_other_losses_follow_trls(tmp_path, more):
    more = more | {"max_steps": 2, "learning_rate": 1e-4}
    assert_same_course(run(ours(tmp_path, *WHOLE, **more)), run(trl(tmp_path, *WHOLE, **more)))


# A step is one pass of TRL's, whose mean over a pass' tokens is then ours over a step's.
@pytest.mark.parametrize("sharing", [True, False])
def test_sft_beside_another_loss_follows_trls(tmp_path, sharing):
    more = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "max_steps": 2}
    theirs = run(trl(tmp_path, *WHOLE, **more))
    assert_same_course(run(ours(tmp_path, *WHOLE, sharing, **more)), theirs)


@pytest.mark.parametrize("sharing", [True, False])
def test_sft_follows_trls_sft_trainer(tmp_path, sharing):
    """Loss, norm of the gradient, accuracy and weights, step by step, where a step has several passes of
    responses of many lengths, and the last of an epoch fewer rows.
    """
    rows, held_out = ([row | {"rejected_ids": []} for row in rows_with_reference(n, n)] for n in (22, 7))
    trainer = ours(tmp_path, rows, held_out, sharing, max_steps=6, loss_type="sft", budget=150)
    assert trainer.args.gradient_accumulation_steps > 1
    trainer.train()
    his = trls_sft(tmp_path, rows, held_out)
    his.train()
    mine, want = ([e for e in one.state.log_history if "loss" in e] for one in (trainer, his))
    assert len(mine) == 6
    for entry, other in zip(mine, want, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert not [name for name in entry if "rejected" in name or "rewards/" in name]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(his.evaluate()["eval_loss"], rel=1e-5)
    weights = dict(his.model.named_parameters())
    for name, weight in trainer.model.named_parameters():
        assert (weight - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


def trls_sft(folder, rows, held_out):
    """TRL's SFTTrainer on the chosen responses of rows, in passes of 2."""
    data = [
        Dataset.from_list(
            [
                {
                    "input_ids": row["prompt_ids"] + row["chosen_ids"],
                    "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
                }
                for row in part
            ]
        )
        for part in (rows, held_out)
    ]
    same = settings(folder)
    names = "max_steps learning_rate bf16 use_cpu report_to logging_steps save_strategy disable_tqdm seed"
    given = {name: getattr(same, name) for name in (*names.split(), "max_length", "gradient_checkpointing")}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 8}
    args = SFTConfig(
        str(folder),
        **given | sizes | {"max_steps": 6, "gradient_accumulation_steps": PER_STEP // 2},
        completion_only_loss=True,
    )
    return SFTTrainer(
        policy(),
        args,
        processing_class=micro.make_tokenizer(),
        train_dataset=data[0],
        eval_dataset=data[1],
    )


TRLS = [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    {"loss_type": "aot"},
    {"use_weighting": True},
    {"ld_alpha": 0.5},
]


@pytest.mark.parametrize("more", TRLS)
def test_what_is_trls_own_is_trls(tmp_path, more):
    mine, theirs = (
        ours(tmp_path, *WHOLE, own=False, max_steps=3, **more),
        trl(tmp_path, *WHOLE, max_steps=3, **more),
    )
    assert_same_course(run(mine), run(theirs), 1e-6)


def test_in_trls_own_loss_sigmoid_is_conservative_dpo_too(tmp_path):
    trainer = ours(tmp_path, *WHOLE, own=False, **TRLS[0], label_smoothing=0.1)
    assert trainer.loss_types == ["robust", "sft"]
    assert trainer.label_smoothing == robust_equivalent(0.1) == pytest.approx(-0.125)
    assert (trainer.args.loss_type, trainer.args.label_smoothing) == (["sigmoid", "sft"], 0.1)  # the user's
    conservative = run(ours(tmp_path, *WHOLE, own=False, max_steps=3, label_smoothing=0.1))
    assert_same_course(run(ours(tmp_path, *WHOLE, max_steps=3, label_smoothing=0.1)), conservative)


def test_the_mean_over_a_step_is_over_its_pairs(tmp_path):
    """The last step of an epoch has 6 of 22 pairs: its loss is their mean, wherever they lie."""
    rows = rows_with_reference(22)
    steps, evaluation, _ = run(ours(tmp_path, rows, rows[:5], learning_rate=0.0, max_steps=3, budget=120))
    trainer = ours(tmp_path, rows, rows[:5], learning_rate=0.0)
    of_pair = [float(run_pair(trainer, row)) for row in rows]
    order = torch.randperm(22, generator=torch.Generator().manual_seed(5)).tolist()
    for n, entry in enumerate(steps):
        want = [of_pair[i] for i in order[8 * n : 8 * n + 8]]
        assert entry["loss"] == pytest.approx(sum(want) / len(want), abs=1e-4)
    assert evaluation["eval_loss"] == pytest.approx(sum(of_pair[:5]) / 5, abs=1e-5)


def run_pair(trainer, row):
    with torch.no_grad():
        return trainer._compute_loss(trainer.model, collate_packed([row | {"scale": 1.0}]), False)


def test_weights_and_margins_reach_the_loss(tmp_path):
    rows, held_out = WHOLE
    plain, _, before = run(ours(tmp_path, rows, held_out, max_steps=1))
    weights = [0.5 + i % 2 for i in range(24)]
    weighted, _, other = run(ours(tmp_path, rows, held_out, max_steps=1, weights=weights))
    offset, _, third = run(ours(tmp_path, rows, held_out, max_steps=1, margin_scale=0.1))
    assert len({round(found[0]["loss"], 5) for found in (plain, weighted, offset)}) == 3
    for entry, after in ((weighted[0], other), (offset[0], third)):
        assert entry["rewards/margins"] == pytest.approx(plain[0]["rewards/margins"])
        assert any((before[name] != after[name]).any() for name in before)


# The first row is looked at


def test_a_row_that_is_computed_wrongly_stops_the_run(tmp_path, monkeypatch):
    true = shared_prompts._mask
    monkeypatch.setattr(shared_prompts, "_mask", lambda *given: true(*given).roll(1, 0))
    message = r"packed rows give .* differ from the padded ones by .*--share_prompts false"
    with pytest.raises(UserError, match=message):
        ours(tmp_path, *WHOLE).train()


def test_the_first_row_is_computed_padded_too(tmp_path, capsys):
    trainer = ours(tmp_path, *WHOLE, max_steps=1)
    trainer.train()
    [said] = [line for line in capsys.readouterr().out.splitlines() if "packing check passed" in line]
    assert float(re.search(r"max difference (\S+) per token", said)[1]) < 1e-5 and trainer.checked
    assert trainer.model.config._attn_implementation == shared_prompts.NAME


def test_dropout_is_not_taken_for_a_wrong_row(tmp_path):
    trainer = ours(tmp_path, *WHOLE, max_steps=2, disable_dropout=False)
    mlp = trainer.model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.3))
    trainer.train()
    assert trainer.checked and trainer.model.training


# Which models can share


@pytest.mark.parametrize(
    "architecture, more, expected",
    [
        ("llama", {}, ""),
        ("qwen3", {}, ""),
        ("gemma2", {}, ""),
        ("llama", {"attention_dropout": 0.3}, ""),  # it is switched off
        ("nemotron", {}, "do not hand on"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
        ("mamba", {}, "recurrent"),
    ],
)
def test_models_that_cannot_share_are_known_before_anything_is_loaded(tmp_path, architecture, more, expected):
    micro.make_config(micro.make_tokenizer(), architecture, **more).save_pretrained(tmp_path)
    names = ("revision", "trust_remote_code", "model_init_kwargs", "disable_dropout")
    args = SimpleNamespace(model_name_or_path=str(tmp_path), **dict.fromkeys(names))
    found = models.reason_against_sharing(args)
    assert (expected in found) if expected else found == ""


# Notices that what dpo.py leans on has moved.


def test_numbers_of_a_batch_stay_as_they_are(tmp_path, monkeypatch):
    """Under DeepSpeed the Trainer casts floats to the model's dtype: -300 in bf16 is off by up to 1."""
    trainer = ours(tmp_path, *WHOLE)
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", property(lambda self: plugin))
    batch = {name: torch.tensor([-300.123]) for name in ("scale", "ref_chosen_logps", "other")}
    prepared = trainer._prepare_inputs(dict(batch))
    assert prepared["other"].dtype == torch.bfloat16  # what TRL's own precomputed values become
    assert all(torch.equal(prepared[name], batch[name]) for name in ("scale", "ref_chosen_logps"))


def test_trl_makes_nothing_for_a_reference(tmp_path, monkeypatch):
    """No hash of the weights; no reference model under FSDP, where TRL loads one for what the rows have."""
    for name in ("hash_module", "create_model_from_path"):
        monkeypatch.setattr(dpo_trainer, name, lambda *_, **__: pytest.fail("called"))
    before, start = dpo_trainer.hash_module, Trainer.create_accelerator_and_postprocess

    def with_fsdp(self):
        start(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
    assert ours(tmp_path, *WHOLE).ref_model is None and dpo_trainer.hash_module is before


def test_what_is_overridden_is_there():
    for name in ("_prepare_dataset", "_precompute_ref_logps", "_compute_loss", "create_model_card"):
        assert callable(getattr(DPOTrainer, name))


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    """A function with `@loss()` in losses.py is all that it takes."""
    monkeypatch.setitem(LOSSES, "mine", Loss(LOSSES["sigmoid"].compute))
    assert_same_course(
        run(ours(tmp_path, *WHOLE, loss_type="mine", max_steps=2)), run(ours(tmp_path, *WHOLE, max_steps=2))
    )


def test_trl_is_the_pinned_version():
    [pin] = re.findall(r"^trl==(\S+)", (ROOT / "requirements-train.txt").read_text(), re.M)
    assert importlib.metadata.version("trl") == pin == "1.16.0"
