"""What the tests of training share: rewarded answers to write, and the script to start, plain or under a
launcher.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import micro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "dpo_iteration" / "run_dpo.py")
SMALL = "--gradient_accumulation_steps 2 --gradient_checkpointing false --logging_steps 1".split()
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


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


def save_config(folder, **sizes):
    """A folder with the config of a Llama of these sizes, without weights; its name."""
    from transformers import AutoConfig

    AutoConfig.for_model("llama", **sizes).save_pretrained(folder)
    return str(folder)


def make_rows(count, seed=0, longest=40):
    """Pairs as rows of random token ids; some responses begin alike, or one is the other's beginning."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(3, 250) for _ in range(n)]  # noqa: E731
    rows = []
    for i in range(count):
        chosen = draw(rng.randint(1, longest))
        rejected = (
            chosen[: rng.randint(0, len(chosen))] + draw(rng.randint(1, 9))
            if i % 3 == 1
            else draw(rng.randint(1, longest))
        )
        rows.append(
            {
                "prompt_ids": [1, *draw(rng.randint(0, longest))],
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "margin": 1.0 + i,
            }
        )
    return rows


def alone(model, row):
    """[log-probability of chosen, of rejected], one sequence at a time, by the model's own head and
    log_softmax in float64.
    """
    import torch

    found = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].double()
        logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(logps[len(row["prompt_ids"]) - 1 :].sum())
    return found


def argv(work, name, *more):
    """Arguments of a small training of `work`/policy on `work`/rewarded.jsonl into `work`/NAME; a text of
    `more` may hold several words.
    """
    paths = {"model_name_or_path": "policy", "train_dir": "rewarded.jsonl", "output_dir": name}
    places = [word for key, value in paths.items() for word in (f"--{key}", work / value)]
    words = [word for one in more for word in (one.split() if isinstance(one, str) else [one])]
    return [str(word) for word in (ROOT / "configs" / "training.yaml", *places, *SMALL, *words)]


def reset():
    """This process as at its start, with one thread: these models are too small for more."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)


def train(work, name, *more):
    """The training of `argv` in this process; its output's folder."""
    from dpo_iteration import run_dpo

    reset()
    with patch.object(sys, "argv", ["run_dpo.py", *argv(work, name, *more)]):
        run_dpo.main()
    return work / name


def launch(config, *more):
    """Arguments of `accelerate launch` for two processes with configs/CONFIG.yaml."""
    return ["--config_file", ROOT / "configs" / f"{config}.yaml", "--num_processes", 2, *more]


def start(*argv, launcher=(), status=0, script=SCRIPT, **environment):
    """The finished process of `run_dpo.py ARGV`, or of `accelerate launch LAUNCHER run_dpo.py ARGV`, which
    ends with `status` (None: any); `script`: in its place.
    """
    program = ["-m", "accelerate.commands.launch", *map(str, launcher)] if launcher else []
    hidden = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *program, str(script), *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert status in (None, done.returncode), done.stdout + done.stderr
    return done


def logged(folder):
    """Entries of a training's log that have a loss, one a step."""
    return [entry for entry in read_json(f"{folder}.trainer_state.json")["log_history"] if "loss" in entry]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def furthest(found, expected):
    """Largest difference of any weight of two models with the same weights."""
    assert set(found) == set(expected)
    return max((found[name].float() - expected[name].float()).abs().max().item() for name in expected)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def read_json(path):
    return json.loads(Path(path).read_text())
