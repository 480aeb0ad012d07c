"""generation/gen_hf.py against a mock server that refuses, hangs, breaks off and comes back."""

import functools
import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import micro
import pytest
from engine import policy, records
from faults import free_ports
from mock_server import Mock, wait_for

from common.cli import UserError
from generation import dispatch, gen_hf

pytestmark = pytest.mark.env("vllm")

SCRIPT = Path(__file__).resolve().parents[2] / "generation" / "gen_hf.py"


def command(folder, *servers, **more):
    """The script and its arguments; a server is a Mock or a port."""
    settings = {"tokenizer": policy(), "dataset_name_or_path": folder / "p.jsonl", "K": 3} | more
    argv = [SCRIPT, "--output_dir", folder / "out.jsonl"]
    argv += ["--ports", *(server.port if isinstance(server, Mock) else server for server in servers)]
    return [
        str(part) for part in (*argv, *(x for key, value in settings.items() for x in (f"--{key}", value)))
    ]


@pytest.fixture
def folder(tmp_path):
    micro.write_prompts(tmp_path / "p.jsonl", 30)
    return tmp_path


@pytest.fixture
def client(folder, monkeypatch):
    """Asks servers in this process."""

    def ask(*servers, **more):
        monkeypatch.setattr(sys, "argv", command(folder, *servers, **more))
        gc.collect()  # the lock of a run that failed in this process ends with its Output
        gen_hf.main()

    return ask


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(dispatch, "pause", lambda failures: 0.3)


def check_whole(folder, count=30, K=3):
    got = records(folder / "out.jsonl")
    assert [r["number"] for r in got] == list(range(count))
    for record in got:
        seed = record["responses"][0].split("/")[0]
        assert record["responses"] == [f"{seed}/{i}" for i in range(K)] and record["num_tokens"] == [2] * K
    assert len({r["responses"][0] for r in got}) == count


def first_prompt(what):
    """A behaviour: one prompt, the first that is asked, meets `what`; its seed comes as the second value."""
    bad = []

    def behave(count, body):
        bad[:] = bad or [body["seed"]]
        return what if body["seed"] == bad[0] else None

    return behave, bad


def ends_at(count):
    """A server that breaks off at the count-th request and is gone."""
    mock = Mock(lambda n, body: mock.loop.call_soon(mock.stopped.set) and "cut" if n >= count else None)
    return mock


def revived(dead, successor, seconds=0.0):
    """Begin to start `successor` in a thread, some time after `dead` has ended."""
    thread = threading.Thread(target=lambda: (dead.thread.join(), time.sleep(seconds), successor.__enter__()))
    thread.start()
    return thread


def test_work_is_shared_bounded_ordered_and_explicit(client, folder, capsys):
    settings = {"concurrency": 4, "max_new_tokens": 500}
    with Mock(pause=0.02) as a, Mock(pause=0.05) as b:
        client(a, b, **settings)
        check_whole(folder)
        assert len(a.bodies) + len(b.bodies) == 30 and len(a.bodies) > len(b.bodies) > 3
        assert a.most <= 4 and b.most <= 4
        explicit = "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed"
        for body in a.bodies:
            assert {*explicit.split(), "stop_token_ids", "skip_special_tokens"} <= set(body)
            assert all(isinstance(t, int) for t in body["prompt"])
            assert body["model"] == "mock" and body["n"] == 3
            assert body["max_tokens"] == min(500, 512 - len(body["prompt"]))
    out = capsys.readouterr().out
    for said in ("read 30 prompts, wrote 30 records", "skipped 0", "sampled 180 tokens", "tokens/s"):
        assert said in out
    client(a, b, **settings)  # needs no servers any more
    assert "complete, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="top_p was 1.0 and is now 0.5"):
        client(a, b, **settings, top_p=0.5)


