"""The rewards that OpenRLHF asks for are those of get_rewards.py, in the process and over HTTP."""

import asyncio
import http.client
import json
import logging
import sys
import threading
import types
import urllib.error
import urllib.request
from types import SimpleNamespace

import faults
import pytest

from annotate_data import get_rewards
from common.cli import UserError
from common.models import load_tokenizer
from ppo.openrlhf import serve_reward
from ppo.openrlhf.reward import RewardArguments, Rewards, check


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


@pytest.fixture
def url(models):
    """The address of a server of the function's rewards."""
    rewards = Rewards(asked(models, reward_function=models["function"])).load()
    server = serve_reward.Server(("127.0.0.1", 0), serve_reward.handler(serve_reward.Batcher(rewards, 8)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/get_reward"
    server.shutdown()
    server.server_close()


def ask(url, value):
    """(status, answer) to a request."""
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    try:
        return 200, json.load(urllib.request.urlopen(request, timeout=30))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Session:
    """A stand-in for aiohttp's, which is not in this environment: the same requests by urllib."""

    def __init__(self, **_):
        self.status = self.answer = None

    def post(self, url, json):
        self.url, self.value = url, json
        return self

    async def __aenter__(self):
        if hasattr(self, "url"):
            self.status, self.answer = await asyncio.to_thread(ask, self.url, self.value)
        return self

    async def __aexit__(self, *_):
        pass

    def raise_for_status(self):
        assert self.status == 200

    async def json(self):
        return self.answer


def test_openrlhfs_own_executor_gets_our_rewards(models, rollouts, source, url, monkeypatch):
    """The wheel's SingleTurnAgentExecutor asks our server, on responses that a stand-in for the engine
    samples.
    """
    tokenizer = load_tokenizer(str(models["policy"]))
    records, (queries, prompts, labels) = rollouts(12)
    monkeypatch.setitem(
        sys.modules,
        "aiohttp",
        SimpleNamespace(ClientSession=Session, ClientTimeout=lambda total: None, ClientError=OSError),
    )
    logs = SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", logs)
    agent = types.ModuleType("agent")
    exec((source / "openrlhf/utils/agent.py").read_text(), agent.__dict__)
    executor = agent.SingleTurnAgentExecutor([url])
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


def test_several_in_one_request_and_what_cannot_be_scored(rollouts, url):
    records, (queries, prompts, labels) = rollouts(2)
    found = ask(url, {"query": queries, "prompts": prompts, "labels": labels})
    rewards = [len(record["responses"][0]) / 10 for record in records]
    assert found == (200, {"rewards": rewards, "scores": rewards, "extra_logs": {}})
    status, told = ask(url, {"query": ["of another prompt"], "prompts": prompts[:1], "labels": labels[:1]})
    assert status == 500 and "does not begin with its prompt" in told["error"]
    assert ask(url, {"query": ["a"]}) == (500, {"error": "KeyError: 'prompts'"})


def test_a_request_whose_client_has_gone_is_not_scored():
    """OpenRLHF hangs up after 180 s and asks again."""
    scored, begun, go_on = [], threading.Event(), threading.Event()

    def rewards(queries, prompts, labels):
        begun.set()
        go_on.wait(30)
        scored.extend(queries)
        return [1.0] * len(queries)

    def request(name):
        connection = http.client.HTTPConnection(*server.server_address)
        body = json.dumps({"query": [name], "prompts": [""], "labels": [""]})
        connection.request("POST", "/get_reward", body)
        return connection

    batcher = serve_reward.Batcher(rewards, 8)
    server = serve_reward.Server(("127.0.0.1", 0), serve_reward.handler(batcher))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    first = request("first")
    assert begun.wait(30)
    gone = request("gone")
    faults.wait_for(lambda: batcher.waiting.qsize() == 1)
    gone.close()
    last = request("last")
    faults.wait_for(lambda: batcher.waiting.qsize() == 2)
    go_on.set()
    assert [json.load(one.getresponse())["rewards"] for one in (first, last)] == [1.0, 1.0]
    assert scored == ["first", "last"]
    server.shutdown()
    server.server_close()


def test_what_cannot_be_a_reward_is_refused(models, rollouts, tmp_path):
    with pytest.raises(UserError, match="compares responses"):
        Rewards(asked(models, reward_name_or_path=[str(models["pairs"])])).load()
    with pytest.raises(UserError, match="no reward"):
        check(asked(models))
    (tmp_path / "nan.py").write_text("def f(messages, response):\n    return float('nan')\n")
    rewards = Rewards(asked(models, reward_function=f"{tmp_path / 'nan.py'}:f")).load()
    with pytest.raises(UserError, match="no finite reward for p0, p1"):
        rewards(*rollouts(2)[1])
