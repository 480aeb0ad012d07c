"""Generated files, get_rewards.py as a command, and transformers' own forward pass to compare with."""

import functools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import micro

SCRIPT = str(Path(__file__).resolve().parents[1] / "annotate_data" / "get_rewards.py")
CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: micro models gain nothing from threads

FAMILIES = {"llama": "llama3", "qwen2": "chatml", "mistral": "mistral", "gemma2": "gemma", "phi3": "phi"}


def generated(path, count=6, K=4, longest=120):
    """A generated file as generation/ writes it, with an empty response and U+2028; returns its records."""
    rng, rows = random.Random(0), []
    for i, prompt in enumerate(micro.write_prompts(path, count)):
        texts = [
            "".join(rng.choice("abc d\u2028é") for _ in range(rng.randrange(1, longest))) for _ in range(K)
        ]
        texts[i % K] = "" if i == 1 else texts[i % K]
        row = {"id": f"r{i}", "prompt": prompt["context_messages"], "responses": texts, "number": i}
        rows.append(
            row | {"finish_reasons": ["stop"] * K, "num_tokens": [len(text.encode()) for text in texts]}
        )
    write(path, rows)
    return rows


def write(path, rows):
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def flat(rows):
    """The rewards of records, one after the other."""
    return [reward for row in rows for reward in row["rewards"]]


def command(source, target, *models, **settings):
    """The script and its arguments; a setting may have several values."""
    settings = {"dataset_name_or_path": source, "output_dir": target} | settings
    settings |= {"reward_name_or_path": models} if models else {}
    argv = [SCRIPT]
    for key, value in settings.items():
        argv += [f"--{key}", *(value if isinstance(value, (list, tuple)) else [value])]
    return [str(part) for part in argv]


def launch(argv, processes=0, env=None, **options):
    """The real command: plain Python, or `accelerate launch` (with --multi_gpu, for --cpu starts one)."""
    launcher = []
    if processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--main_process_port", str(port)]
    env = os.environ | CPU | {"OMP_NUM_THREADS": "1"} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *argv], env=env, **pipes, **options)


def outcome(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@functools.cache
def load(folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    model.config.pad_token_id = None
    return AutoTokenizer.from_pretrained(folder), model


def reference(folder, messages, response, max_length=None):
    """transformers alone, as FsfairX is published: one sequence, its own truncation.

    Without a pad id it pools the very last token. For tokenizers that add the BOS that their template writes,
    or have none.
    """
    import torch

    tokenizer, model = load(folder)
    turns = [*messages, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(tokenizer.bos_token or "")
    tokenizer.truncation_side = "left"
    more = {"truncation": True, "max_length": max_length} if max_length else {}
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", **more)).logits[0, 0].item()


def armorm(folder, messages, response, max_length=None):
    """The published formula for one sequence: transformers' Llama, torch operations, a template by hand."""
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
        x, last = hidden[ends[-1]], config["gating_n_hidden"]
        for i in range(last + 1):
            x = weights[f"gating.layers.{i}.weight"] @ x + weights[f"gating.layers.{i}.bias"]
            x = x if i == last else x.clamp(min=0)
        gating = (x / config["gating_temperature"]).exp()
        gating *= weights["gating.logit_scale"] / gating.sum()
        return float((gating * (weights["reward_transform_matrix"].T @ rewards)).sum())
