"""What --check and --dry_run of both drivers see, say, and leave alone."""

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import micro
import pytest
import yaml

from common import devices, tables
from common.cli import UserError, build
from common.models import check_policy
from loop import check as checks
from loop import estimates, machines, plan, prompt_sets, settings
from ppo.run import PPOPlan

ROOT = Path(__file__).resolve().parents[2]


def drive(script, *arguments, **environment):
    """Run a driver as on a machine without GPUs; returns the finished process."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | environment
    command = ["bash", script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def make_model(folder, architecture, **config):
    """What is looked at before anything runs: a model's config and template, without weights."""
    folder.mkdir()
    shape = {"model_type": "llama", "num_labels": 1, "hidden_size": 64, "num_attention_heads": 2}
    config = {"architectures": [architecture], "max_position_embeddings": 512} | shape | config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(micro.TEMPLATES["llama3"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of models, prompts and functions."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "policy", "LlamaForCausalLM")
    make_model(folder / "reward", "LlamaForSequenceClassification")
    micro.write_prompts(folder / "prompts.jsonl", 40)
    (folder / "heldout.jsonl").write_text('{"prompt": "And this?", "number": 7}\n')
    (folder / "mine.py").write_text("""
print("exit 3")
def good(messages, response, record):
    print("exit 4")
    return record["number"] - len(response)
def gold(messages, response): return 1
def none(messages, response): pass
def trl(completions, **kwargs): return [0.0 for _ in completions]
def nan(messages, response): return float("nan")
def answer(messages, response, record): return record["answer"]
def dies(messages, response):
    import os
    os._exit(9)
""")
    return folder


@pytest.fixture
def given(models, tmp_path, monkeypatch):
    """A function that gives the settings of a small run with some keys changed, on a machine without GPUs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(machines, "visible_gpus", lambda: [])

    def make(**changes):
        values = {
            "run_dir": str(tmp_path / "run"),
            "iterations": 2,
            "without_gpu": True,
            "model_name_or_path": str(models / "policy"),
            "reward_name_or_path": str(models / "reward"),
            "prompts": [str(models / "prompts.jsonl")],
            "heldout_prompts": str(models / "heldout.jsonl"),
            "generation": {"K": 4, "max_input_length": 128, "max_new_tokens": 32},
            "training": "configs/training_tiny.yaml",
        }
        return {k: v for k, v in (values | changes).items() if v is not None}

    return make


@pytest.fixture
def config(given, tmp_path):
    """A function that writes such settings and returns the path of the YAML."""

    def write(**changes):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given(**changes)))
        return tmp_path / "mine.yaml"

    return write


def checked(values):
    """What `--check` says of these settings; a UserError where it refuses."""
    checks.check(plan.Plan(build(settings.LoopSettings, values), planning=True), left=True)


def contents(folder):
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}


def test_check_and_dry_run_write_nothing_into_a_run(config, tmp_path):
    run, given = tmp_path / "run", config()
    fresh = drive("run_loop.sh", given, "--dry_run", "--stop_stage", "0.4")
    assert fresh.returncode == 0 and "get_hf2.py" in fresh.stdout and not run.exists(), fresh.stderr
    (run / "iter1").mkdir(parents=True)
    (run / "loop.yaml").write_text(given.read_text())
    (run / "iter1" / "train.yaml").write_text("beta: 0.1\n")
    before = contents(run)
    other = ("--iterations", 5, "--training_args.beta", 0.2, "--report_to", "wandb")
    for more in (("--check",), ("--dry_run", "--stage", "5.3", "--stop_stage", "5.3")):
        asked = drive("run_loop.sh", given, *other, *more)
        assert asked.returncode == 0 and contents(run) == before, asked.stderr
    # What is printed first writes the settings of this start, which the commands behind it read.
    [write] = [line for line in asked.stdout.splitlines() if "loop/plan.py write" in line]
    assert "--training_args.beta 0.2" in write and "--stage 5.3" in write
    [training] = [line for line in asked.stdout.splitlines() if "run_dpo.py" in line]
    assert f" {run}/loop.yaml:training_args " in training and f" --output_dir {run}/iter5/model " in training


def test_a_run_without_evaluation_is_planned_and_said(config, tmp_path):
    planned = drive("run_loop.sh", config(heldout_prompts=None), "--dry_run")
    assert planned.returncode == 0, planned.stderr
    commands = planned.stdout.split("# policy 0", 1)[1]
    turn, told = ["get_hf2", "merge_data", "get_rewards"], ["run_metrics", "make_report"]
    assert re.findall(r"\w+/(\w+)\.py", commands) == [*turn, *told, "run_dpo"] * 2 + told
    assert "heldout" not in commands


def test_loop_yaml_holds_every_setting(given):
    """Those of training too, and the defaults of what was not given; it can be read as a config again."""
    held = plan.Plan(build(settings.LoopSettings, given(training_args={"beta": 0.3}))).resolved()
    assert held["training_args"]["beta"] == 0.3 and held["training_args"]["learning_rate"] == 3e-4
    assert {"choose_type", "loss_type", "num_train_epochs"} <= held["training_args"].keys()
    assert held["generation"]["top_p"] == 1.0 and held["generation"]["K"] == 4 == held["heldout"]["K"]
    again = plan.Plan(build(settings.LoopSettings, yaml.safe_load(yaml.safe_dump(held)))).resolved()
    assert again == held


def test_check_may_look_at_a_run_that_is_at_work(config, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert drive("run_loop.sh", config(), "--check").returncode == 0
        started = drive("run_loop.sh", config())
        assert started.returncode == 2 and "another run is at work" in started.stderr


def test_a_wrong_setting_is_told_before_anything_is_set_up(config, tmp_path):
    run, made = tmp_path / "run", tmp_path / "made"
    wrong = ("--run_dir", run, "--setup_command", f"touch {made}", "--generation.KK", 4)
    end = drive("run_loop.sh", config(), *wrong)
    assert end.returncode == 2 and "KK" in end.stderr and end.stderr.count("error: ") == 1
    assert not run.exists() and not made.exists()


def test_the_loop_is_planned_without_a_gpu():
    planned = drive("run_loop.sh", "--check", "--num_gpus", 8, "--gpu_memory_gib", 80)
    assert planned.returncode == 0, planned.stderr
    for told in (
        "8 generation processes, 8 training processes, GPUs",
        "zero2 over 8 processes takes about 62 GiB a GPU with rows of 4,096 tokens, gradient checkpointing "
        "off; a GPU has 80, 76 of which",
        "for A100s",
        "on the hub, not looked at: model_name_or_path RLHFlow/LLaMA3-SFT",
        "on the hub, not looked at: reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1",
        "RLHFlow/test_generation_2k: whether they are there",
    ):
        assert told in planned.stderr
    shards = drive("run_loop.sh", "--dry_run", "--num_gpus", 8, "--stop_stage", "0.4").stdout
    assert "CUDA_VISIBLE_DEVICES=7 " in shards and "--my_world_size 8" in shards
    # a run takes those that are here
    refused = drive("run_loop.sh", "configs/loop_tiny.yaml", "--num_gpus", 8)
    assert refused.returncode == 2 and "are for --check and --dry_run" in refused.stderr


YAML = "model_name_or_path: a/b\nprompts: [c/d]\nheldout_prompts: e/f\n"


@pytest.mark.parametrize(
    "text, named",
    [
        ("run_dir: x\n\tseed: 1\n", "is not valid YAML"),
        ("run_dir: x\nseed: 1\nrun_dir: y\n", "'run_dir' is given twice, in lines 1 and 3"),
        (f"{YAML}run_dir: x\n# without_gpu: true\n", "`without_gpu: true` in its YAML"),
        (f"{YAML}without_gpu: yes\n", "missing --run_dir"),
    ],
)
def test_what_is_wrong_with_a_yaml(tmp_path, monkeypatch, text, named):
    monkeypatch.setattr(machines, "visible_gpus", lambda: [])
    (tmp_path / "mine.yaml").write_text(text)
    for kind in (plan.Plan, PPOPlan):
        with pytest.raises(UserError, match=named):
            plan.read(kind, [str(tmp_path / "mine.yaml")], planning=True)


@pytest.mark.parametrize("script", ["run_loop.sh", "run_ppo.sh"])
def test_what_is_wrong_with_a_yaml_is_said_before_any_environment_is_made(tmp_path, script):
    (tmp_path / "mine.yaml").write_text("- run_dir: x\n")
    refused = drive(script, tmp_path / "mine.yaml", envs_dir=str(tmp_path / "envs"))
    assert refused.returncode == 2 and not (tmp_path / "envs").exists()
    assert "it holds a list" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name, named",
    [
        ("none", "it returned None, a number was expected"),
        ("trl", "def trl(messages, response)"),
        ("nan", "gives nan: a finite number was expected"),
        ("answer", "KeyError: 'answer'"),
        ("dies", "status 9"),
    ],
)
def test_a_reward_function_is_called_once(given, models, monkeypatch, name, named):
    monkeypatch.setenv("RLHF_VLLM_ENV", sys.prefix)
    function = {"reward_function": f"{models}/mine.py:{name}"}
    with pytest.raises(UserError) as refused:
        checked(given(annotation=function, reward_name_or_path=None))
    told = str(refused.value)
    assert told.startswith("annotation.reward_function, tried on a made-up response to the first prompt of")
    assert named in told


def test_functions_that_work_are_no_matter(given, models, monkeypatch, capfd):
    """It gets the record's fields, and what it prints does not reach the driver."""
    monkeypatch.setenv("RLHF_VLLM_ENV", sys.prefix)
    functions = {"annotation": {"reward_function": f"{models}/mine.py:good"}, "reward_name_or_path": None}
    checked(given(**functions, gold_function=f"{models}/mine.py:gold"))
    out, err = capfd.readouterr()
    assert out == "" and "was not tried" not in err
    with pytest.raises(UserError, match="^gold_function, tried on a made-up response"):
        checked(given(**functions, gold_function=f"{models}/mine.py:none"))


def test_a_reward_model_is_no_policy(given, models):
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification, which writes no text"):
        checked(given(model_name_or_path=str(models / "reward")))


def test_which_models_write(tmp_path):
    def describe(*names, **more):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": names} | more))

    for names in (["LlamaForCausalLM"], ["Gemma3ForConditionalGeneration"], ["GPT2LMHeadModel"], []):
        describe(*names)
        check_policy(tmp_path)
    describe("ChatGLMModel", auto_map={"AutoModelForCausalLM": "modeling.X"})
    check_policy(tmp_path)
    for name in ("LlamaForRewardModelWithGating", "BertForMaskedLM", "MistralModel"):
        describe(name)
        with pytest.raises(UserError, match=f"is a {name}, which writes no text"):
            check_policy(tmp_path)


def test_head_sizes_of_the_cpu_build(given, tmp_path):
    make_model(tmp_path / "small", "LlamaForCausalLM", num_attention_heads=4)
    with pytest.raises(UserError, match="attention heads of size 16"):
        checked(given(model_name_or_path=str(tmp_path / "small")))


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this a machine with GPUs of a name and as many MiB as nvidia-smi reports, and
    checks the 8B recipe there.
    """
    recipe = yaml.safe_load((ROOT / "configs/loop_llama3_8b.yaml").read_text())

    def check(name, mib, count, **changes):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(machines, "visible_gpus", lambda: [str(k) for k in range(count)])
        monkeypatch.setattr(estimates, "gpu_memory", lambda: mib / 1024)
        monkeypatch.setattr(estimates, "gpu_name", lambda: name)
        checked(recipe | changes)

    return check


def test_advice_for_a_48_gb_card_holds_on_one(machine, capsys):
    """An L40S reports 46068 MiB. What is said of 48 GiB fits there, and what does not fit is not advised."""
    advice = "take configs/zero3.yaml with per_device_train_batch_size 1$"
    with pytest.raises(UserError, match=f"a GPU has 45, 43 of which may be filled; {advice}"):
        machine("NVIDIA L40S", 46068, 4)
    with pytest.raises(UserError, match=advice):
        machine(None, 0, 0, num_gpus=4, gpu_memory_gib=48)
    zero3 = {"accelerate_config": "configs/zero3.yaml"}
    with pytest.raises(UserError, match=advice):  # what is in use is not what is advised
        machine("NVIDIA L40S", 46068, 4, training_args={"per_device_train_batch_size": 4}, **zero3)
    machine("NVIDIA L40S", 46068, 4, **zero3)
    assert "an estimate for L40Ss" in capsys.readouterr().err
    nothing = "no configuration fits: take more or larger GPUs, a max_length below 2048 or LoRA"
    with pytest.raises(UserError, match=nothing):
        machine("small", 4096, 1)
    longer = {"max_length": 16384, "max_prompt_length": 8192}
    with pytest.raises(UserError) as refused:
        machine("small", 4096, 1, training="configs/training_lora.yaml", training_args=longer)
    assert "QLoRA" in str(refused.value) and " LoRA" not in str(refused.value)


def test_hours_follow_the_gpu(machine, capsys):
    for name, key in (
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A10", "A10"),
    ):
        kind, known = devices.speed_of(name)
        assert (kind.name, known) == (key, True)
    for name in ("NVIDIA A10G", "Tesla T4", None):
        kind, known = devices.speed_of(name)
        assert (kind.name, known) == ("A100", False)
    kinds = (devices.speed_of(name)[0] for name in ("A100", "H100"))
    slow, fast = (estimates.estimate(8e9, 20000, 8, 2, 8, kind, True, ["sigmoid"]) for kind in kinds)
    assert fast[1] == pytest.approx(slow[1] * 312 / 989) and fast[0] == pytest.approx(slow[0] * 2.0 / 3.35)
    machine("NVIDIA X1000", 81559, 8)
    assert "an estimate for A100s: nothing is known here of the NVIDIA X1000" in capsys.readouterr().err


def test_hours_count_what_the_loss_looks_at():
    """SFT has neither a reference nor rejected responses, SimPO no reference: 2 of the 18 FLOPs. KTO has 2
    more for each of the two epochs, and for the reference.
    """
    kind, _ = devices.speed_of("A100")
    dpo, simpo, sft, kto = (
        estimates.estimate(8e9, 20000, 8, 2, 8, kind, True, [name])[2]
        for name in ("sigmoid", "simpo", "sft", "kto")
    )
    assert kto == pytest.approx(dpo * 24 / 18)
    assert simpo == pytest.approx(dpo * 16 / 18)
    assert sft == pytest.approx(simpo * (200 + 350) / (200 + 2 * 350))


def test_a_run_that_cannot_learn_is_told(given, capsys):
    few = {"training": "configs/training.yaml"}
    checked(given(**few))
    told = capsys.readouterr().err
    steps = "an iteration of 40 prompts has at most 10 optimizer steps, and at learning_rate 5e-07"
    assert f"this run will hardly learn: {steps}" in told and "bf16 on a CPU is slow" in told
    checked(given(**few, training_args={"learning_rate": 3e-4, "bf16": False}))
    assert "warning" not in capsys.readouterr().err


def test_the_readmes_own_loop_can_learn(given, capsys):
    """The YAML under "Your own run", with models and prompts that are here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [own] = [b for b in re.findall("```yaml\n(.*?)```", text, re.DOTALL) if "run_dir: runs/mine" in b]
    names = ("run_dir", "model_name_or_path", "reward_name_or_path", "prompts", "heldout_prompts")
    own = yaml.safe_load(own) | {name: given()[name] for name in names}
    checked(own)
    assert "warning" not in capsys.readouterr().err and own["without_gpu"]


def test_a_run_of_some_stages_ends_well(tmp_path):
    """Without an evaluation there is no table to print; with one there is.

    `python` stands in for the environment's Python.
    """
    command = (
        "set -euo pipefail; source ./envs.sh; source loop/launch.sh; "
        f"plan[run_dir]={shlex.quote(str(tmp_path))}; python=echo; conclude; echo ended"
    )
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr
    assert "has been measured yet, so there is no table" in done.stderr
    (tmp_path / "iter0").mkdir()
    (tmp_path / "iter0" / "metrics.json").write_text("{}")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"evaluation/run_metrics.py --run {tmp_path}", "ended"], done.stderr


def test_a_process_that_fails_is_told_at_once_and_the_others_go_on(tmp_path):
    """Of those that sample side by side. The processes are stand-ins."""
    work = (
        'echo "error: broken" >&2; [ "$2" != 1 ] || exit 3; '
        'until [ -e told ]; do sleep 0.05; done; touch "whole$2"'
    )
    command = (
        'set -euo pipefail; source ./envs.sh; source loop/launch.sh; cd "$FOLDER"; begins() { :; }; '
        "mode=run; mark=$FOLDER; at='policy 0: sample'; again='the same'; gpu_groups=('' '' ''); "
        "exec {lock}</dev/null; "
        'say() { echo "$*"; touch told; }; shards vllm NUMBER.log bash -c "$WORK" process'
    )
    env = os.environ | {"FOLDER": str(tmp_path), "WORK": work}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and (tmp_path / "whole0").exists() and (tmp_path / "whole2").exists()
    assert done.stderr.splitlines()[0] == "note: process 1 has failed, 2 go on; its log: 1.log"
    assert "error: broken\nlog: 1.log" in done.stderr


@pytest.mark.parametrize("in_use", [True, False])
def test_a_failure_beside_servers_names_their_logs(tmp_path, in_use):
    """Of a trainer, too, whose servers may have ended; not once they were stopped."""
    (tmp_path / "servers/logs").mkdir(parents=True)
    own = [tmp_path / f"servers/logs/server_{port}.log" for port in (8000, 8001)]
    for path in [*own, *([tmp_path / "servers/in_use"] if in_use else [])]:
        path.touch()
    (tmp_path / "train.log").write_text("$ train\nerror: http://127.0.0.1:8000 has ended\n")
    command = (
        'set -euo pipefail; source ./envs.sh; source loop/launch.sh; plan[run_dir]="$0"; at=train; '
        'again="the same"; failed "$0/train.log" 2'
    )
    done = subprocess.run(
        ["bash", "-c", command, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "\nerror: http://127.0.0.1:8000 has ended\nlog: " in done.stderr
    told = [line.partition("a server's own log: ")[2] for line in done.stderr.split("\n")]
    assert [line for line in told if line] == [str(path) for path in own if in_use]


SETTINGS = [("plan", "loop_tiny"), ("online_plan", "online_tiny"), ("../ppo/run", "ppo_tiny")]


@pytest.mark.parametrize("script, given", SETTINGS)
def test_the_settings_are_read_with_nothing_but_pyyaml(script, given):
    """As a bare Python does before any environment is made."""
    program = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "heavy = {'numpy', 'torch', 'transformers', 'jinja2', 'httpx', 'datasets'}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, f"loop/{script}.py", "values", f"configs/{given}.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr


def test_overlap_with_evaluation_sets_is_counted(models, given, tmp_path, capsys):
    """Said with the command that leaves the prompts out; a wrong name is refused."""
    mine, heldout = str(tmp_path / "mine.jsonl"), str(models / "heldout.jsonl")
    texts = [
        "question 2: what is 2 plus 3",
        "Hi; Question 2: What is 2 plus 3",
        "question 1: what is 1 plus 2",
    ]
    Path(mine).write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    prompts, keyed = str(models / "prompts.jsonl"), {"dataset_key": "context_messages"}
    sampled = {"generation": given()["generation"] | keyed, "heldout": {"dataset_key": "prompt"}}
    checked(given(evaluation_sets=[mine, heldout], **sampled))
    told = capsys.readouterr().err.splitlines()
    assert f"check: 2 of 40 prompts of {prompts} overlap with {mine}: 2 exact" in told
    assert f"check: 0 of 40 prompts of {prompts} overlap with {heldout}" in told
    [todo] = [line for line in told if "to leave them out" in line]
    names = (
        f"--dataset_key context_messages --dataset_name_or_path {prompts} --evaluation_sets {mine} {heldout} "
    )
    assert f"python evaluation/find_overlap.py {names}" in todo
    checked(given())
    assert "overlap" not in capsys.readouterr().err
    with pytest.raises(UserError, match="^no such evaluation set: .*mine.json; there is .*mine.jsonl"):
        checked(given(evaluation_sets=[str(tmp_path / "mine.json")]))


def test_sets_on_the_hub_are_compared_by_a_start(given, monkeypatch):
    """STAND-INS for data sets on the hub, one of which is out of reach: that is a note."""

    def read(name, split):
        if "gone" in name:
            raise UserError(f"cannot load {name}")
        assert (name, split) in (("owner/bench:main", "test"), ("owner/prompts", "train"))
        return iter([{"question": "What is it?"}] if split == "test" else [{"prompt": "what is IT"}])

    monkeypatch.setattr(tables, "read_data_set", read)
    monkeypatch.setattr(tables, "splits_of", lambda name: ["train", "test"])
    values = given(prompts=["owner/prompts"], evaluation_sets=["owner/bench:main", "owner/gone"])
    told = {}
    for planning in (True, False):
        found = checks.Findings()
        run = plan.Plan(build(settings.LoopSettings, values), planning)
        prompt_sets.check_evaluation_sets(run, found)
        told[planning] = found.notes
        assert not found.problems
    [line] = told[True]
    assert line.startswith(
        "on the hub, not compared for overlap: owner/bench:main, owner/gone; the start does it"
    )
    assert told[False][:2] == [
        "not compared for overlap: cannot load owner/gone",
        "1 of 1 prompts of owner/prompts overlap with owner/bench:main: 1 exact",
    ]
    assert "to leave them out" in told[False][2] and len(told[False]) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"select": {"by": "judge"}}, "select.by is judge, and eval_reward_model is not set"),
        ({"select": {"by": "gold"}}, "select.by is gold, and gold_function is not set"),
        ({"select": {"max_kl": 5}, "divergence": False}, "select.max_kl needs the KL of each iterate"),
        ({"select": {"max_kl": -1}}, "max_kl -1: nats were expected"),
        ({"stop_when": "worse", "heldout_prompts": None}, "stop_when needs held-out answers"),
    ],
)
def test_a_rule_that_the_run_could_not_follow(given, changes, named):
    with pytest.raises(UserError, match=named):
        checked(given() | changes)


