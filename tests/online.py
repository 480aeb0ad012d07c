"""What the tests of online training share: a real server of the tiny policy that takes new weights, and the
command of a small training.
"""

import json
from pathlib import Path

import faults
import yaml
from faults import ROOT

SCRIPT = str(ROOT / "dpo_iteration" / "run_online.py")
START = "tiny/built/policy"
ROUNDS = {"rounds": 4, "prompts_per_round": 10, "sync_every": 2, "save_every": 1, "seed": 0}


def start_server(folder, port):
    """Start a server of the tiny policy that takes new weights, as a user does; returns what stops it."""
    variables = {"VLLM_SERVER_DEV_MODE": 1, "port": port, "servers": 1, "max_model_len": 96}
    variables |= {"dtype": "float32", "kv_cache_gib": 0.25, "python": faults.vllm_python()}
    variables |= {"state_dir": folder, "stop_seconds": 5}
    environment = {key: str(value) for key, value in variables.items()}
    script = ["bash", "generation/register_server.sh"]
    started = faults.ended([*script, START], environment=environment)
    assert started.returncode == 0, started.stdout + started.stderr
    return lambda: faults.ended([*script, "stop", folder], environment=environment)


def argv(folder, port, *more, training="", **rounds):
    """Arguments of run_online.py on the tiny models, whose output is in `folder`.

    Args:
        rounds: keys of `online` that differ from ROUNDS. training: a line of YAML, keys of run_dpo.py.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = yaml.safe_load((ROOT / "configs/training_tiny.yaml").read_text())
    settings = {
        "online": ROUNDS | rounds,
        "generation": {"K": 4, "max_input_length": 64, "max_new_tokens": 32, "dtype": "float32"},
        "annotation": {},
        "training_args": trained | (yaml.safe_load(training) or {}),
    }
    (folder / "loop.yaml").write_text(yaml.safe_dump(settings))
    words = [f"{folder}/loop.yaml:online"]
    for section in ("generation", "annotation", "training_args"):
        words += [f"--{section}", f"{folder}/loop.yaml:{section}"]
    words += ["--model_name_or_path", START, "--reward_name_or_path", "tiny/built/reward_model"]
    words += ["--dataset_name_or_path", *(f"tiny/built/prompts/iter{i}.jsonl" for i in (1, 2))]
    words += ["--rounds_dir", folder / "online", "--output_dir", folder / "model", "--ports", port]
    return [str(word) for word in (*words, *more)]


def rounds_of(folder):
    """The entries of the log of rounds."""
    path = Path(folder) / "online" / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []
