"""The rewards that OpenRLHF asks for are those of get_rewards.py, in its process and over HTTP."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import yaml
from openrlhf_stub import ROOT

from annotate_data import get_rewards
from common.cli import UserError
from ppo.openrlhf import serve_reward
from ppo.openrlhf.prompts import load_tokenizer
from ppo.openrlhf.reward import RewardArguments, Rewards, answer, check, reward_func


def asked(models, **more):
    return RewardArguments(policy=str(models["policy"]), max_length=4096, **more)


KINDS = {
    "same tokens": ["same"],
    "other tokens": ["chatml"],
    "armorm": ["armorm"],
    "weighted": ["chatml", "armorm"],
    "function": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bridge_gives_get_rewards_scores(kind, models, rollouts, tmp_path, monkeypatch):
    names = [str(models[name]) for name in KINDS[kind]]
    more = {"reward_name_or_path": names or None}
    if kind in ("weighted", "function"):
        more |= {"reward_function": models["function"], "reward_weights": [0.5, -2.0, 3.0] if names else None}
    records, texts = rollouts()
    found = Rewards(asked(models, **more)).load()(*texts)
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["x", "--dataset_name_or_path", tmp_path / "g.jsonl", "--output_dir", tmp_path / "r.jsonl"]
    for key, value in more.items():
        argv += [f"--{key}", *(value if isinstance(value, list) else [value])] if value else []
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    get_rewards.main()
    lines = (tmp_path / "r.jsonl").read_text().split("\n")[:-1]
    expected = [json.loads(line)["rewards"][0] for line in lines]
    assert found == pytest.approx(expected, abs=2e-5) and len(set(found)) == len(found)


def test_openrlhfs_own_executor_gets_our_rewards(models, rollouts, source, tmp_path, monkeypatch):
    """The wheel's SingleTurnAgentExecutor over ppo/openrlhf/reward.py, on responses that a stand-in for the
    engine samples.
    """
    tokenizer = load_tokenizer(str(models["policy"]))
    records, (queries, prompts, labels) = rollouts(4)
    (tmp_path / "reward.yaml").write_text(
        yaml.safe_dump({"policy": str(models["policy"]), "reward_function": models["function"]})
    )
    monkeypatch.setenv("RLHF_REWARD_CONFIG", str(tmp_path / "reward.yaml"))
    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace())  # for its HTTP path only
    monkeypatch.setitem(
        sys.modules, "openrlhf.utils.logging_utils", SimpleNamespace(init_logger=logging.getLogger)
    )
    agent = types.ModuleType("agent")
    exec((source / "openrlhf/utils/agent.py").read_text(), agent.__dict__)
    executor = agent.SingleTurnAgentExecutor([str(ROOT / "ppo/openrlhf/reward.py")])
    parameters = SimpleNamespace(max_tokens=60, logprobs=None)

    class Engine:
        async def generate(self, tokens, parameters, multi_modal_data=None):
            at = [len(tokenizer(text=p, add_special_tokens=False)["input_ids"]) for p in prompts]
            whole = [tokenizer(text=q, add_special_tokens=False)["input_ids"] for q in queries]
            [response] = [w[n:] for w, n in zip(whole, at) if w[:n] == tokens]
            output = SimpleNamespace(token_ids=response, finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    async def all_of_them():
        calls = (
            executor.execute(prompt, label, parameters, 400, tokenizer, Engine())
            for prompt, label in zip(prompts, labels)
        )
        return await asyncio.gather(*calls)

    found = asyncio.run(all_of_them())
    expected = [len(record["responses"][0]) / 10 for record in records]
    assert [out["reward"] for out in found] == [out["scores"] for out in found] == expected


def test_the_server_answers_as_openrlhf_asks(models, rollouts):
    """Single requests, many at once, one that cannot be scored among others, and nonsense."""
    records, texts = rollouts(12)
    rewards = Rewards(asked(models, reward_function=models["function"])).load()
    batcher = serve_reward.Batcher(rewards, 8)
    server = serve_reward.Server(("127.0.0.1", 0), serve_reward.handler(batcher))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/get_reward"

    def ask(value):
        body = json.dumps(value).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            return json.load(urllib.request.urlopen(request, timeout=30))
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    found = {}
    requests = [{"query": [q], "prompts": [p], "labels": [label]} for q, p, label in zip(*texts)]
    requests[5]["query"] = ["of another prompt"]
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, ask(requests[i]))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, record in enumerate(records):
        if i == 5:
            assert found[i][0] == 500 and "does not begin with its prompt" in found[i][1]
        else:
            assert found[i] == answer([len(record["responses"][0]) / 10])
    assert ask({"query": ["a"]})[0] == 400 and batcher.scored == 11
    two = ask({"query": texts[0][:2], "prompts": texts[1][:2], "labels": texts[2][:2]})
    assert two["rewards"] == two["scores"] == [len(record["responses"][0]) / 10 for record in records[:2]]
    server.shutdown()
    server.server_close()


def test_a_server_that_is_stopped_does_not_speak_of_continuing(models):
    """It is stopped at the end of every successful training."""
    given = ["--policy", models["policy"], "--reward_function", models["function"], "--port", "0"]
    command = [sys.executable, ROOT / "ppo/openrlhf/serve_reward.py", *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(list(map(str, command)), **pipes) as server:
        first = server.stdout.readline()
        server.send_signal(signal.SIGINT)
        rest = server.stdout.read()
    assert first.startswith("serving ") and rest == "the reward server was stopped\n", first + rest
    assert server.returncode == 130


def test_what_cannot_be_a_reward_is_refused(models, rollouts, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="compares responses"):
        Rewards(asked(models, reward_name_or_path=[str(models["pairs"])])).load()
    with pytest.raises(UserError, match="no reward"):
        check(asked(models))
    monkeypatch.setattr("ppo.openrlhf.reward.CPU_PARAMETERS", 1000)
    with pytest.raises(UserError, match="this process has no GPU: start ppo/openrlhf/serve_reward.py"):
        Rewards(asked(models, reward_name_or_path=[str(models["same"])])).load()
    (tmp_path / "nan.py").write_text("def f(messages, response):\n    return float('nan')\n")
    rewards = Rewards(asked(models, reward_function=f"{tmp_path / 'nan.py'}:f")).load()
    with pytest.raises(UserError, match="no finite reward for p0, p1"):
        rewards(*rollouts(2)[1])
    monkeypatch.setenv("RLHF_REWARD_CONFIG", str(tmp_path / "reward.yaml"))
    (tmp_path / "reward.yaml").write_text(
        yaml.safe_dump({"policy": str(models["policy"]), "reward_name_or_path": [str(models["same"])]})
    )
    with pytest.raises(UserError, match="loaded in every sampling process"):
        reward_func(*rollouts(1)[1])
