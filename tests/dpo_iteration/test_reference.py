"""Reference log-probabilities: right, kept on disk under a key of all that shapes them, and continued after a
kill.
"""

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import alone, make_rows
from transformers import AutoModelForCausalLM

from common.cli import UserError
from common.shared_prompts import Unsupported
from dpo_iteration import reference


@pytest.fixture
def folder(tmp_path):
    return micro.make_policy(tmp_path / "reference")


def add(folder, cache, rows, sharing=True, loads=None, **about):
    """`add_reference` of one process; `loads` counts how often the model was loaded."""

    def load():
        if loads is not None:
            loads.append(1)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        return reference.ready(model, SimpleNamespace(deepspeed_plugin=None), sharing)

    passes = reference.Passes(300 if sharing else None, at_once=2, pad_token_id=0)
    return reference.add_reference(rows, load, str(folder), None, cache, {"dtype": "float32"} | about, passes)


def values(rows):
    return [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows]


@pytest.mark.parametrize("sharing", [True, False])
def test_they_are_those_of_one_sequence_at_a_time(folder, tmp_path, sharing):
    rows = make_rows(9)
    found, _ = add(folder, tmp_path / "cache", rows, sharing)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found == 0
    for row in rows:
        with torch.no_grad():
            want = alone(model, row)
        assert row["ref_chosen_logps"] == pytest.approx(float(want[0]), abs=1e-4)
        assert row["ref_rejected_logps"] == pytest.approx(float(want[1]), abs=1e-4)


def test_few_padded_pairs_take_few_passes(folder, tmp_path, monkeypatch):
    """5 pairs by twos: not as many passes as SAVE_EVERY pairs would take."""
    true, seen = reference.score, []
    monkeypatch.setattr(reference, "score", lambda *given: seen.append(1) or true(*given))
    for most, passes in ((2000, 3), (3, 4)):
        monkeypatch.setattr(reference, "SAVE_EVERY", most)
        add(folder, tmp_path / str(most), make_rows(5), sharing=False)
        assert len(seen) == passes
        seen.clear()


def test_what_is_known_is_not_computed_again(folder, tmp_path):
    loads, first = [], make_rows(6)
    add(folder, tmp_path / "cache", first, loads=loads)
    again = make_rows(6)
    assert add(folder, tmp_path / "cache", again, loads=loads)[0] == 6 and loads == [1]
    assert values(again) == values(first)
    # An iteration that trains on old and new pairs, in another order.
    more = make_rows(6)[3:] + make_rows(4, seed=9)
    assert add(folder, tmp_path / "cache", more, loads=loads)[0] == 3 and loads == [1, 1]
    assert values(more)[:3] == values(first)[3:]


def test_one_changed_byte_of_pair_or_weights_misses_the_cache(folder, tmp_path):
    rows, cache = make_rows(4), tmp_path / "cache"
    _, key = add(folder, cache, rows)
    changed = make_rows(4)
    changed[2]["rejected_ids"][0] ^= 1
    assert add(folder, cache, changed)[0] == 3
    assert add(folder, cache, make_rows(4), dtype="bfloat16")[0] == 0
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for at in (len(whole) // 2, len(whole) - 1):  # in the middle of a large file, too
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found, other = add(folder, cache, make_rows(4))
        assert found == 0 and other != key
    path.write_bytes(whole)
    assert add(folder, cache, make_rows(4)) == (4, key)
    (folder / "tokenizer_config.json").write_text("{}")  # the tokens are what they are
    assert add(folder, cache, make_rows(4)) == (4, key)


def test_a_killed_pass_continues(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "SAVE_EVERY", 4)
    true, seen = reference.score, []

    def dies(*given):
        seen.append(1)
        if len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2:
            raise KeyboardInterrupt
        return true(*given)

    monkeypatch.setattr(reference, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        add(folder, tmp_path / "cache", make_rows(12))
    monkeypatch.setattr(reference, "score", true)
    continued, whole = make_rows(12), make_rows(12)
    assert add(folder, tmp_path / "cache", continued)[0] == 8
    add(folder, tmp_path / "other", whole)
    assert torch.allclose(torch.tensor(values(continued)), torch.tensor(values(whole)), atol=1e-4)


def test_files_are_safetensors_and_a_damaged_one_is_computed_again(folder, tmp_path, capsys):
    rows = make_rows(3)
    _, key = add(folder, tmp_path / "cache", rows)
    [path] = (tmp_path / "cache" / key).glob("*.safetensors")
    held = load_file(path)
    assert held["pairs"].shape == (3, 32) and held["pairs"].dtype == torch.uint8
    assert held["logps"].dtype == torch.float32
    by_key = dict(zip(map(bytes, held["pairs"].numpy()), map(tuple, held["logps"].tolist()), strict=True))
    assert by_key == {reference.pair_key(row): pair for row, pair in zip(rows, values(rows))}
    path.write_bytes(path.read_bytes()[:-5])
    again = make_rows(3)
    assert add(folder, tmp_path / "cache", again)[0] == 0 and values(again) == values(rows)
    assert "is damaged and not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["logps"].add_(5.0),
        lambda held: held["logps"][0, 1].fill_(math.nan),
        lambda held: held.update(logps=held["logps"][:2].clone()),
    ],
)
def test_values_that_were_not_written_so_are_not_used(folder, tmp_path, capsys, change):
    rows = make_rows(3)
    _, key = add(folder, tmp_path / "cache", rows)
    [path] = (tmp_path / "cache" / key).glob("*.safetensors")
    held = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(held)
    save_file(held, path, metadata)
    again = make_rows(3)
    assert add(folder, tmp_path / "cache", again)[0] == 0 and values(again) == values(rows)
    assert "its values are not those that were written" in capsys.readouterr().out


def test_a_model_that_cannot_share_after_all_says_what_to_do(folder, tmp_path, monkeypatch):
    def refuses(*given):
        raise Unsupported("its attention has sinks")

    monkeypatch.setattr(reference, "score", refuses)
    with pytest.raises(UserError, match="its attention has sinks.*--share_prompts false"):
        add(folder, tmp_path / "cache", make_rows(2))


def test_a_reference_without_numbers_is_refused(folder, tmp_path):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="no numbers"):
        add(folder, tmp_path / "cache", make_rows(2))
    assert not list(Path(tmp_path / "cache").rglob("*.safetensors"))


def test_what_a_killed_write_left_is_removed_once_it_is_old(folder, tmp_path):
    _, key = add(folder, tmp_path / "cache", make_rows(3))
    old, new = (tmp_path / "cache" / key / f"x.safetensors.{pid}.tmp" for pid in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert add(folder, tmp_path / "cache", make_rows(3))[0] == 3 and not old.exists() and new.exists()
