"""common/progress.py: the lines of a log, and the file for programs."""

import json

import pytest

from common.progress import Progress, duration, read_progress


def test_lines_of_a_log(capsys):
    progress = Progress(60, "rewards", "records", every=0.0)
    progress.start -= 3
    progress.update(6, "12 responses")
    assert capsys.readouterr().out == "rewards: 6/60 records, 2.0/s, 27s left, 12 responses\n"
    Progress(60, "generate", "prompts", every=0.0).tick()
    assert capsys.readouterr().out == "generate: 0/60 prompts, none finished in 0s\n"
    Progress(60, "generate", "prompts").tick()  # not due yet
    Progress(60, "generate", "prompts", every=0.0, enabled=False).update()
    assert capsys.readouterr().out == "" and duration(3695) == "1h01m"


def test_the_file_for_programs(tmp_path, monkeypatch):
    path = tmp_path / "x.progress.json"
    monkeypatch.setenv("RLHF_PROGRESS", str(path))
    progress = Progress(60, "train", "steps", done=20, enabled=False)
    begun = read_progress(path)
    assert (begun["what"], begun["unit"], begun["done"], begun["total"]) == ("train", "steps", 20, 60)
    assert not begun["rate"] and begun["seconds_left"] is None
    progress.update(1, "loss 0.5")
    assert read_progress(path)["done"] == 20  # at most once a second
    progress.start, progress.written = progress.start - 10, progress.written - 2
    progress.update(1)
    found = read_progress(path)
    assert (found["done"], found["note"]) == (22, "loss 0.5")
    assert found["rate"] == pytest.approx(0.2, rel=0.05)
    assert found["seconds_left"] == pytest.approx(190, rel=0.05)
    monkeypatch.setenv("RANK", "1")
    Progress(5, "other")
    assert read_progress(path)["what"] == "train" and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("RLHF_PROGRESS", str(tmp_path / "no folder" / "x"))
    Progress(5, "other").close()  # what cannot be written ends nothing


@pytest.mark.parametrize("text", ["", "[]", '{"what": 1}', json.dumps({"done": "x"}), "9" * 5000])
def test_a_damaged_file_is_none(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert read_progress(tmp_path / "x") is None and read_progress(tmp_path / "none") is None
