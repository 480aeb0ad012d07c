"""The real OpenRLHF 0.11.2, unchanged and at its pins, on the CPU: of a machine with GPUs only CUDA is a
STAND-IN (cpu/stand_in_for_cuda.py, cpu/flash_attn, nvidia-smi).

Minutes each, and an environment of 4 GB that is made once: under --all.
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import faults
import pytest
import yaml
from openrlhf_stub import ROOT

from ppo.openrlhf.arguments import LACKS

BUILT = ROOT / "tiny/built"
FAILS = """def f(messages, response):
    if 'a' in response:
        raise ValueError('no a, please')
    return 1.0
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here, with which DeepSpeed compiles"),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the wheel of OpenRLHF is for Python 3.11"),
    pytest.mark.usefixtures("built"),
]


def prompts(path, count, source="iter1"):
    lines = (BUILT / f"prompts/{source}.jsonl").read_text(encoding="utf-8").split("\n")[:count]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Real:
    """run_openrlhf.py in that environment, on GPUs that nvidia-smi alone knows."""

    def __init__(self, environment, folder):
        self.environment, self.folder = environment, folder
        self.model, self.log = folder / "model", folder / "model.log.jsonl"
        self.said, self.work = folder / "said", folder / "model.work"
        # What samples, scores and measures goes to the CPU as on a machine without GPUs.
        smi = folder / "bin/nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(
            '#!/bin/bash\ncase "$(tr "\\0" " " </proc/$PPID/cmdline)" in\n'
            "  *generation/* | *annotate_data/* | *evaluation/*) exit 1 ;;\nesac\n"
            'for ((i = 0; i < STAND_IN_GPUS; i++)); do\n  case "$*" in\n'
            '    -L) echo "GPU $i: a stand-in" ;;\n    *memory.total*) echo 81920 ;;\n  esac\ndone\n'
        )
        smi.chmod(0o755)
        self.ray = tempfile.mkdtemp(prefix="ray")  # a short name: sockets lie there

    def variables(self, gpus):
        path = f"{self.folder}/bin:{self.environment}/bin:{os.environ['PATH']}"
        mark = {"MARK_OF_A_TEST": str(self.folder), "RAY_TMPDIR": self.ray}
        return os.environ | mark | {"PATH": path, "STAND_IN_GPUS": str(gpus), "HF_HUB_OFFLINE": "1"}

    def begin(self, gpus, **more):
        """The process of a training of four rollouts, 16 prompts × 2 responses each."""
        values = {
            "model_name_or_path": str(BUILT / "policy"),
            "reward_name_or_path": str(BUILT / "reward_model"),
            "dataset_name_or_path": str(prompts(self.folder / "prompts.jsonl", 32)),
            "output_dir": str(self.model),
            "max_input_length": 64,
            "max_new_tokens": 32,
            "rollout_batch_size": 16,
            "samples_per_prompt": 2,
            "batch_size": 16,
            "micro_batch_size": 4,
            "num_episodes": 2,
            "save_steps": 1,
            "learning_rate": 3e-4,
            "critic_learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "kl_coef": 0.1,
            "missing_eos_penalty": 4.0,
            "gradient_checkpointing": False,
        } | more
        settings = self.folder / "settings.yaml"
        settings.write_text(
            yaml.safe_dump({key: value for key, value in values.items() if value is not None})
        )
        command = [self.environment / "bin/python", ROOT / "ppo/openrlhf/run_openrlhf.py", settings]
        return faults.begin(command, open(self.said, "ab"), env=self.variables(gpus))

    def run(self, gpus, **more):
        """(exit status, all that was said so far)."""
        status = self.begin(gpus, **more).wait(timeout=900)
        return status, self.said.read_text(errors="replace")

    def alive(self):
        return faults.processes(lambda line, given: f"MARK_OF_A_TEST={self.folder}" in given)


@pytest.fixture
def real(environment, tmp_path):
    it = Real(environment, tmp_path)
    yield it
    left = it.alive()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(it.ray, ignore_errors=True)
    assert not left


