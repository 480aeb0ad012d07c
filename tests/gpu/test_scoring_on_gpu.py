"""Packed rows by the GPU's kernel, in bf16: no further from float32 than one plain sequence at a time."""

import json
import random
import subprocess
import sys

import micro
import numpy as np
import pytest
from faults import ROOT

torch = pytest.importorskip("torch")

from common import shared_prompts  # noqa: E402
from common.shared_prompts import hidden_states, pack, prepare  # noqa: E402

ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 100},
    "gemma2": {"attn_logit_softcapping": 50.0, "sliding_window": 100, "query_pre_attn_scalar": 64},
}
FURTHER = 1.5  # times as far as a plain pass


def groups():
    """Prompts of 300 and fewer tokens, responses of 1 to 400."""
    rng = random.Random(0)
    draw = lambda n: [rng.randrange(3, 250) for _ in range(n)]  # noqa: E731
    found = []
    for prompt, own in ((300, (400, 1, 150)), (40, (60, 90)), (1, (200, 30)), (130, (8, 8, 8, 250))):
        front = draw(prompt)
        found.append([[*front, 10 + k, *draw(n - 1)] for k, n in enumerate(own)])
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_as_exact_as_those_of_plain_passes(architecture, device, sizes, monkeypatch):
    from transformers import AutoModel

    torch.manual_seed(0)
    config = micro.make_config(micro.make_tokenizer(), architecture, **sizes | ARCHITECTURES[architecture])
    model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager").to(device).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("q_proj" in name or "k_proj" in name):
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)  # attention that is far from even
    each = [sequence for group in groups() for sequence in group]
    exact = plain(model, each)
    model.to(torch.bfloat16)
    usual = plain(model, each)
    calls = []
    kernel = shared_prompts.varlen_attn
    monkeypatch.setattr(shared_prompts, "varlen_attn", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    prepare(model)
    model.zero_grad()
    packed = pack(groups(), device)
    row = hidden_states(model, packed)
    states = [row[where] for where in packed.columns()]
    weighed(states).backward()
    ours = torch.cat([one.detach().float() for one in states]), gradients(model)
    if device.type == "cuda" and architecture != "gemma2":  # which caps scores: no flash kernel does
        assert len(calls) == config.num_hidden_layers
    for what, true, theirs, mine in zip(("states", "gradients"), exact, usual, ours, strict=True):
        far, near = ((found - true).norm() / true.norm() for found in (mine, theirs))
        print(f"{architecture}: {what} {far:.2e} off float32, plain passes {near:.2e}")
        assert far < FURTHER * near + 1e-4, what


def weighed(states):
    """A loss in which each state has another share."""
    total = 0.0
    for k, one in enumerate(states):
        toward = torch.sin(torch.arange(one.numel(), device=one.device).view_as(one) * (k + 1) / 7)
        total = total + (one.float() * toward).mean()
    return total


def gradients(model):
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def plain(model, each):
    """(states, gradients) by one sequence at a time with transformers' own attention."""
    model.zero_grad()
    device = next(model.parameters()).device
    states = []
    for sequence in each:
        ids = torch.tensor([sequence], device=device)
        states.append(model(input_ids=ids, use_cache=False).last_hidden_state[0])
    weighed(states).backward()
    return torch.cat([one.detach().float() for one in states]), gradients(model)


def test_rewards_that_share_prompts_are_those_of_padded_batches(tmp_path, device, sizes):
    """By the script; both against float32."""
    model = micro.make_reward_model(tmp_path / "rm", **sizes)
    rng = random.Random(0)
    text = lambda n: "".join(rng.choice("abcdefgh ") for _ in range(n))  # noqa: E731
    with open(tmp_path / "generated.jsonl", "w") as file:
        for i in range(48 if sizes else 6):
            prompt = [{"role": "user", "content": text(rng.randrange(5, 200))}]
            answers = [text(rng.randrange(1, 200)) for _ in range(4)]
            file.write(json.dumps({"id": f"{i}", "prompt": prompt, "responses": answers}) + "\n")
    ways = {"exact": ("float32", "false"), "padded": ("bfloat16", "false"), "shared": ("bfloat16", "true")}
    found = {}
    for way, (dtype, share) in ways.items():
        out = tmp_path / f"{way}.jsonl"
        command = [sys.executable, "annotate_data/get_rewards.py", "--reward_name_or_path", model]
        command += ["--dataset_name_or_path", tmp_path / "generated.jsonl", "--output_dir", out]
        command += ["--dtype", dtype, "--share_prompts", share]
        end = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert end.returncode == 0, end.stdout + end.stderr
        print(way, end.stdout.strip().splitlines()[-1])
        lines = out.read_text().split("\n")[:-1]
        found[way] = np.array([json.loads(line)["rewards"] for line in lines])
    far, near = (np.abs(found[way] - found["exact"]).mean() for way in ("shared", "padded"))
    print(f"rewards {far:.2e} off float32, padded {near:.2e}, spread {found['exact'].std():.2e}")
    assert far < FURTHER * near + 1e-3 * found["exact"].std()
