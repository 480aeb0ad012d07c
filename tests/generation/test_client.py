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

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "generation" / "register_server.sh"


def client(monkeypatch, folder, mocks, *more):
    command = [
        "--tokenizer",
        policy(),
        "--dataset_name_or_path",
        folder / "p.jsonl",
        "--output_dir",
        folder / "out.jsonl",
        "--K",
        "3",
    ]
    ports = [m.port if isinstance(m, Mock) else m for m in mocks]
    monkeypatch.setattr(
        sys, "argv", [str(part) for part in ("gen_hf.py", *command, "--ports", *ports, *more)]
    )
    gc.collect()  # the lock of a run that failed in this process ends with its Output
    gen_hf.main()


def check_whole(folder, count, K=3):
    got = records(folder / "out.jsonl")
    assert [r["number"] for r in got] == list(range(count))
    for record in got:
        seed = record["responses"][0].split("/")[0]
        assert record["responses"] == [f"{seed}/{i}" for i in range(K)] and record["num_tokens"] == [2] * K
    assert len({r["responses"][0] for r in got}) == count


@pytest.fixture
def folder(tmp_path):
    micro.write_prompts(tmp_path / "p.jsonl", 30)
    return tmp_path


def test_work_is_shared_bounded_ordered_and_explicit(folder, monkeypatch, capsys):
    with Mock(pause=0.02) as a, Mock(pause=0.05) as b:
        client(monkeypatch, folder, [a, b], "--concurrency", "4", "--max_new_tokens", "500")
        check_whole(folder, 30)
        assert len(a.bodies) + len(b.bodies) == 30 and len(a.bodies) > len(b.bodies) > 3
        assert a.most <= 4 and b.most <= 4
        for body in a.bodies:
            assert (
                all(isinstance(t, int) for t in body["prompt"]) and body["model"] == "mock" and body["n"] == 3
            )
            assert {
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "seed",
                "stop_token_ids",
                "skip_special_tokens",
            } <= set(body)
            assert body["max_tokens"] == min(500, 512 - len(body["prompt"]))
    out = capsys.readouterr().out
    assert (
        "read 30 prompts, wrote 30 records" in out
        and "skipped 0" in out
        and "sampled 180 tokens" in out
        and "tokens/s" in out
    )
    client(
        monkeypatch, folder, [a, b], "--concurrency", "4", "--max_new_tokens", "500"
    )  # needs no servers any more
    assert "complete, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="top_p was 1.0 and is now 0.5"):
        client(monkeypatch, folder, [a, b], "--max_new_tokens", "500", "--top_p", "0.5")


def test_a_client_whose_prompts_are_all_in_work_says_that_it_lives(folder, monkeypatch, capsys):
    """All of them finish at the end, together."""
    monkeypatch.setattr(gen_hf, "Progress", functools.partial(gen_hf.Progress, every=0.2))
    with Mock(pause=1.0) as server:
        client(monkeypatch, folder, [server])
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("generate: 0/30 prompts, none finished in ")
    ]
    assert 2 <= len(lines) <= 6, lines


@pytest.mark.parametrize(
    "what",
    [
        408,
        429,
        500,
        503,
        "hang",
        "cut",
        "half",
        "garbage",
        "deep",
        "list",
        "another",
        "fewer",
        "abort",
        "null",
        {"text": None},
        {"text": "\ud800"},
        {"finish_reason": ["stop"]},
        {"index": 1},
        {"token_ids": None},
    ],
    ids=str,
)
def test_what_fails_is_asked_again(folder, monkeypatch, what):
    with Mock(lambda count, body: what if count in (1, 2, 9) else None) as a, Mock() as b:
        client(monkeypatch, folder, [a, b], "--concurrency", "3", "--timeout", "1")
        check_whole(folder, 30)
        assert len(a.bodies) + len(b.bodies) >= 32


def test_a_busy_server_is_not_held_against_a_prompt(folder, monkeypatch):
    with Mock(lambda count, body: 429 if count < 6 else None) as a:
        client(monkeypatch, folder, [a], "--concurrency", "1", "--retries", "2")
        check_whole(folder, 30)


def test_servers_of_another_length_do_not_go_on_with_half_done_work(folder, monkeypatch):
    with (
        Mock(lambda count, body: 400 if count == 9 else None) as a,
        pytest.raises(UserError, match="HTTP 400"),
    ):
        client(monkeypatch, folder, [a], "--concurrency", "1")
    with Mock(length=400) as b:
        with pytest.raises(UserError, match="max_model_len 512, now it is 400"):
            client(monkeypatch, folder, [b])
    with Mock() as c:
        client(monkeypatch, folder, [c])
        check_whole(folder, 30)
    with Mock(length=400) as b:
        client(monkeypatch, folder, [b])  # finished work asks nothing of servers


