"""run_openrlhf.py from start to end with a STUB for OpenRLHF's training (tests/openrlhf_stub.py)."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import yaml
from openrlhf_stub import ROOT, arguments, captured, fake_gpus, settings

from common import cli
from common.chat import ChatTemplate
from common.devices import visible_gpus
from common.models import load_tokenizer
from ppo.openrlhf import process, run_openrlhf
from ppo.openrlhf.log import Log
from ppo.openrlhf.prompts import prepare_policy, whole_rollouts
from ppo.openrlhf.reward import RewardArguments, Rewards

SCRIPT = str(ROOT / "ppo/openrlhf/run_openrlhf.py")


class Runs:
    """run_openrlhf.py on two fake GPUs with the stub as OpenRLHF: in this process, or as a command."""

    def __init__(self, models, stub, folder, patch, capture):
        self.models, self.folder, self.patch, self.capture = models, folder, patch, capture
        self.model, self.work = folder / "iter1" / "model", folder / "iter1" / "model.work"
        self.log = folder / "iter1" / "model.log.jsonl"
        for name in ("CUDA_VISIBLE_DEVICES", "WANDB_API_KEY", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("PATH", fake_gpus(folder, 2))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the variable at import
        patch.setenv("PYTHONPATH", str(stub))
        patch.syspath_prepend(str(stub))
        patch.setenv("ACCELERATE_USE_CPU", "true")  # rewards are scored on the CPU, whatever the GPUs say
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there, and it is not for this machine

    def command(self, **more):
        values = {
            "model_name_or_path": str(self.models["policy"]),
            "reward_name_or_path": str(self.models["same"]),
            "max_input_length": 200,
            "dataset_name_or_path": str(self.models["prompts"]),
            "output_dir": str(self.model),
            "rollout_batch_size": 4,
            "batch_size": 4,
            "micro_batch_size": 1,
            "max_new_tokens": 50,
            "save_steps": 2,
            "warmup_steps": 0,
        } | more
        given = {key: value for key, value in values.items() if value is not None}
        (self.folder / "train.yaml").write_text(yaml.safe_dump(given))
        return [sys.executable, SCRIPT, str(self.folder / "train.yaml")]

    def run(self, env=(), **more):
        return self.main(self.command(**more)[2:], dict(env))

    def main(self, words, env):
        """The script's `main` as its last line runs it; what it and its processes printed."""
        self.capture.readouterr()
        visible_gpus.cache_clear()
        status = 0
        with self.patch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", [SCRIPT, *words])
            try:
                cli.run(run_openrlhf.main)
            except SystemExit as end:
                status = end.code
        visible_gpus.cache_clear()
        printed = self.capture.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    def dry_run(self, gpus, *more, prompts=None, **env):
        """The script's dry run on the recipe's settings, out of reach of the hub."""
        output = str(self.folder / "out dir" / "model")
        values = settings(output_dir=output, **({"dataset_name_or_path": prompts} if prompts else {}))
        (self.folder / "loop.yaml").write_text(yaml.safe_dump({"ppo": values}))
        fake_gpus(self.folder, gpus)
        return self.main([f"{self.folder / 'loop.yaml'}:ppo", "--dry_run", "true", *more], env)


@pytest.fixture
def runs(models, stub, tmp_path, monkeypatch, capfd):
    yield Runs(models, stub, tmp_path, monkeypatch, capfd)
    visible_gpus.cache_clear()


