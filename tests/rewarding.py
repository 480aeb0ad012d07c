"""Generated files, get_rewards.py in this process and as a command, and transformers' own forward pass to
compare rewards with.
"""

import functools
import gc
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import micro
import pytest

from annotate_data import get_rewards
from common import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "annotate_data" / "get_rewards.py")
CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: micro models gain nothing from threads

FAMILIES = {"llama": "llama3", "qwen2": "chatml", "mistral": "mistral", "gemma2": "gemma", "phi3": "phi"}


def generated(path, count=6, K=4, seed=0, longest=120):
    """A generated file as generation/ writes it, with an empty response and U+2028 in some; returns its
    records.
    """
    rng, rows = random.Random(seed), []
    for i, prompt in enumerate(micro.write_prompts(path, count)):
        responses = [
            "".join(rng.choice("abc d\u2028é") for _ in range(rng.randrange(1, longest))) for _ in range(K)
        ]
        responses[i % K] = "" if i == 1 else responses[i % K]
        lengths = [len(r.encode()) for r in responses]
        rows.append(
            {
                "id": f"r{i}",
                "prompt": prompt["context_messages"],
                "responses": responses,
                "finish_reasons": ["stop"] * K,
                "num_tokens": lengths,
                "number": i,
            }
        )
    write(path, rows)
    return rows


def write(path, rows):
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def annotate(monkeypatch, source, target, reward, *more):
    """The script in this process."""
    gc.collect()  # an earlier refusal's traceback still holds the lock on its output
    arguments = [
        "--dataset_name_or_path",
        source,
        "--output_dir",
        target,
        "--reward_name_or_path",
        reward,
        *more,
    ]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    get_rewards.main()
    return read(target)


def refused(monkeypatch, *arguments):
    """The error's text; it must be one line."""
    with pytest.raises(cli.UserError) as caught:
        annotate(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@functools.cache
def load(folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.config.pad_token_id = None
    return AutoTokenizer.from_pretrained(folder), model.eval()


def reference(folder, messages, response, max_length=None):
    """transformers alone, as FsfairX is published: one sequence, its own truncation; without a pad id it
    pools the very last token.

    For tokenizers that add the BOS that their template writes, or have none.
    """
    import torch

    tokenizer, model = load(folder)
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": response}], tokenize=False
    )
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token) :]
    tokenizer.truncation_side = "left"
    more = {"truncation": True, "max_length": max_length} if max_length else {}
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", **more)).logits[0, 0].item()


def launch(*arguments, processes=0, env=None, **options):
    """The real command: plain Python, or `accelerate launch` with several processes (on the CPU: --multi_gpu,
    for
    --cpu starts one process whatever it is told)."""
    command = [sys.executable, SCRIPT]
    if processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        kind = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
        command[1:1] = ["-m", "accelerate.commands.launch", *kind, "--main_process_port", str(port)]
    env = os.environ | CPU | {"OMP_NUM_THREADS": "1"} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], env=env, **pipes, **options)


def outcome(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def armorm(folder, messages, response, max_length=None):
    """The published formula for one sequence: transformers' Llama and torch operations, the template typed by
    hand.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    llama = LlamaModel(LlamaConfig(**config, attn_implementation="eager")).float().eval()
    llama.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    text = "<|begin_of_text|>"
    for m in [*messages, {"role": "assistant", "content": response}]:
        text += f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if max_length and len(ids) > max_length:
        ids = ids[:1] + ids[len(ids) - max_length + 1 :]
    eot, header = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|start_header_id|>"])
    ends = [i for i in range(len(ids) - 1) if ids[i] == eot and ids[i + 1] == header]
    if not ends:
        return None
    with torch.no_grad():
        hidden = llama(torch.tensor([ids])).last_hidden_state[0]
        rewards = weights["regression_layer.weight"] @ hidden[-1]
        x = hidden[ends[-1]]
        for i in range(config["gating_n_hidden"]):
            x = (weights[f"gating.layers.{i}.weight"] @ x + weights[f"gating.layers.{i}.bias"]).clamp(min=0)
        i = config["gating_n_hidden"]
        x = weights[f"gating.layers.{i}.weight"] @ x + weights[f"gating.layers.{i}.bias"]
        gating = (x / config["gating_temperature"]).exp() / (x / config["gating_temperature"]).exp().sum()
        return float(
            (gating * weights["gating.logit_scale"] * (weights["reward_transform_matrix"].T @ rewards)).sum()
        )