def test_another_4xx_is_final_and_quotes_the_server(folder, monkeypatch):
    with Mock(lambda count, body: 400 if count == 5 else None) as a:
        with pytest.raises(UserError, match="HTTP 400.*the server says 400"):
            client(monkeypatch, folder, [a], "--concurrency", "1")
        assert len(a.bodies) == 5
        assert len(records(folder / "out.jsonl.partial")) == 4
        a.behave = lambda count, body: None
        client(monkeypatch, folder, [a], "--concurrency", "1")
        assert len(a.bodies) == 5 + 26  # what was done is not asked again
        check_whole(folder, 30)


@pytest.mark.parametrize(
    "what, words", [("fewer", "2 responses instead of 3"), (500, "HTTP 500"), ("garbage", "not JSON")]
)
def test_what_fails_for_good_ends_the_run(folder, monkeypatch, what, words):
    bad = []

    def behave(count, body):
        bad[:] = bad or [body["seed"]]
        return what if body["seed"] == bad[0] else None

    with Mock(behave) as a:
        with pytest.raises(UserError, match=f"failed 3 times.*{words}.*29 records are kept"):
            client(monkeypatch, folder, [a], "--retries", "2", "--concurrency", "8")
        assert sum(body["seed"] == bad[0] for body in a.bodies) == 3
        assert len(records(folder / "out.jsonl.partial")) == 29


@pytest.mark.parametrize("what", [429, 500, "garbage", "cut"])
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_sick_server_does_not_keep_prompts_from_a_healthy_one(folder, monkeypatch, what, pause):
    with (
        Mock(lambda count, body: what) as sick,
        Mock(lambda count, body: what) as ill,
        Mock(pause=pause) as well,
    ):
        client(
            monkeypatch,
            folder,
            [sick, ill, well],
            "--concurrency",
            "4",
            "--retries",
            "2",
            "--give_up_after",
            "2",
        )
        assert len(well.bodies) == 30
        assert len(sick.bodies) <= 4 + 5  # what it had at once, then one at a time with growing pauses
    check_whole(folder, 30)


def test_a_server_that_answers_again_is_used_again(folder, monkeypatch):
    with Mock(lambda count, body: 500 if count <= 4 else None) as ill, Mock(pause=0.4) as slow:
        client(monkeypatch, folder, [ill, slow], "--concurrency", "2")
        assert len(ill.bodies) - 4 > 5
    check_whole(folder, 30)


def test_a_prompt_that_every_server_refuses_ends_the_run_and_no_server(folder, monkeypatch):
    bad = []

    def behave(count, body):
        bad[:] = bad or [body["seed"]]
        return 500 if body["seed"] == bad[0] else None

    with Mock(behave, pause=0.1) as a, Mock(behave, pause=0.1) as b:
        with pytest.raises(
            UserError, match="prompt [0-9a-f]{16} failed 5 times.*HTTP 500.*29 records are kept"
        ):
            client(monkeypatch, folder, [a, b], "--retries", "4", "--concurrency", "1")
        asked = [sum(body["seed"] == bad[0] for body in mock.bodies) for mock in (a, b)]
        assert sum(asked) == 5 and min(asked) >= 1
        assert len(a.bodies) + len(b.bodies) == 29 + 5 and min(len(a.bodies), len(b.bodies)) > 5


def test_all_dead_is_said_in_time_and_continued_later(folder, monkeypatch):
    a = Mock(lambda count, body: a.loop.call_soon(a.stopped.set) and "cut" if count >= 6 else None)
    with a:
        begin = time.monotonic()
        with pytest.raises(UserError, match="no server has answered for 2s.*5 records are kept"):
            client(monkeypatch, folder, [a], "--give_up_after", "2", "--concurrency", "1")
        assert 2 <= time.monotonic() - begin < 25
    with Mock(port=a.port) as b:
        client(monkeypatch, folder, [b], "--concurrency", "1")
        assert len(b.bodies) == 25
        check_whole(folder, 30)


def test_a_server_that_answers_only_errors_is_given_up(folder, monkeypatch):
    with Mock(lambda count, body: 429) as a:
        with pytest.raises(UserError, match="no server has answered for 1s.*HTTP 429"):
            client(monkeypatch, folder, [a], "--give_up_after", "1", "--retries", "1000")
        assert len(a.bodies) < 2000  # with pauses, not in a tight loop


def test_a_server_is_not_given_up_while_it_may_still_answer(folder, monkeypatch):
    micro.write_prompts(folder / "p.jsonl", 4)
    with Mock(lambda count, body: 429 if a.in_flight else None, pause=2) as a:
        client(monkeypatch, folder, [a], "--concurrency", "4", "--give_up_after", "1")
        assert len(a.bodies) > 4
    check_whole(folder, 4)