def test_what_the_run_decides_is_not_passed_over(given, capsys):
    """A seed or a folder in a section would change nothing, and another K in annotation would end the run
    behind an hour of sampling.
    """
    decided = {
        "generation": {"K": 1, "seed": 3},
        "annotation": {"K": 4},
        "training_args": {"output_dir": "x"},
    }
    with pytest.raises(UserError, match="^generation.K 1 leaves no pairs to train on"):
        checked(given(**decided))
    told = capsys.readouterr().err.replace(" is what the run itself decides: leave it out and give", "")
    assert told.splitlines() == [
        "error: generation.seed seed",
        "error: annotation.K generation.K",
        "error: training_args.output_dir run_dir",
    ]


OTHER = "which is a key of another kind of run: bash"


@pytest.mark.parametrize(
    "kind, words, told",
    [
        (
            plan.Plan,
            "configs/ppo_tiny.yaml",
            f"unknown key 'backend' in configs/ppo_tiny.yaml, {OTHER} run_ppo.sh",
        ),
        (PPOPlan, "configs/loop_tiny.yaml", f"{OTHER} run_loop.sh"),
        (plan.Plan, "--ppo.kl_coef 1", f"unknown argument --ppo.kl_coef, {OTHER} run_ppo.sh"),
        (plan.Plan, "--chekc", "unknown argument --chekc, did you mean '--check'?"),
        (plan.Plan, "--K 4", "unknown argument --K, did you mean --generation.K?"),
        (plan.Plan, "--beta 0.2", "unknown argument --beta, did you mean --training_args.beta?"),
        (plan.Plan, "configs/loop_tiny.yaml --generation.K 0", "--generation.K 0: a number of responses"),
        (
            plan.Plan,
            "configs/loop_tiny.yml",
            "no such YAML file: configs/loop_tiny.yml; there is configs/loop_ti",
        ),
    ],
)
def test_typos_name_what_was_meant(monkeypatch, capsys, kind, words, told):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as refused:
        plan.read(kind, words.split(), planning=True)[0].check(left=True)
    assert told in capsys.readouterr().err + str(refused.value)