def check_output(runs, models):
    """A plain model folder that loads as the policy did, and a manifest that says complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads(Path(f"{runs.model}.manifest.json").read_text())
    assert manifest["complete"] and manifest["num_gpus"] == 2 and manifest["counts"]["rollouts"] >= 5
    template, expected = (
        AutoTokenizer.from_pretrained(m).chat_template for m in (runs.model, models["policy"])
    )
    assert template == expected
    config, before = (json.loads((m / "config.json").read_text()) for m in (runs.model, models["policy"]))
    assert config.get("use_cache", True) and config["pad_token_id"] == before["pad_token_id"]
    assert AutoModelForCausalLM.from_pretrained(runs.model).generation_config.eos_token_id
    assert not any(file.is_symlink() for file in runs.model.iterdir())
    assert (runs.model / "preprocessor_config.json").is_file()
    assert not (runs.work / "checkpoints").exists()
    assert (runs.work / "prompts.jsonl").is_file()
    return manifest


def test_failure_resume_stop_and_end(runs, models):
    failed = runs.run({"STUB_FAIL": "3"})
    [told] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 2 and "Train epoch [1/1]" in failed.stdout.splitlines()[-1], failed.stdout
    assert told.startswith(
        "error: OpenRLHF ended with status 1: RuntimeError: STUB: CUDA out of memory; mend"
    )
    assert not any(runs.model.iterdir())
    assert "from 0 to" in failed.stdout and "--ckpt.load_enable" not in failed.stdout
    with open(f"{runs.model}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training into" in runs.run().stderr
    other = runs.run(kl_coef=0.5)
    assert other.returncode == 2 and "kl_coef was 0.01 and is now 0.5" in other.stderr
    fewer = runs.run({"CUDA_VISIBLE_DEVICES": "0"})
    assert fewer.returncode == 2 and "num_gpus was 2 and is now 1" in fewer.stderr
    torn = runs.run({"STUB_TORN": "_actor4"})
    assert "continuing from global_step2" in torn.stdout and "from 2 to" in torn.stdout
    assert torn.returncode == 2

    hanging = dict(os.environ) | {"STUB_HANG": "5"}
    started = subprocess.Popen(runs.command(), stdout=subprocess.PIPE, text=True, env=hanging)
    seen = ""
    for line in started.stdout:
        seen += line
        if "STUB hangs" in line:
            break
    assert "continuing from global_step2" in seen  # policy had 4, the value model 2
    listed = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True)
    children = listed.stdout.split()
    faults.wait_for(lambda: [entry["step"] for entry in faults.records(runs.log)] == [1, 2, 3, 4, 5])
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == 130 and children
    for child in children:
        assert not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    done = runs.run()
    assert done.returncode == 0, done.stderr
    assert "continuing from global_step4" in done.stdout
    assert "STUB reward None" in done.stdout  # OpenRLHF's own reward model
    manifest, log = check_output(runs, models), faults.records(runs.log)
    assert [entry["step"] for entry in log] == [*range(1, manifest["counts"]["rollouts"] + 1)]
    assert manifest["metrics"] == {key: value for key, value in log[-1].items() if key != "seconds"}
    assert log[2].pop("seconds") == {"generate": 1.5, "all": 2}
    figures = {"reward": 0.5, "kl_per_token": 0.03, "response_length": 6, "policy_learning_rate": 1e-6}
    assert log[2] == pytest.approx({"step": 3, "tokens_per_second": 24} | figures)
    again = runs.run()
    assert again.returncode == 0 and "is complete, nothing to do" in again.stdout
    changed = runs.run(learning_rate=1e-3)
    assert changed.returncode == 2 and "complete with other settings: learning_rate" in changed.stderr


@pytest.mark.parametrize("said, told", [
    ("KeyError: 'a'\nno more", "KeyError: 'a'"),
    ("\x1b[36m(Actor pid=12, ip=1.2.3.4)\x1b[0m ValueError: none\n 0%| | 0/3", "ValueError: none"),
    ("a.b.OddError: x\nray.exceptions.RayTaskError(OddError): y: z\n", "a.b.OddError: x"),
    ("ValueError: first\r 3%\rTypeError: last\r\n", "TypeError: last"),
    ("an error: but no exception\n", None),
])  # fmt: skip
def test_the_last_error_is_found_behind_bars_and_prefixes(said, told):
    assert process.last_error(said) == told


def test_a_figure_that_is_no_number_does_not_end_the_training(tmp_path):
    log = Log(tmp_path / "tensorboard", tmp_path / "model.log.jsonl", 0, 4)
    log.told[1] = {"critic_loss": float("nan"), "kl": 0.5}
    log.write()
    [entry] = faults.records(log.path)
    assert entry["value_loss"] is None and entry["kl_per_token"] == 0.5


def test_what_a_killed_start_has_begun_ends_with_it(runs):
    """kill -9 cannot be answered: what trains on would do so beside the next start, without a lock."""
    hanging = dict(os.environ) | {"STUB_HANG": "1"}
    started = subprocess.Popen(runs.command(), stdout=subprocess.PIPE, text=True, env=hanging)
    next(line for line in started.stdout if "STUB hangs" in line)
    listed = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True)
    [child] = listed.stdout.split()
    started.kill()
    started.wait()
    faults.wait_for(lambda: not Path(f"/proc/{child}/exe").exists())


def test_a_checkpoint_is_taken_that_policy_and_value_model_have(tmp_path):
    def save(role, *tags, latest=None):
        for tag in tags:
            (tmp_path / role / f"global_step{tag}").mkdir(parents=True, exist_ok=True)
        if latest:
            (tmp_path / role / "latest").write_text(f"global_step{latest}")

    both = ["actor", "critic"]
    assert process.checkpoint_to_resume(tmp_path, both) is None
    save("_actor", 4)
    assert process.checkpoint_to_resume(tmp_path, both) is None  # a folder and no whole checkpoint
    save("_actor", 4, 10, latest=10)
    assert process.checkpoint_to_resume(tmp_path, both) is None
    assert process.checkpoint_to_resume(tmp_path, ["actor"]) == "global_step10"
    save("_critic", 4, 10, latest=4)  # its 10 is torn
    assert process.checkpoint_to_resume(tmp_path, both) == "global_step4"
    assert (tmp_path / "_actor" / "latest").read_text() == "global_step4"
    save("_actor", latest=10)
    save("_critic", latest=10)
    assert process.checkpoint_to_resume(tmp_path, both) == "global_step10"


def test_a_reward_model_with_other_tokens_is_served(runs, models):
    names = [str(models["chatml"])]
    done = runs.run(reward_name_or_path=names, num_episodes=2, save_steps=0)
    assert done.returncode == 0, done.stderr
    assert "our reward server shares one of the GPUs that train" in done.stderr
    assert "another id or none" in done.stderr
    reward = float(done.stdout.split("STUB reward ")[1].split(",")[0])
    first = json.loads((runs.work / "prompts.jsonl").read_text().split("\n")[0])
    rewards = Rewards(RewardArguments(policy=str(models["policy"]), reward_name_or_path=names)).load()
    [expected] = rewards([first["prompt"] + "a STUB answer.<|eot_id|>"], [first["prompt"]], [first["label"]])
    assert reward == pytest.approx(expected, abs=2e-5)
    assert "--critic.model_name_or_path " + shlex.quote(str(runs.work / "policy")) in done.stdout
    counts = check_output(runs, models)["counts"]
    skipped = (runs.work / "prompts.skipped.jsonl").read_text().split("\n")[:-1]
    assert counts["prompts"] % 4 == 0 and counts["rollouts"] == counts["prompts"] // 4 * 2
    assert len(skipped) + counts["prompts"] == 26 and counts["skipped"] == len(skipped)


def test_a_function_is_served_and_its_failure_named(runs, models, tmp_path):
    (tmp_path / "bad.py").write_text("def f(messages, response):\n    return 1 / 0\n")
    failed = runs.run(reward_name_or_path=None, reward_function=f"{tmp_path / 'bad.py'}:f", overwrite=True)
    told = failed.stderr.splitlines()[-1]
    assert failed.returncode == 2 and "no reward, " in told and "ZeroDivisionError" in told, told
    done = runs.run(reward_name_or_path=None, reward_function=models["function"], save_steps=0)
    assert done.returncode == 0, done.stderr
    assert f"STUB reward {len('a STUB answer.') / 10}," in done.stdout
    check_output(runs, models)


def test_only_whole_rollouts_are_written(models):
    template = ChatTemplate(load_tokenizer(str(models["policy"])))
    for maximum, episodes, expected in (
        (None, 1, (24, 2, 1)),
        (2, 3, (8, 18, 1)),
        (13, 3, (24, 2, 2)),
        (99, 3, (24, 2, 3)),
    ):
        more = {"num_episodes": episodes, "max_rollouts": maximum, "dataset_name_or_path": models["prompts"]}
        args = arguments(rollout_batch_size=4, batch_size=4, **more)
        chosen, passes, left = whole_rollouts(args, template)
        assert (len(chosen), len(left), passes) == expected
        ids = [record["id"] for record, _ in chosen]
        assert len({*ids, *(entry["id"] for entry in left)}) == 26 and ids != sorted(ids)
        assert whole_rollouts(args, template)[0] == chosen


def test_a_policy_whose_config_lacks_the_end_of_turn_stops_anyway(models, tmp_path):
    """RLHFlow/LLaMA3-SFT is such a one: vLLM under OpenRLHF knows no stop tokens but EOS and
    generation_config.json's.
    """
    tokenizer = load_tokenizer(str(models["policy"]))
    source, made = tmp_path / "source", tmp_path / "policy"
    source.mkdir()
    for file in models["policy"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = {"eos_token_id": tokenizer.eos_token_id, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(config))
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    tokenizer.chat_template = "{# mine #}" + tokenizer.chat_template
    args = SimpleNamespace(model_name_or_path=str(source))
    prepare_policy(args, ChatTemplate(tokenizer), made)
    config = json.loads((made / "generation_config.json").read_text())
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert set(config["eos_token_id"]) == {tokenizer.eos_token_id, end_of_turn}
    assert config["temperature"] == 0.6
    assert (made / "model.safetensors").resolve() == (source / "model.safetensors").resolve()
    assert load_tokenizer(str(made)).chat_template.startswith("{# mine #}")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_wrong_set_ups_are_one_line(runs, models, tmp_path):
    (tmp_path / "file").write_text("")
    stale = runs.work / "checkpoints" / "_actor"
    stale.mkdir(parents=True)
    wrong = {
        "_actor has no manifest": {},
        "cannot write": {"output_dir": str(tmp_path / "file" / "model")},
        "nobody answers": {"reward_name_or_path": None, "reward_url": "http://127.0.0.1:9/get_reward"},
        "own reward model cannot be": {
            "reward_name_or_path": str(models["chatml"]),
            "reward_backend": "local",
        },
        "26 prompts for rollouts of 400": {"rollout_batch_size": 400, "batch_size": 400},
    }
    for expected, more in wrong.items():
        done = runs.run(**more)
        errors = [line for line in done.stderr.splitlines() if not line.startswith("ppo: ")]
        assert done.returncode == 2 and len(errors) == 1 and expected in errors[0], done.stderr
        if stale.exists():
            stale.rmdir()


def test_what_openrlhfs_engines_and_optimizer_need(monkeypatch):
    """vLLM starts without nvcc; DeepSpeed compiles with any CUDA 13. What is set already stays."""
    monkeypatch.setattr(run_openrlhf, "visible_gpus", lambda: ["0"])
    plan = SimpleNamespace(placement=SimpleNamespace(all_gpus=1), kind="local")
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "0")
    found = run_openrlhf.environment(arguments(), plan)
    assert found == {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    shown = run_openrlhf.show(["-m", "m", "--a", "b c"], found)
    assert shown == "VLLM_USE_FLASHINFER_SAMPLER=0 \\\npython -m m \\\n  --a 'b c'"


def test_a_tokenizer_of_several_templates_comes_along(monkeypatch, tmp_path):
    import dpo_iteration.saved

    monkeypatch.setattr(dpo_iteration.saved, "check_saved", lambda *args: None)
    monkeypatch.setattr(dpo_iteration.saved, "store_once", lambda *args: None)  # these weights are none
    policy, made = (tmp_path / "out.work" / name for name in ("policy", "model"))
    for folder in (policy, made):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (policy / "additional_chat_templates").mkdir()
    (policy / "additional_chat_templates/rag.jinja").write_text("rag")
    run_openrlhf.place_model(arguments(output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "rag"


@pytest.mark.parametrize("gpus", [8, 0])
def test_a_dry_run_prints_the_command_without_secrets_and_writes_nothing(
    gpus, runs, tmp_path, source, monkeypatch
):
    """On the GPUs that are here, or for those of another machine."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Hi {i}"}}\n' for i in range(2000)))
    elsewhere = [] if gpus else ["--num_gpus", "8", "--gpu_memory_gib", "80"]
    more = ["--report_to", "wandb", "--machine_memory_gib", "1000", *elsewhere]
    done = runs.dry_run(gpus, *more, prompts=str(tmp_path / "prompts.jsonl"), WANDB_API_KEY="s3cret")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(" \\\n", "\n").splitlines()
    head = ["VLLM_USE_FLASHINFER_SAMPLER=0 DS_SKIP_CUDA_CHECK=1", "python -m openrlhf.cli.train_ppo_ray"]
    assert lines[:2] == head and all(line.startswith("  --") for line in lines[2:])
    parsed = captured(source, shlex.split(" ".join(lines[2:])), monkeypatch)
    assert parsed.ckpt.output_dir == str(tmp_path / "out dir" / "model.work" / "model")
    assert parsed.vllm.num_engines == parsed.actor.num_gpus_per_node == 8
    assert "s3cret" not in done.stdout + done.stderr and not (tmp_path / "out dir").exists()
    assert "8 GPUs on one node" in done.stderr and "8 engines × 1 GPUs" in done.stderr
    assert "is assumed" in done.stderr


@pytest.mark.parametrize("more, expected", [
    (["--num_gpus", "4"], "num_gpus 4, but 2 GPUs are visible; set num_gpus 2"),
    (["--machine_memory_gib", "1000"], "take 4 GPUs of 80 GiB, or offload true"),
    (["--logger.wandb.key", "s3cret"], "unknown argument --logger.wandb.key"),
    (["--kl_ceof", "1"], "did you mean '--kl_coef'"),
    (["--model_name_or_path", "./nowhere"], "no such folder"),
])  # fmt: skip
def test_wrong_arguments_end_in_one_line(more, expected, runs):
    done = runs.dry_run(2, *more)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and expected in done.stderr and "s3cret" not in done.stderr
