"""benchmarks/dpo.py runs, and counts the tokens that it bases its ceiling on as TRL's collator and our rows
have them.
"""

import json
import subprocess
import sys
from pathlib import Path

import micro
import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference

ROOT = Path(__file__).resolve().parents[2]

from benchmarks import dpo as benchmark


def test_padded_tokens_are_those_of_trls_batches():
    rows, order = benchmark.make_rows("recipe", 12, 200, 3), [5, 3, 8, 0, 1, 2, 4, 6, 7, 11, 9, 10]
    collate = DataCollatorForPreference(pad_token_id=0)
    for at_once in (1, 2, 4):
        batches = ([rows[i] for i in order[k : k + at_once]] for k in range(0, 12, at_once))
        want = sum(collate(batch)["input_ids"].numel() for batch in batches)
        assert benchmark.padded_tokens(rows, order, at_once) == want


def test_lengths_are_the_recipes():
    rows = benchmark.make_rows("recipe", 2000, 200, 0)
    prompt, response = (sum(len(row[key]) for row in rows) / 2000 for key in ("prompt_ids", "chosen_ids"))
    assert 170 < prompt < 230 and 310 < response < 390


@pytest.mark.long
def test_it_measures_all_ways(tmp_path):
    policy = micro.make_policy(tmp_path / "policy", max_position_embeddings=4096)
    words = (
        f"--steps 2 --pairs 2 --batch_sizes 1 2 --model_name_or_path {policy} --output_dir {tmp_path}/b.json"
    )
    command = [sys.executable, ROOT / "benchmarks/dpo.py", "--shape", "short", *words.split()]
    end = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert end.returncode == 0, end.stdout + end.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert set(found["ways"]) == set(benchmark.WAYS) and found["ceiling"] > 1
    assert all(way["pairs_per_second"] > 0 and way["bytes"] > 1e8 for way in found["ways"].values())
    assert "of ceiling" in end.stdout
