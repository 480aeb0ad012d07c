"""Sampling with seeds: what comes is a matter of seeds, whatever is decoded beside it."""

import json
import subprocess
import sys

import micro
import pytest
from faults import ROOT

pytest.importorskip("vllm")

pytestmark = pytest.mark.env("vllm")


def test_answers_follow_seeds_and_not_what_is_decoded_beside_them(tmp_path, device, sizes):
    model = micro.make_policy(tmp_path / "policy", **sizes)
    micro.write_prompts(tmp_path / "prompts.jsonl", 64 if sizes else 8)
    found = {}
    for name, more in {"one": (), "again": (), "few at once": ("--max_num_seqs", 8)}.items():
        command = [sys.executable, "generation/get_hf2.py", "--model_name_or_path", model, "--K", 4]
        command += ["--dataset_name_or_path", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / name]
        command += ["--max_input_length", 400, "--max_new_tokens", 64, "--dtype", "float32", *more]
        # a cache of a given size, so that other processes may take and give back memory meanwhile
        command += ["--gpu_memory_utilization", 0.4, "--kv_cache_gib", 4 if device.type == "cuda" else 0.25]
        end = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert end.returncode == 0, end.stdout + end.stderr
        print(name, end.stdout.strip().splitlines()[-1])
        lines = (tmp_path / f"{name}0.jsonl").read_text().split("\n")[:-1]
        found[name] = [answer for line in lines for answer in json.loads(line)["responses"]]
    assert found["one"] == found["again"] and len(set(found["one"])) > len(found["one"]) / 2
    same = [a == b for a, b in zip(found["one"], found["few at once"], strict=True)]
    print(f"{sum(same)} of {len(same)} answers are the same beside fewer others")
    assert sum(same) >= 0.95 * len(same)