def test_a_server_that_is_back_has_time_to_answer(folder, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "pause", lambda failures: 0.3)
    a = Mock(lambda count, body: a.loop.call_soon(a.stopped.set) and "cut" if count >= 3 else None)
    with a:
        again = Mock(lambda count, body: 429 if count <= 6 else None, port=a.port)
        reviver = threading.Thread(target=lambda: (a.thread.join(), time.sleep(2), again.__enter__()))
        reviver.start()
        client(monkeypatch, folder, [a], "--concurrency", "1", "--give_up_after", "3")
        reviver.join()
        again.__exit__()
    check_whole(folder, 30)
    assert "is back" in capsys.readouterr().out


def test_a_server_that_answers_only_probes_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(dispatch, "pause", lambda failures: 0.3)
    with (
        Mock(lambda count, body: "cut") as a,
        pytest.raises(UserError, match="no server has answered for 2s"),
    ):
        client(monkeypatch, folder, [a], "--give_up_after", "2", "--retries", "1000")


@pytest.mark.parametrize(
    "status, asked, seconds",
    [
        (429, "3", 3),
        (503, "3", 3),
        (503, "1000", 4),
        (429, "9" * 5000, 4),
        (429, "Wed, 21 Oct 2037 07:28:00 GMT", 0),
    ],
)
def test_a_server_that_asks_for_patience_has_it(folder, monkeypatch, status, asked, seconds):
    micro.write_prompts(folder / "p.jsonl", 2)
    times = []
    with Mock(
        lambda count, body: times.append(time.monotonic()) or ((status, asked) if count == 1 else None)
    ) as a:
        client(monkeypatch, folder, [a], "--concurrency", "1", "--give_up_after", "4", "--retries", "0")
    assert seconds <= times[1] - times[0] < seconds + 2.5
    check_whole(folder, 2)


def test_a_dead_server_s_work_goes_on_and_it_is_used_again(folder, monkeypatch, capsys):
    a, b = (
        Mock(pause=0.1),
        Mock(lambda count, body: b.loop.call_soon(b.stopped.set) and "cut" if count >= 3 else None),
    )
    with a, b:
        again = Mock(port=b.port)

        def revive():
            b.thread.join()
            time.sleep(0.5)
            again.__enter__()

        reviver = threading.Thread(target=revive)
        reviver.start()
        client(monkeypatch, folder, [a, b], "--concurrency", "1")
        reviver.join()
        again.__exit__()
    check_whole(folder, 30)
    out = capsys.readouterr().out
    assert f"lost http://127.0.0.1:{b.port}" in out and "is back" in out and len(again.bodies) > 0


def test_a_server_that_returns_with_another_model_is_not_used(folder, monkeypatch):
    a, b = (
        Mock(pause=0.1),
        Mock(lambda count, body: b.loop.call_soon(b.stopped.set) and "cut" if count >= 2 else None),
    )
    with a, b:
        other = Mock(port=b.port, model="other")
        threading.Thread(target=lambda: (b.thread.join(), other.__enter__())).start()
        client(monkeypatch, folder, [a, b], "--concurrency", "1")
        other.__exit__()
    check_whole(folder, 30)
    assert other.bodies == []


def test_servers_must_agree_and_answer(folder, monkeypatch):
    with Mock() as a, Mock(model="other") as b, Mock(length=256) as c:
        for mocks, words in (
            ([a, b], "mock.*other"),
            ([a, c], "512.*256"),
            ([a, free_ports(1)], "does not answer"),
            ([a, a], "once"),
        ):
            begin = time.monotonic()
            with pytest.raises(UserError, match=words):
                client(monkeypatch, folder, mocks)
            assert time.monotonic() - begin < 20
        assert a.bodies == [] and not (folder / "out.jsonl").exists()


def test_another_model_s_tokenizer_is_refused(folder, monkeypatch, capsys):
    with Mock(tokens=[1, 2, 3]) as a:
        with pytest.raises(UserError, match="is not that of the served model mock"):
            client(monkeypatch, folder, [a])
        assert a.bodies == []
    with Mock() as a:
        client(monkeypatch, folder, [a])
        assert "is not checked" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_done(folder, monkeypatch):
    with Mock(pause=0.3) as a:
        command = [
            "--tokenizer",
            policy(),
            "--dataset_name_or_path",
            folder / "p.jsonl",
            "--output_dir",
            folder / "out.jsonl",
            "--K",
            "3",
        ]
        command = [
            sys.executable,
            ROOT / "generation" / "gen_hf.py",
            *command,
            "--ports",
            str(a.port),
            "--concurrency",
            "2",
        ]
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: len(a.bodies) > 5)
        process.send_signal(signal.SIGINT)
        assert (
            process.communicate(timeout=30)[1] == "stopped; start the same command again to continue\n"
            and process.returncode == 130
        )
        done = len(records(folder / "out.jsonl.partial"))
        assert done >= 3
        a.pause, asked = 0.0, len(a.bodies)
        client(monkeypatch, folder, [a], "--concurrency", "2")
        assert len(a.bodies) - asked == 30 - done
    check_whole(folder, 30)