def test_a_client_whose_prompts_are_all_in_work_says_that_it_lives(client, monkeypatch, capsys):
    """All of them finish at the end, together."""
    monkeypatch.setattr(gen_hf, "Progress", functools.partial(gen_hf.Progress, every=0.2))
    with Mock(pause=1.0) as server:
        client(server)
    assert 2 <= capsys.readouterr().out.count("generate: 0/30 prompts, none finished in ") <= 6


def test_what_fails_is_asked_again(client, folder, monkeypatch):
    monkeypatch.setattr(dispatch, "pause", lambda failures: 0.01)
    kinds = [408, 429, 500, "hang", "cut", "half", "garbage", "deep", "list", "another", "fewer", "abort"]
    kinds += [
        {"text": None},
        {"text": "\ud800"},
        {"finish_reason": ["stop"]},
        {"index": 1},
        {"token_ids": None},
    ]
    failing = dict(zip(range(1, 99, 2), kinds, strict=False))
    with Mock(lambda count, body: failing.get(count)) as a:
        client(a, concurrency=1, timeout=1, retries=1000)
        assert len(a.bodies) == 30 + len(kinds)
    check_whole(folder)


def test_a_busy_server_is_not_held_against_a_prompt(client, folder):
    with Mock(lambda count, body: 429 if count < 6 else None) as a:
        client(a, concurrency=1, retries=2)
    check_whole(folder)


def test_another_4xx_is_final_and_quotes_the_server(client, folder):
    """What was done is kept, but not for servers of another length."""
    with Mock(lambda count, body: 400 if count == 5 else None) as a:
        with pytest.raises(UserError, match="HTTP 400.*the server says 400"):
            client(a, concurrency=1)
        assert len(a.bodies) == 5 and len(records(folder / "out.jsonl.partial")) == 4
        with Mock(length=400) as b, pytest.raises(UserError, match="max_model_len 512, now it is 400"):
            client(b)
        client(a, concurrency=1)
        assert len(a.bodies) == 5 + 26  # what was done is not asked again
    check_whole(folder)
    with Mock(length=400) as b:
        client(b)  # finished work asks nothing of servers


@pytest.mark.parametrize("what, words", [(500, "HTTP 500"), ("fewer", "2 responses instead of 3")])
def test_a_prompt_that_every_server_refuses_ends_the_run_and_no_server(client, folder, what, words):
    behave, bad = first_prompt(what)
    with Mock(behave, pause=0.1) as a, Mock(behave, pause=0.1) as b:
        with pytest.raises(
            UserError, match=f"prompt [0-9a-f]{{16}} failed 5 times.*{words}.*29 records are kept"
        ):
            client(a, b, retries=4, concurrency=1)
        asked = [sum(body["seed"] == bad[0] for body in mock.bodies) for mock in (a, b)]
        assert sum(asked) == 5 and min(asked) >= 1
        assert len(a.bodies) + len(b.bodies) == 29 + 5 and min(len(a.bodies), len(b.bodies)) > 5
    assert len(records(folder / "out.jsonl.partial")) == 29


@pytest.mark.parametrize("what, pause", [(429, 0.3), (500, 0.0), ("cut", 0.3)])
def test_a_sick_server_does_not_keep_prompts_from_a_healthy_one(client, folder, what, pause):
    with (
        Mock(lambda count, body: what) as sick,
        Mock(lambda count, body: what) as ill,
        Mock(pause=pause) as well,
    ):
        client(sick, ill, well, concurrency=4, retries=2, give_up_after=2)
        assert len(well.bodies) == 30
        assert len(sick.bodies) <= 4 + 5  # what it had at once, then one at a time with growing pauses
    check_whole(folder)


def test_a_server_that_answers_again_is_used_again(client, folder):
    with Mock(lambda count, body: 500 if count <= 4 else None) as ill, Mock(pause=0.4) as slow:
        client(ill, slow, concurrency=2)
        assert len(ill.bodies) - 4 > 5
    check_whole(folder)


