"""Arguments of run_dpo.py: defaults against the YAML, settings for TRL, and refusals before torch is
imported.
"""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import training
import yaml
from training import ROOT

from common.cli import UserError, build, convert, parse
from common.manifest import fingerprint
from dpo_iteration import packing, run_dpo, settings
from dpo_iteration.run_dpo import Arguments


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with rewarded answers and something that looks like a model; the current one."""
    monkeypatch.chdir(tmp_path)
    training.write_rewarded("rewarded.jsonl", 4)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    return ["--model_name_or_path", "policy", "--train_dir", "rewarded.jsonl", "--output_dir", "out"]


def parsed(*argv):
    args = parse(settings.with_passthrough(Arguments), "", list(argv))
    return args, settings.given(args, Arguments)


def checked(*argv):
    args, extra = parsed(*argv)
    settings.check(args, extra)
    settings.check_paths(args)


def refusal(*argv):
    """The one line with which `main` refuses these arguments."""
    with pytest.raises(UserError) as caught:
        checked(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_and_defaults_agree():
    values = yaml.safe_load((ROOT / "configs" / "training.yaml").read_text())
    hints = {f.name: f.type for f in dataclasses.fields(Arguments)}
    defaults = {}
    for field in dataclasses.fields(Arguments):
        made = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if made else field.default
    for key, value in values.items():
        assert key in hints, f"{key} of training.yaml is no argument"
        if defaults[key] is not dataclasses.MISSING:
            assert convert(key, value, hints[key]) == defaults[key], key


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_launcher_configs_are_known_to_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    assert config.num_processes == 8
    assert getattr(config, "mixed_precision", None) in (None, "no")  # bf16 stands in the training YAML, once
    if name.startswith("zero3"):
        assert config.deepspeed_config["zero3_save_16bit_model"] is True
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_settings_named_here_are_known_to_trl():
    assert {*settings.QUIET, *settings.REFUSED} <= set(settings.config_fields())


def test_fields_read_from_source_are_those_of_the_class():
    from trl import DPOConfig

    assert set(settings.config_fields()) == {f.name for f in dataclasses.fields(DPOConfig)}


def test_settings_of_trl_are_passed_on_with_their_types(files, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "adam_beta1: 0.8\nlr_scheduler_kwargs: {num_cycles: 2}\ndisable_dropout: false\nloss_weights: [1, "
        "0.5]\n"
    )
    more = ["--precompute_ref_batch_size", "4", "--pad_to_multiple_of", "8"]
    args, extra = parsed(str(config), *files, *more, "--loss_type", "sigmoid", "sft")
    assert extra == {
        "adam_beta1": 0.8,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "disable_dropout": False,
        "loss_weights": [1, 0.5],
        "precompute_ref_batch_size": 4,
        "pad_to_multiple_of": 8,
    }
    run_dpo.accumulate(args, 8)
    got = settings.training_config(args, extra, Arguments, False)
    assert (got.adam_beta1, got.pad_to_multiple_of, got.disable_dropout) == (0.8, 8, False)
    assert (got.learning_rate, got.max_length, got.beta, got.label_smoothing) == (5e-7, 2048, 0.1, 0.1)
    assert (
        got.gradient_accumulation_steps == 16
        and got.lr_scheduler_type == "cosine"
        and got.save_strategy == "no"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rat", "1"], "did you mean '--learning_rate'"),
        (["--adam_beta_1", "1"], "did you mean '--adam_beta1'"),
        (["--choose_type", "best"], "max_min, max_max"),
        (["--label_smoothing", "0.5"], "below 0.5"),
        (["--loss_type", "ipo"], "ipo has no label smoothing: give --label_smoothing 0"),
        (["--loss_type", "sigmoid", "robust"], "cannot be shared by sigmoid and robust"),
        (["--loss_type", "dpo"], "TRL has aot"),
        (["--length_penalty", "0.1"], "max_min_p only"),
        (["--eval_fraction", "1"], "below 1"),
        (["--max_prompt_length", "2048"], "below --max_length 2048"),
        (["--num_train_epochs", "0"], "nothing to train"),
        (["--beta", "0"], "above 0"),
        (["--beta", "nan"], "above 0"),
        (["--deepspeed", '{"a": 1}'], "accelerate launch --config_file"),
        (["--fp16", "true"], "choose bf16"),
        (["--bf16_full_eval", "true"], "not taken here"),
        (["--padding_free", "true"], "TRL 1.16 ignores it"),
        (["--model_init_kwargs", '{"dtype": "bfloat16"}'], "must not set dtype"),
        (["--model_init_kwargs", '{"attn_implementation": "eager"}'], "give --attn_implementation"),
        (["--model_init_kwargs", '{"quantization_config": {}}'], "--load_in_4bit true"),
        (["--dataloader_drop_last", "true"], "the pairs that are left"),
        (["--report_to", "tensorbord"], "one of none, wandb"),
        (["--train_dir", "rewardet.jsonl"], "there is rewarded.jsonl"),
        (["--train_dir", "policy"], "is a folder"),
        (["--chat_template", "none.jinja"], "no such chat template"),
        (["--model_name_or_path", "./polcy"], "no such folder"),
        (["--ref_model_name_or_path", "."], "no model folder"),
        (["--output_dir", "policy"], "is --model_name_or_path itself"),
    ],
)
def test_what_cannot_work_is_refused(files, extra, message):
    assert message in refusal(*files, *extra)  # the later of two wins on a command line


def test_an_unknown_key_in_yaml_names_the_nearest_of_trl(files, tmp_path):
    (tmp_path / "c.yaml").write_text("f_divergence_typ: js_divergence\n")
    assert "did you mean 'f_divergence_type'" in refusal(str(tmp_path / "c.yaml"), *files)


def test_zero3_without_a_loadable_model_is_refused(files, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "zero3_save_16bit_model: true" in refusal(*files)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true")
    checked(*files)


def test_more_processes_than_gpus_are_refused_without_torch(files, tmp_path):
    """As on a machine with two GPUs, eight processes launched; and nothing heavy is imported before any
    refusal.
    """
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: H'; echo 'GPU 1: H'\n")
    smi.chmod(0o755)
    program = (
        "import sys, atexit; sys.argv = sys.argv[1:]\n"
        "atexit.register(lambda: print('HEAVY', [m for m in ('torch', 'transformers', 'trl') if m in "
        "sys.modules]))\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    base = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env = base | {"PATH": f"{smi.parent}:{os.environ['PATH']}", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}
    command = [sys.executable, "-c", program, training.SCRIPT, *files]
    done = subprocess.run(command, env=env | {"RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "HEAVY []\n"
    assert (
        "--num_processes 2" in done.stderr and len(done.stderr.splitlines()) == 1
    )  # what other ranks say: tests/common/test_cli.py


def test_a_missing_yaml_offers_the_real_one():
    done = training.start("./config/training.yaml")
    assert (
        done.returncode == 2
        and "there is configs/training.yaml" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_help_shows_our_arguments_only():
    done = training.start("--help")
    assert done.returncode == 0 and "--label_smoothing" in done.stdout and "--adam_beta1" not in done.stdout
    assert "accelerate launch --config_file ./configs/zero2.yaml" in done.stdout


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ({"rewards": [1.0] * 4}, [], "no pairs in rewarded.jsonl (4 records; skipped: 4 equal rewards)"),
        ({}, ["--min_margin", "1e9"], "4 margin below min_margin"),
        ({}, ["--eval_fraction", "0.9999999999"], "all 4 pairs are held out"),
        (
            {"responses": ["one"], "rewards": [1.0], "finish_reasons": ["stop"], "num_tokens": [1]},
            [],
            "fewer than two responses",
        ),
    ],
)
def test_no_pairs_is_an_error_that_says_why(files, monkeypatch, change, argv, message):
    training.write_rewarded("rewarded.jsonl", 4, **change)
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *files, *argv])
    with pytest.raises(UserError) as caught:
        run_dpo.main()
    assert message in str(caught.value)


def test_fewer_pairs_than_processes(files, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *files])
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="4 training pairs for 8 processes .*--num_processes 4"):
        run_dpo.main()


def test_where_trl_makes_the_batches_they_have_to_divide():
    """Rows of our own need not: the pairs of a step are laid out over the processes there are."""
    args = SimpleNamespace(
        gradient_accumulation_steps=None, per_device_train_batch_size=1, global_batch_size=12
    )
    with pytest.raises(UserError, match="12 does not divide by 8 processes"):
        run_dpo.accumulate(args, 8)
    run_dpo.accumulate(args, 6)
    assert args.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--loss_type", "aot", "--share_prompts", "true", "--per_device_train_batch_size", "2"],
            "depends on which pairs share a pass",
        ),
        (
            ["--loss_type", "sft", "sigmoid", "--label_smoothing", "0", "--margin_weight", "1"],
            "cannot be used where",
        ),
        (["--ld_alpha", "0.5", "--margin_scale", "1"], "ld_alpha is TRL's own"),
        (
            ["--loss_type", "ipo", "--label_smoothing", "0", "--margin_scale", "1"],
            "--margin_scale is defined for",
        ),
        (["--loss_type", "aot"], "with --per_device_train_batch_size 1 it is sigmoid"),
        (["--save_only_model", "true"], "could not continue"),
        (["--precompute_ref_log_probs", "false"], "always computed before training"),
        (["--sync_ref_model", "true"], "computed once, before training"),
        (["--max_row_tokens", "0"], "must be above 0"),
        (["--pairs_per_prompt", "0"], "must be above 0"),
        (["--margin_scale", "-1"], "must not be negative"),
    ],
)
def test_settings_of_rows_and_margins_that_cannot_be(files, monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *files, *argv])
    with pytest.raises(UserError, match=message):
        run_dpo.main()


def test_weights_by_margin():
    rows = [{"margin": 1.0}, {"margin": 4.0}]
    assert packing.weights(rows, 0.0) is None
    assert packing.weights(rows, 1.0) == [0.4, 1.6] and packing.weights(rows, 0.5) == pytest.approx(
        [2 / 3, 4 / 3]
    )


def test_a_folder_of_unknown_origin_is_refused(files, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *files])
    with pytest.raises(UserError, match="has no manifest"):
        run_dpo.main()


def test_a_half_done_output_of_other_settings_is_refused(files, monkeypatch, tmp_path):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "out.manifest.json").write_text(
        json.dumps({"complete": False, "settings": {"beta": 0.5}, "inputs": {}})
    )
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *files])
    with pytest.raises(UserError, match="half done with other settings: beta was 0.5 and is now 0.1"):
        run_dpo.main()


def test_a_checkpoint_of_another_number_of_processes_is_refused(files, monkeypatch, tmp_path):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    args, extra = parsed(*files)
    shaped, inputs = run_dpo.shaping(args, extra, 2)
    marks = {key: fingerprint(name) for key, name in inputs.items() if name is not None}
    manifest = {"complete": False, "settings": shaped, "inputs": marks, "num_processes": 2}
    (tmp_path / "out.manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *files])
    with pytest.raises(UserError, match="num_processes was 2 and is now 1"):
        run_dpo.main()


@pytest.mark.parametrize(
    "pairs, given, processes, expected",
    [
        (20000, {}, 8, 128),
        (512, {}, 8, 128),
        (511, {}, 8, 64),
        (40, {}, 1, 8),
        (40, {"per_device_train_batch_size": 16}, 1, 16),
        (3, {}, 1, 1),
        (40, {"gradient_accumulation_steps": 128}, 1, 128),
        (40, {"global_batch_size": 6}, 1, 6),
        (40, {}, 8, 8),
        (40, {}, 3, 128),
    ],
)
def test_few_pairs_get_smaller_steps(pairs, given, processes, expected):
    args = build(
        run_dpo.Arguments, {"model_name_or_path": "a/b", "train_dir": ["x"], "output_dir": "y"} | given
    )
    assert run_dpo.halved(run_dpo.pairs_per_step(args, processes), pairs, args, processes) == expected
