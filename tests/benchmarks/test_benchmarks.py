"""benchmarks/: they run, and what they compare computes the same. How fast is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import micro

from benchmarks import annotation
from common.cli import UserError, parse

pytestmark = pytest.mark.env("vllm")

SCRIPT = ROOT / "benchmarks" / "annotation.py"
WAYS = ["pipeline", "padded", "shared"]  # an engine's start takes longer than all of this


def test_ways_of_scoring_agree(tmp_path):
    micro.make_reward_model(tmp_path / "rm", max_position_embeddings=1024)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    words = "--reward_name_or_path rm --records 3 --K 3 --repeats 2 --batch_tokens 900 --shared_tokens 900"
    command = [sys.executable, SCRIPT, *words.split(), "--ways", *WAYS, "--output_dir", "out/numbers.json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert list(found["ways"]) == WAYS and found["sequences"] == 9 and found["dtype"] == "float32"
    for name, numbers in found["ways"].items():
        assert numbers["largest_difference"] < 1e-4
        assert len(numbers["seconds"]) == 2 and numbers["sequences_per_second"] > 0
        assert name in done.stdout
    rates = {name: numbers["sequences_per_second"] for name, numbers in found["ways"].items()}
    assert found["shared_over_best_other"] == pytest.approx(rates["shared"] / rates["padded"], rel=0.02)
    assert found["versions"]["torch"] and found["cores"] >= 1


def test_numbers_are_medians_and_the_largest_difference():
    taken = {
        "pipeline": ([4.0, 2.0, 9.0], [1.0], [[1.0, 2.0]]),
        "padded": ([2.0, 2.0, 2.0], [1.0], [[1.0, 2.5]]),
        "vllm": ([1.0, 1.0, 8.0], [1.0], [[1.0, 2.0]]),
        "shared": ([0.5, 0.4, 0.1], [1.0], [[0.9, 2.0]]),
    }
    found, ratio = annotation.results(taken, [[1.0, 2.0]])
    assert [numbers["sequences_per_second"] for numbers in found.values()] == [0.5, 1.0, 2.0, 5.0]
    assert [numbers["times_pipeline"] for numbers in found.values()] == [1.0, 2.0, 4.0, 10.0] and ratio == 2.5
    assert [round(numbers["largest_difference"], 6) for numbers in found.values()] == [0.0, 0.5, 0.0, 0.1]


def test_records_have_the_lengths_that_are_told():
    made = annotation.make_records(20, 8, 1)
    prompts = [len(record["prompt"][0]["content"]) for record in made]
    responses = [len(text) for record in made for text in record["responses"]]
    assert min(prompts) >= 100 and max(prompts) <= 400 and max(prompts) - min(prompts) > 150
    assert len(responses) == 160 and max(responses) - min(responses) > 200
    assert min(responses) >= 20 and max(responses) <= 300
    assert made == annotation.make_records(20, 8, 1) != annotation.make_records(20, 8, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ways pipelines", "--ways takes some of pipeline padded vllm shared"),
        ("--repeats 0", "must be at least 1"),
        ("--reward_name_or_path ./none", "--reward_name_or_path ./none: no such folder"),
    ],
)
def test_wrong_arguments_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        annotation.settle(parse(annotation.Arguments, "", words.split()))


def test_kept_memory_is_not_cleared_again():
    """Minor page faults of 20 tensors of 64 MiB: thousands when the kernel hands out new pages."""
    code = """
import resource, torch
from common import devices
for keep in (False, True):
    devices.keep_memory(keep)
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20): torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    given, kept = map(int, done.stdout.split())
    assert 2 * kept < given
