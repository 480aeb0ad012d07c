"""The table on disk: the same as a dict, and flat in memory."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from common.index import Index

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_a_dict():
    index, oracle, dice = Index(), {}, random.Random(0)
    for _ in range(3000):
        key = dice.choice([str(dice.randrange(900)), dice.randrange(900)])  # "5" and 5 are two keys
        oracle[key] = index[key] = (dice.randrange(2**60), dice.randrange(2**31))
    assert len(index) == len(oracle) and set(index) == set(oracle)
    assert all(index[key] == pair for key, pair in oracle.items())
    assert 901 not in index and index.get("901") is None and bool(Index()) is False
    with pytest.raises(KeyError):
        index[901]


def test_it_counts_twins():
    index, words = Index(), ["a", "b", "a", "c", "a", "b"]
    assert [index.count(word) for word in words] == [0, 0, 1, 0, 2, 1]


def test_memory_does_not_grow_with_the_keys():
    """Peak memory of two processes; 400,000 keys of a dict would take some 80 MB."""
    code = (
        "import resource, sys; from common.index import Index; index = Index()\n"
        "for k in range(int(sys.argv[1])): index[f'{k * 2654435761 % 2**64:016x}'] = (k, k)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, count], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for count in ("1000", "400000")
    )
    assert many - few < 30 * 1024


def test_no_room_is_an_error_with_a_way_out(monkeypatch):
    index = Index()
    index._run("PRAGMA max_page_count = 20")
    with pytest.raises(UserError, match="TMPDIR"):
        for k in range(100000):
            index[k] = (k, k)