def samples(said):
    """(text of prompt and response, reward) of each response that OpenRLHF shows."""
    found = re.findall(r"Sample: (\[.*\])", re.sub(r"\x1b\[[0-9;]*m", "", said))
    return [ast.literal_eval(one) for one in found]


def test_a_killed_training_goes_on_from_its_checkpoint(real):
    """Colocated on two GPUs, packed: kill -9 in the middle of the second pass."""
    latest = real.work / "checkpoints/_critic/latest"
    driver = real.begin(2, keep_checkpoints=True)
    faults.wait_for(
        lambda: driver.poll() is not None or (latest.is_file() and "3" in latest.read_text()), 600
    )
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, real.said.read_text()[-3000:]
    faults.wait_for(lambda: not real.alive(), 120)
    status, said = real.run(2, keep_checkpoints=True)
    assert status == 0, said[-3000:]
    assert re.search("continuing from global_step[23]", said)
    log = faults.records(real.log)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[0]["kl_per_token"] == 0 and abs(log[0]["engine_kl"]) < 1e-2  # all three see the same tokens
    assert log[3]["kl_per_token"] != 0 and abs(log[3]["engine_kl"]) < 1e-2  # the engine has the new weights
    same_as_checkpoint(real)


def same_as_checkpoint(real):
    import torch
    from safetensors.torch import load_file

    saved = load_file(real.model / "model.safetensors")
    [states] = (real.work / "checkpoints/_actor/global_step4").glob("*model_states.pt")
    held = torch.load(states, map_location="cpu", weights_only=False)["module"]
    assert saved.keys() <= held.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value.float(), held[name].float(), rtol=0, atol=0)


def trimmed(text):
    return text == text.strip()


@pytest.mark.parametrize("backend", ["local", "server"])
def test_rewards_are_those_of_get_rewards(real, backend):
    """OpenRLHF's own reward model and our server: the texts that it shows, scored again. On one GPU, without
    a value model.
    """
    status, said = real.run(1, reward_backend=backend, advantage_estimator="rloo", missing_eos_penalty=0.0)
    assert status == 0, said[-3000:]
    assert not (real.work / "checkpoints").exists() and "value_loss" not in faults.records(real.log)[-1]
    shown = samples(said)
    assert len(shown) == 4
    by_prompt = {}
    for record in faults.records(real.folder / "prompts.jsonl"):
        by_prompt[record["context_messages"][-1]["content"]] = record["context_messages"]
    records = []
    for text, _ in shown:
        [question] = [one for one in by_prompt if one in text]
        answer = text.partition(question)[2].removeprefix("assistant\n\n")
        records.append({"prompt": by_prompt[question], "responses": [answer]})
    if backend == "local":  # it reads a space at an end, which the template would trim
        both = [(one, record) for one, record in zip(shown, records) if trimmed(record["responses"][0])]
        shown, records = (list(part) for part in zip(*both))
    from common.manifest import write_jsonl

    write_jsonl(real.folder / "generated.jsonl", records)
    command = [faults.vllm_python(), "annotate_data/get_rewards.py", "--dataset_name_or_path"]
    command += [real.folder / "generated.jsonl", "--output_dir", real.folder / "rewarded.jsonl"]
    end = faults.ended([*command, "--reward_name_or_path", BUILT / "reward_model"])
    assert end.returncode == 0, end.stderr
    rewards = [record["rewards"][0] for record in faults.records(real.folder / "rewarded.jsonl")]
    # OpenRLHF computes in bf16, our server here in float32, as get_rewards.py does.
    assert rewards == pytest.approx([reward for _, reward in shown], abs=0.02)


def test_a_reward_that_fails_is_named(real):
    """OpenRLHF itself ends with an error about None."""
    (real.folder / "fails.py").write_text(FAILS)
    function = f"{real.folder / 'fails.py'}:f"
    status, said = real.run(1, reward_name_or_path=None, reward_function=function)
    [told] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and "no reward, " in told and "no a, please" in told, said[-3000:]


