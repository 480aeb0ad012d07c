"""Arguments of run_dpo.py: defaults and the YAML, settings for TRL, refusals before torch is imported."""

import dataclasses
import os
import subprocess
import sys
import typing
from types import SimpleNamespace

import pytest
import training
import yaml
from training import ROOT

from common.cli import UserError, build, convert, parse
from dpo_iteration import arguments, checks, losses, packing, run_dpo, trl_arguments
from dpo_iteration.arguments import Arguments


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with rewarded answers and something that looks like a model; the current one."""
    monkeypatch.chdir(tmp_path)
    training.write_rewarded("rewarded.jsonl", 4)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    return ["--model_name_or_path", "policy", "--train_dir", "rewarded.jsonl", "--output_dir", "out"]


def checked(*argv):
    args = parse(Arguments, "", list(argv))
    checks.check(args)
    checks.check_paths(args)


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


def test_an_output_whose_manifest_is_that_of_the_answers_is_refused(files):
    for name in ("rewarded", os.path.abspath("rewarded")):
        assert "would write the manifest of rewarded.jsonl" in refusal(*files, "--output_dir", name)


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


def test_the_list_of_trls_settings_is_that_of_the_version_installed():
    """After a change of the pin: bring dpo_iteration/trl_arguments.py up to date."""
    from trl import DPOConfig

    theirs = {field.name: str(field.type) for field in dataclasses.fields(DPOConfig)}
    ours = {field.name for field in arguments.OURS}
    assert {*trl_arguments.NAMES} == theirs.keys() - ours
    assert {*checks.REFUSED} | trl_arguments.MIXED <= {*trl_arguments.NAMES}
    for name, hint in typing.get_type_hints(trl_arguments.TRLArguments).items():
        kind = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        kind = (typing.get_origin(kind) or kind).__name__
        assert kind in ("str", "dict") or kind in theirs[name], f"{name} of {hint} is {theirs[name]} in TRL"


def test_settings_of_trl_are_passed_on_with_their_types(files, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "{adam_beta1: 0.8, lr_scheduler_kwargs: {num_cycles: 2}, disable_dropout: false, "
        "loss_weights: [1, 0.5], logging_strategy: 'no'}"
    )
    more = ["--pad_to_multiple_of", "8", "--optim_target_modules", "[a, b]", "--adam_epsilon", "1e-7"]
    args = parse(Arguments, "", [str(config), *files, *more, "--loss_type", "sigmoid", "sft"])
    assert trl_arguments.given(args) == {
        "adam_beta1": 0.8,
        "adam_epsilon": 1e-7,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "disable_dropout": False,
        "loss_weights": [1.0, 0.5],
        "logging_strategy": "no",
        "pad_to_multiple_of": 8,
        "optim_target_modules": ["a", "b"],
    }
    from dpo_iteration.dpo import make_config

    got = make_config(args, arguments.accumulation(args, 128, 8), False)
    assert (got.adam_beta1, got.pad_to_multiple_of, got.disable_dropout) == (0.8, 8, False)
    assert (got.learning_rate, got.max_length, got.beta, got.label_smoothing) == (5e-7, 2048, 0.1, 0.1)
    assert got.gradient_accumulation_steps == 16 and got.save_strategy == "no"


def test_a_resolved_section_is_complete_and_resolves_to_itself():
    values = {"beta": "5e-2", "learning_rate": "1e-6", "adam_beta1": 0.8}
    found = arguments.resolve(values, {"beta": 0.2})
    assert found["beta"] == 0.2 and found["learning_rate"] == 1e-6 and found["adam_beta1"] == 0.8
    assert found["choose_type"] == "max_min" and found["loss_type"] == ["sigmoid"] and found["seed"] == 42
    required = {"model_name_or_path", "train_dir", "output_dir"}
    assert found.keys() == {field.name for field in arguments.OURS} - required | {"adam_beta1"}
    assert arguments.resolve(yaml.safe_load(yaml.safe_dump(found))) == found
    decided = {"model_name_or_path": "owner/model", "train_dir": "a.jsonl", "output_dir": "b"}
    assert checks.arguments(found | decided, "loop.yaml").beta == 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bta": 0.1}, "unknown key 'bta' in here, did you mean 'beta'"),
        ({"beta": "much"}, "beta in here: 'much' is not a number"),
        ({"hub_token": "secret"}, "export HF_TOKEN"),
    ],
)
def test_what_cannot_be_resolved_is_refused(values, message):
    with pytest.raises(UserError, match=message) as caught:
        arguments.resolve(values, where="here")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--learning_rat 1", "did you mean '--learning_rate'"),
        ("--adam_beta_1 1", "did you mean '--adam_beta1'"),
        ("--choose_type best", "max_min, max_max"),
        ("--label_smoothing 0.5", "below 0.5"),
        ("--loss_type ipo", "ipo has no label smoothing: give --label_smoothing 0"),
        ("--loss_type sigmoid robust", "cannot be shared by sigmoid and robust"),
        ("--loss_type dpo", "there are aot"),
        ("--loss_type aot", "with --per_device_train_batch_size 1 it is sigmoid"),
        (
            "--loss_type aot --share_prompts true --per_device_train_batch_size 2",
            "depends on which pairs share a pass",
        ),
        ("--loss_type aot --margin_weight 1 --per_device_train_batch_size 2", "cannot be used where"),
        ("--loss_type sft --use_weighting true", "sft cannot be used where use_weighting is TRL's own"),
        ("--loss_type simpo --ld_alpha 0.5", "simpo cannot be used where ld_alpha is TRL's own"),
        ("--loss_type kto", "kto has no label smoothing: give --label_smoothing 0"),
        ("--loss_type kto --label_smoothing 0 --margin_scale 1", "--margin_scale is defined for"),
        (
            "--loss_type kto --label_smoothing 0 --ld_alpha 0.5",
            "kto cannot be used where ld_alpha is TRL's own",
        ),
        (
            "--loss_type kto --label_smoothing 0 --desirable_weight 0",
            "--desirable_weight 0.0 must be above 0",
        ),
        ("--undesirable_weight 2", "--undesirable_weight is used by --loss_type kto only, not by sigmoid"),
        ("--loss_type sft --choose_type random", "give max_min, the best, or blind, a random one"),
        ("--choose_type blind --min_margin 1", "--min_margin means nothing with --choose_type blind"),
        ("--ld_alpha 0.5 --margin_scale 1", "ld_alpha is TRL's own"),
        ("--loss_type ipo --label_smoothing 0 --margin_scale 1", "--margin_scale is defined for"),
        ("--length_penalty 0.1", "max_min_p only"),
        ("--eval_fraction 1", "below 1"),
        ("--max_prompt_length 2048", "below --max_length 2048"),
        ("--num_train_epochs 0", "nothing to train"),
        ("--beta nan", "above 0"),
        ("--max_row_tokens 0", "above 0"),
        ("--margin_scale -1", "must not be negative"),
        ("--margin_scale inf", "--margin_scale inf: a finite number was expected"),
        ("--loss_type simpo --label_smoothing 0 --simpo_gamma nan", "--simpo_gamma nan: a finite number"),
        ("--loss_type sft sigmoid --loss_weights nan 1", "--loss_weights nan 1.0: a finite number"),
        ("--loss_type sft sigmoid --loss_weights 1", "--loss_weights 1.0: a number for each of --loss_type"),
        ("--fp16 true", "choose bf16"),
        ("--precompute_ref_log_probs false", "always computed before training"),
        ('--model_init_kwargs {"dtype":"bfloat16"}', "must not set dtype"),
        ("--report_to tensorbord", "one of none, wandb"),
        ("--train_dir rewardet.jsonl", "there is rewarded.jsonl"),
        ("--chat_template none.jinja", "no such chat template"),
        ("--model_name_or_path ./polcy", "no such folder"),
        ("--ref_model_name_or_path .", "no model folder"),
        ("--output_dir policy", "is --model_name_or_path itself"),
    ],
)
def test_what_cannot_work_is_refused(files, extra, message):
    assert message in refusal(*files, *extra.split())  # the later of two wins on a command line


@pytest.mark.parametrize("key", checks.REFUSED)
def test_settings_of_trl_that_are_decided_here_are_refused_with_the_reason(files, key):
    given = '{"a":1}' if key == "deepspeed" else "4" if key.endswith("size") else "true"
    assert f"--{key} is not taken here: {checks.REFUSED[key]}" == refusal(*files, f"--{key}", given)


def test_zero3_without_a_loadable_model_is_refused(files, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "zero3_save_16bit_model: true" in refusal(*files)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true")
    checked(*files)


def test_more_processes_than_gpus_are_refused_without_torch(files, tmp_path):
    """As on a machine with two GPUs, eight processes launched."""
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
    # What other ranks say: tests/common/test_cli.py.
    assert "--num_processes 2" in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_shows_our_arguments_only(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Arguments, run_dpo.__doc__, ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--label_smoothing" in said and "--adam_beta1" not in said
    assert "accelerate launch --config_file ./configs/zero2.yaml" in said


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ({"rewards": [1.0] * 4}, [], "no pairs in rewarded.jsonl (4 records; skipped: 4 equal rewards)"),
        ({}, ["--eval_fraction", "0.9999999999"], "all 4 pairs are held out"),
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
    args = SimpleNamespace(gradient_accumulation_steps=None, per_device_train_batch_size=1)
    with pytest.raises(UserError, match="12 does not divide by 8 processes"):
        arguments.accumulation(args, 12, 8)
    assert arguments.accumulation(args, 12, 6) == 2


def test_weights_by_margin():
    rows = [{"margin": 1.0}, {"margin": 4.0}]
    assert packing.weights(rows, 0.0) is None
    assert packing.weights(rows, 1.0) == [0.4, 1.6]
    assert packing.weights(rows, 0.5) == pytest.approx([2 / 3, 4 / 3])


def test_what_shapes_a_model():
    given = {"model_name_or_path": "a/b", "train_dir": ["x"], "output_dir": "y"}
    plain = arguments.training_of(build(Arguments, given))
    assert plain.inputs == {
        "train_dir 1": "x",
        "model_name_or_path": "a/b",
        "ref_model_name_or_path": "a/b",
        "chat_template": None,
    }
    assert plain.checkpoint_settings == {"num_processes": 1}
    assert not {"output_dir", "logging_steps", "global_batch_size", "lora_r"} & plain.settings.keys()
    for more, processes, changed in (
        ({"save_steps": 2, "dataloader_num_workers": 3, "hub_model_id": "a/c"}, 8, set()),
        ({"global_batch_size": 64}, 1, {"pairs_per_step"}),
        ({"gradient_accumulation_steps": 16}, 8, set()),
        ({"adam_beta1": 0.8}, 1, {"adam_beta1"}),
        ({"use_peft": True}, 1, {"use_peft", *arguments.adapters.SETTINGS}),
        ({"ld_alpha": 0.5}, 1, {"ld_alpha", "per_device_train_batch_size"}),
    ):
        found = arguments.training_of(build(Arguments, given | more), processes)
        assert {key for key, value in found.settings.items() if plain.settings.get(key) != value} == changed


def test_a_loss_of_ones_own_needs_no_other_file(files, monkeypatch):
    monkeypatch.setitem(
        losses.LOSSES, "mine", losses.Loss(lambda pairs, settings: pairs.chosen, smoothed=True)
    )
    checked(*files, "--loss_type", "mine")
    assert "margin_scale is defined for" in refusal(*files, "--loss_type", "mine", "--margin_scale", "1")


@pytest.mark.parametrize(
    "pairs, given, processes, expected",
    [
        (20000, {}, 8, 128),
        (512, {}, 8, 128),
        (511, {}, 8, 64),
        (40, {"per_device_train_batch_size": 16}, 1, 16),
        (3, {}, 1, 1),
        (40, {"gradient_accumulation_steps": 128}, 1, 128),
        (40, {"global_batch_size": 6}, 1, 6),
        (40, {}, 3, 128),
    ],
)
def test_few_pairs_get_smaller_steps(pairs, given, processes, expected):
    args = build(Arguments, {"model_name_or_path": "a/b", "train_dir": ["x"], "output_dir": "y"} | given)
    assert arguments.halved(arguments.pairs_per_step(args, processes), pairs, args, processes) == expected
