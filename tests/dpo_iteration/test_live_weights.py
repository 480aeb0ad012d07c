"""Weights on their way to a real vLLM server: that they arrive, and what is said when they do not."""

import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from online import START, argv
from training import reset

from common.cli import UserError, parse
from dpo_iteration import live_weights
from dpo_iteration.online_arguments import Arguments, read_parts
from generation import live_servers


@pytest.fixture(scope="module")
def online(live_port, tmp_path_factory):
    """What an online training has loaded, its server included."""
    reset()
    folder = tmp_path_factory.mktemp("online")
    with patch.object(sys, "argv", ["run_online.py", *argv(folder, live_port)]):
        args = parse(Arguments, "")
    from dpo_iteration.online import Online

    made = Online(args, read_parts(args))
    made.live.folder = folder / "weights"
    return made


def change(online, seed):
    """Move the policy's weights, the embeddings too, by a twentieth of their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in online.trainer.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * parameter.abs().mean() * noise


def in_float64(online, sequences):
    """The policy's log-probabilities of each sequence by itself, from a copy that transformers loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32)
    state = {key: value.clone() for key, value in online.trainer.model.state_dict().items()}
    model.load_state_dict(state)
    model.double().eval()
    found = []
    for ids in sequences:
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        found.append(logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0])
    return found


def test_new_weights_arrive_whole(online):
    """The server's log-probabilities after each version are those of a float64 pass of the same weights."""
    sequences = online.encoded()
    for version in range(3):
        if version:
            change(online, version)
        online.live.send(version, sequences)
        assert [path.name for path in online.live.folder.iterdir()] == [f"version_{version:06}"]
        [found] = live_servers.log_probs(online.live.servers, sequences).values()
        for values, expected in zip(found, in_float64(online, sequences), strict=True):
            assert torch.tensor(values).sub(expected).abs().max() < 2e-4
        assert online.live.still_held() == "" and online.live.version == version


def test_a_tied_head_that_is_left_behind_is_found(online, monkeypatch):
    """Without its copy in the folder vLLM keeps the head of the version before, and says nothing of it."""
    monkeypatch.setattr(live_weights, "write_copies", lambda *_: None)
    change(online, 10)
    held = online.live.version
    with pytest.raises(UserError, match=r"^http://127.0.0.1:\d+ does not hold .* also after"):
        online.live.send(10, online.encoded())
    assert online.live.version == held
    monkeypatch.undo()
    online.live.send(10, online.encoded())


def test_a_second_attempt_says_which_side_was_wrong(online, monkeypatch, capsys):
    """Log-probabilities that the trainer got wrong once do not end a run, and are not the server's fault."""
    compute, done = live_weights.own_log_probs, []

    def wrong_at_first(*given):
        found, moved = compute(*given)
        done.append(found)
        return [found[0] + 0.01 * (len(done) == 1), *found[1:]], moved

    monkeypatch.setattr(live_weights, "own_log_probs", wrong_at_first)
    online.live.send(11, online.encoded())
    assert len(done) == 2 and online.live.version == 11
    said = capsys.readouterr().out
    assert "by 0.01 a token" in said and "sent once more" in said
    assert re.search(
        r"second attempt: the trainer's moved by 0.01, those of http://127.0.0.1:\d+ by 0\n", said
    )


def test_a_server_that_comes_back_with_the_start_is_found_and_mended(online):
    change(online, 20)
    online.live.send(20, online.encoded())
    folder = online.live.folder / "start"
    shutil.copytree(Path(START), folder)
    live_weights.write_copies(folder, {"lm_head.weight": "model.embed_tokens.weight"})
    live_servers.reload_weights(online.live.servers, folder)
    assert "lost its weights" in online.live.still_held()
    online.live.send(20, online.encoded())
    assert online.live.still_held() == ""


def test_a_reload_that_changes_no_digit_is_no_reload(online, monkeypatch):
    """In half precision a version differs from the last by less than rounding; the digits still move."""
    sequences = online.encoded()
    online.live.send(30, sequences)
    monkeypatch.setattr(live_servers, "reload_weights", lambda *_: None)
    monkeypatch.setattr(live_weights, "furthest", lambda *_: (0.0, 1.0))  # as if rounding explained all
    change(online, 31)
    with pytest.raises(UserError, match="digit by digit"):
        online.live.send(31, sequences)


def test_copies_are_added_under_the_other_name_once(tmp_path):
    from safetensors.torch import load_file, save_file

    weight = torch.arange(6.0).view(2, 3)
    save_file({"embed": weight}, tmp_path / "model.safetensors")
    for _ in (1, 2):
        live_weights.write_copies(tmp_path, {"head": "embed", "other": "nowhere"})
    held = load_file(tmp_path / "model-tied.safetensors")
    assert held.keys() == {"head"} and held["head"].equal(weight)