def test_roles_apart_on_four_gpus_with_a_function(real):
    function = f"{ROOT / 'tiny/task.py'}:gold_score"
    status, said = real.run(
        4, colocate=False, reward_name_or_path=None, reward_function=function, num_episodes=1
    )
    assert status == 0, said[-3000:]
    log = faults.records(real.log)
    assert [entry["step"] for entry in log] == [1, 2] and all(0 <= entry["reward"] <= 1 for entry in log)


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


def test_a_ray_cluster_that_runs_is_used_and_left(real):
    """With a reward server of ours that was started by hand."""
    ray, python = real.environment / "bin/ray", real.environment / "bin/python"
    port = faults.free_ports(2)
    serving = port + 1
    start = [ray, "start", "--head", "--block", f"--port={port}", "--num-gpus=2", "--num-cpus=4"]
    cluster = faults.begin([*start, "--include-dashboard=false"], env=real.variables(2))
    server = [python, "ppo/openrlhf/serve_reward.py", "--port", serving, "--policy", BUILT / "policy"]
    server = faults.begin([*server, "--reward_name_or_path", BUILT / "reward_model"], env=real.variables(2))
    try:
        address = f"127.0.0.1:{port}"
        status = [ray, "status", "--address", address]
        faults.wait_for(lambda: subprocess.run(status, capture_output=True).returncode == 0, 120, pause=1)
        more = {"num_gpus": 2, "gpus_per_node": 2, "gpu_memory_gib": 80, "num_episodes": 1}
        url = f"http://127.0.0.1:{serving}/get_reward"
        faults.wait_for(lambda: listens(serving), 120, pause=1)
        end, said = real.run(2, ray_address=address, reward_url=url, reward_name_or_path=None, **more)
        assert end == 0, said[-3000:]
        assert [entry["step"] for entry in faults.records(real.log)] == [1, 2]
        assert subprocess.run(status, capture_output=True).returncode == 0
    finally:
        for process in (server, cluster):
            os.killpg(process.pid, signal.SIGTERM)
        faults.wait_for(lambda: not real.alive(), 60)


def test_a_whole_run_learns_and_has_the_loops_table_and_page(real, environment):
    """run_ppo.sh: ten rollouts of the tiny task by OpenRLHF, between two evaluations by our own engine."""
    places = {"vllm": Path(faults.vllm_python()).parents[1], "rlhflow": Path(sys.prefix)}
    for name, place in (places | {"ppo_train": environment}).items():  # as somebody's own, without our stamps
        (real.folder / "envs" / name).mkdir(parents=True)
        for part in ("bin", "lib", "pyvenv.cfg"):
            (real.folder / "envs" / name / part).symlink_to(place / part)
    run, config = real.folder / "run", real.folder / "ppo.yaml"
    settings = yaml.safe_load((ROOT / "configs/ppo_tiny.yaml").read_text())
    settings |= {"backend": "openrlhf", "run_dir": str(run), "without_gpu": False}
    settings["heldout_prompts"] = str(prompts(real.folder / "heldout.jsonl", 40, "heldout"))
    settings["ppo"] = {key: value for key, value in settings["ppo"].items() if key not in LACKS}
    settings["ppo"] |= {"max_rollouts": 10, "micro_batch_size": 8, "save_steps": 0}
    config.write_text(yaml.safe_dump(settings))
    more = {"own_envs": "yes", "envs_dir": str(real.folder / "envs"), "env_manager": "venv"}
    end = faults.ended(["bash", "run_ppo.sh", config], 3000, real.variables(1) | more)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    start, trained = yaml.safe_load((run / "metrics.json").read_text())["iterates"]
    assert trained["sampled_reward"] > start["sampled_reward"] + 0.5
    page = (run / "report/index.html").read_text()
    assert "PPO: KL, nats per token" in page and "PPO: policy loss" in page
