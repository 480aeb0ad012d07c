"""What the tests of training share: rewarded answers to write, and the script to start, plain or under a
launcher.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import micro

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "dpo_iteration" / "run_dpo.py")
SMALL = "--gradient_accumulation_steps 2 --gradient_checkpointing false --logging_steps 1".split()


def write_rewarded(path, count=24, seed=0, K=4, **change):
    """Answers of which the one with more letters `a` has the higher reward, so that there is something to
    learn.
    """
    rng = random.Random(seed)
    rows = []
    for i, prompt in enumerate(micro.write_prompts(Path(path).with_suffix(".prompts"), count)):
        texts = [
            "".join(rng.choice("aaab" if k % 2 else "bbba") for _ in range(12)) + f" {k}" for k in range(K)
        ]
        row = {
            "id": f"r{i:03}",
            "prompt": prompt["context_messages"],
            "responses": texts,
            "number": i,
            "rewards": [float(text.count("a")) + k / 10 for k, text in enumerate(texts)],
            "finish_reasons": ["length" if k == 0 else "stop" for k in range(K)],
            "num_tokens": [15] * K,
        }
        rows.append(row | change)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def start(*argv, launcher=(), cwd=None, script=SCRIPT, **environment):
    """The finished process of `run_dpo.py ARGV`, or of `accelerate launch LAUNCHER run_dpo.py ARGV`;
    `script`: in its place.
    """
    program = ["-m", "accelerate.commands.launch", *map(str, launcher)] if launcher else []
    hidden = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = (
        {k: v for k, v in os.environ.items() if k not in hidden}
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | environment
    )
    command = [sys.executable, *program, str(script), *map(str, argv)]
    return subprocess.run(command, cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=300)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def read_json(path):
    return json.loads(Path(path).read_text())