def test_all_dead_is_said_in_time_and_continued_later(client, folder):
    with ends_at(6) as a:
        begin = time.monotonic()
        with pytest.raises(UserError, match="no server has answered for 2s.*5 records are kept"):
            client(a, give_up_after=2, concurrency=1)
        assert 2 <= time.monotonic() - begin < 25
    with Mock(port=a.port) as b:
        client(b, concurrency=1)
        assert len(b.bodies) == 25
    check_whole(folder)


@pytest.mark.parametrize("what, told", [(429, "HTTP 429"), ("cut", "")])  # "cut" still answers probes
def test_a_server_that_answers_no_request_is_given_up(client, short_pauses, what, told):
    with Mock(lambda count, body: what) as a:
        with pytest.raises(UserError, match=f"no server has answered for 1s.*{told}"):
            client(a, give_up_after=1, retries=1000)
        assert len(a.bodies) < 2000  # with pauses, not in a tight loop


def test_a_server_is_not_given_up_while_it_may_still_answer(client, folder):
    micro.write_prompts(folder / "p.jsonl", 4)
    with Mock(lambda count, body: 429 if a.in_flight else None, pause=2) as a:
        client(a, concurrency=4, give_up_after=1)
        assert len(a.bodies) > 4
    check_whole(folder, 4)


def test_a_server_that_is_back_has_time_to_answer(client, folder, short_pauses, capsys):
    with ends_at(3) as a:
        again = Mock(lambda count, body: 429 if count <= 6 else None, port=a.port)
        reviver = revived(a, again, 2)
        client(a, concurrency=1, give_up_after=3)
        reviver.join()
        again.__exit__()
    check_whole(folder)
    assert f":{a.port} is back" in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, asked, seconds", [(429, "1", 1), (503, "9" * 5000, 2), (429, "Wed, 21 Oct 2037 07:28:00 GMT", 0)]
)
def test_a_server_that_asks_for_patience_has_it(client, folder, status, asked, seconds):
    micro.write_prompts(folder / "p.jsonl", 2)
    times = []

    def behave(count, body):
        times.append(time.monotonic())
        return (status, asked) if count == 1 else None

    with Mock(behave) as a:
        client(a, concurrency=1, give_up_after=2, retries=0)
    assert seconds <= times[1] - times[0] < seconds + 2.5
    check_whole(folder, 2)


@pytest.mark.parametrize("model", ["mock", "other"])
def test_a_dead_server_s_work_goes_on_and_it_is_used_again_with_the_same_model(client, folder, capsys, model):
    with Mock(pause=0.1) as a, ends_at(3) as b:
        again = Mock(port=b.port, model=model)
        reviver = revived(b, again, 0.3)
        client(a, b, concurrency=1)
        reviver.join()
        again.__exit__()
    check_whole(folder)
    out = capsys.readouterr().out
    assert f"lost http://127.0.0.1:{b.port}" in out
    assert (f":{b.port} is back" in out) == (len(again.bodies) > 0) == (model == "mock")


def test_servers_must_agree_and_answer(client, folder):
    with Mock() as a, Mock(model="other") as b, Mock(length=256) as c:
        cases = {"mock.*other": b, "512.*256": c, "does not answer": free_ports(1), "once": a}
        for words, server in cases.items():
            with pytest.raises(UserError, match=words):
                client(a, server)
        assert a.bodies == [] and not (folder / "out.jsonl").exists()


def test_another_model_s_tokenizer_is_refused(client, capsys):
    with Mock(tokens=[1, 2, 3]) as a:
        with pytest.raises(UserError, match="is not that of the served model mock"):
            client(a)
        assert a.bodies == []
    with Mock() as a:
        client(a)
        assert "is not checked" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_done(client, folder):
    with Mock(pause=0.3) as a:
        argv = [sys.executable, *command(folder, a, concurrency=2)]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(a.bodies) > 5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "stopped; start the same command again to continue\n"
        assert process.returncode == 130
        done = len(records(folder / "out.jsonl.partial"))
        assert done >= 3
        a.pause, asked = 0.0, len(a.bodies)
        client(a, concurrency=2)
        assert len(a.bodies) - asked == 30 - done
    check_whole(folder)
