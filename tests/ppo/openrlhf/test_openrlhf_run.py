"""run_openrlhf.py from start to end with a STUB for OpenRLHF's training (tests/openrlhf_stub.py), and the
rewards it asks for.
"""

import asyncio
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import micro
import openrlhf_stub
import pytest
import yaml

from annotate_data import get_rewards
from common import cli
from common.cli import UserError
from common.devices import visible_gpus
from ppo.openrlhf import arguments as openrlhf_arguments
from ppo.openrlhf import process, run_openrlhf, serve_reward
from ppo.openrlhf.preflight import differs, has_value_head
from ppo.openrlhf.prompts import load_tokenizer, prepare_policy, whole_rollouts
from ppo.openrlhf.reward import RewardArguments, Rewards, answer, check

ROOT = Path(__file__).resolve().parents[3]
FUNCTION = (
    "def length(messages, response, record):\n    assert messages[-1]['role'] == 'user' and "
    "record['number'] >= 0\n    return len(response) / 10\n"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {
        "policy": micro.make_policy(folder / "policy"),
        "same": micro.make_reward_model(folder / "same"),
        "chatml": micro.make_reward_model(folder / "chatml", "chatml"),
        "armorm": micro.make_armorm(folder / "armorm"),
        "pairs": micro.make_pair_preference(folder / "pair-preference-model-x"),
        "prompts": folder / "prompts.jsonl",
    }
    micro.write_prompts(made["prompts"], 26)
    (made["policy"] / "preprocessor_config.json").write_text("{}")
    (folder / "mine.py").write_text(FUNCTION)
    return made | {"function": f"{folder / 'mine.py'}:length"}


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    source = openrlhf_stub.unzip(tmp_path_factory.mktemp("wheel"))
    return openrlhf_stub.install(source, tmp_path_factory.mktemp("stub_openrlhf"))


def rollouts(models, count=6):
    """(records as generation writes them, (queries, prompts, labels) as OpenRLHF's agent.py makes them of the
    same tokens).
    """
    tokenizer = load_tokenizer(str(models["policy"]))
    endings = ["<|eot_id|>", "", "<|end_of_text|>"]
    records, texts = [], []
    for i, line in enumerate(models["prompts"].read_text().split("\n")[:count]):
        row = json.loads(line)
        record = {"id": f"p{i}", "prompt": row["context_messages"], "number": row["number"]}
        response = f" answer {i}, öffentlich\n" + "x" * i
        prompt = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        tokens = (
            tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
            + tokenizer(response + endings[i % 3], add_special_tokens=False)["input_ids"]
        )
        records.append(record | {"responses": [response]})
        texts.append((tokenizer.decode(tokens, skip_special_tokens=False), prompt, json.dumps(record)))
    return records, [list(part) for part in zip(*texts)]


def reward_arguments(models, **more):
    return RewardArguments(policy=str(models["policy"]), max_length=4096, **more)


@pytest.mark.parametrize("kind", ["same tokens", "other tokens", "armorm", "weighted", "function"])
def test_the_bridge_gives_get_rewards_scores(kind, models, tmp_path, monkeypatch):
    names = {
        "same tokens": ["same"],
        "other tokens": ["chatml"],
        "armorm": ["armorm"],
        "weighted": ["chatml", "armorm"],
        "function": [],
    }[kind]
    more = {"reward_name_or_path": [str(models[name]) for name in names] or None}
    if kind in ("weighted", "function"):
        more |= {"reward_function": models["function"], "reward_weights": [0.5, -2.0, 3.0] if names else None}
    records, texts = rollouts(models)
    found = Rewards(reward_arguments(models, **more)).load()(*texts)
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["x", "--dataset_name_or_path", tmp_path / "g.jsonl", "--output_dir", tmp_path / "r.jsonl"]
    for key, value in more.items():
        argv += [f"--{key}", *(value if isinstance(value, list) else [value])] if value else []
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    get_rewards.main()
    expected = [
        json.loads(line)["rewards"][0] for line in (tmp_path / "r.jsonl").read_text().split("\n")[:-1]
    ]
    assert found == pytest.approx(expected, abs=2e-5) and len(set(found)) == len(found)


def test_openrlhfs_own_executor_gets_our_rewards(models, tmp_path, monkeypatch):
    """The wheel's SingleTurnAgentExecutor over ppo/openrlhf/reward.py, on responses that a stand-in for the
    engine samples.
    """
    source = openrlhf_stub.unzip(tmp_path / "wheel")
    tokenizer = load_tokenizer(str(models["policy"]))
    records, (queries, prompts, labels) = rollouts(models, 4)
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
            return SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=response, finish_reason="stop", logprobs=None)]
            )

    async def all_of_them():
        return await asyncio.gather(
            *(
                executor.execute(p, label, parameters, 400, tokenizer, Engine())
                for p, label in zip(prompts, labels)
            )
        )

    found = asyncio.run(all_of_them())
    assert (
        [out["reward"] for out in found]
        == [out["scores"] for out in found]
        == [len(r["responses"][0]) / 10 for r in records]
    )


def test_the_server_answers_as_openrlhf_asks(models, monkeypatch):
    """Single requests, many at once, one that cannot be scored beside others, and nonsense."""
    records, texts = rollouts(models, 12)
    rewards = Rewards(reward_arguments(models, reward_function=models["function"])).load()
    batcher = serve_reward.Batcher(rewards, 8)
    server = serve_reward.Server(("127.0.0.1", 0), serve_reward.handler(batcher))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/get_reward"

    def ask(value):
        request = urllib.request.Request(
            url, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            return json.load(urllib.request.urlopen(request, timeout=30))
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    found = {}
    asked = [{"query": [q], "prompts": [p], "labels": [label]} for q, p, label in zip(*texts)]
    asked[5]["query"] = ["of another prompt"]
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, ask(asked[i]))) for i in range(12)]
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
    command = [
        sys.executable,
        ROOT / "ppo/openrlhf/serve_reward.py",
        "--policy",
        models["policy"],
        "--reward_function",
        models["function"],
        "--port",
        "0",
    ]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        first = server.stdout.readline()
        server.send_signal(signal.SIGINT)
        rest = server.stdout.read()
    assert (
        first.startswith("serving ")
        and rest == "the reward server was stopped\n"
        and server.returncode == 130
    ), first + rest


def test_what_cannot_be_a_reward_is_refused(models, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="compares responses"):
        Rewards(reward_arguments(models, reward_name_or_path=[str(models["pairs"])])).load()
    with pytest.raises(UserError, match="no reward"):
        check(reward_arguments(models))
    monkeypatch.setattr("ppo.openrlhf.reward.CPU_PARAMETERS", 1000)
    with pytest.raises(UserError, match="this process has no GPU: start ppo/openrlhf/serve_reward.py"):
        Rewards(reward_arguments(models, reward_name_or_path=[str(models["same"])])).load()
    (tmp_path / "nan.py").write_text("def f(messages, response):\n    return float('nan')\n")
    with pytest.raises(UserError, match="no finite reward for p0, p1"):
        Rewards(reward_arguments(models, reward_function=f"{tmp_path / 'nan.py'}:f")).load()(
            *rollouts(models, 2)[1]
        )
    monkeypatch.setenv("RLHF_REWARD_CONFIG", str(tmp_path / "reward.yaml"))
    (tmp_path / "reward.yaml").write_text(
        yaml.safe_dump({"policy": str(models["policy"]), "reward_name_or_path": [str(models["same"])]})
    )
    from ppo.openrlhf.reward import reward_func

    with pytest.raises(UserError, match="loaded in every sampling process"):
        reward_func(*rollouts(models, 1)[1])


def test_tokens_and_templates_are_compared(models, tmp_path):
    policy = load_tokenizer(str(models["policy"]))
    assert differs(policy, load_tokenizer(str(models["same"]))) is None
    assert "another id or none" in differs(policy, load_tokenizer(str(models["chatml"])))
    other = load_tokenizer(str(models["same"]))
    other.chat_template = other.chat_template.replace("\n\n", "\n")
    assert "write the same turns differently" in differs(policy, other)
    bare = load_tokenizer(str(models["same"]))
    bare.add_bos_token = False
    bare._tokenizer.post_processor = None
    assert differs(policy, bare) is None  # the template writes BOS, whoever else would
    mute = policy.chat_template.replace("{{ bos_token }}", "")
    written, policy.chat_template, bare.chat_template, other.chat_template = (
        policy.chat_template,
        mute,
        mute,
        mute,
    )
    assert differs(policy, bare) is None and "other special tokens in front" in differs(policy, other)
    policy.chat_template = written
    grown = load_tokenizer(str(models["same"]))
    grown.add_special_tokens({"pad_token": "[PAD]"})  # as FsfairX has
    assert differs(policy, grown) is None
    no_bos = micro.make_tokenizer(
        adds_bos=False
    )  # one file of tokenizer and template for both, as the tiny models have
    assert differs(no_bos, no_bos) is None and differs(policy, no_bos) is None
    silent, silent_policy = load_tokenizer(str(models["same"])), load_tokenizer(str(models["policy"]))
    silent.chat_template = silent_policy.chat_template = silent.chat_template.replace("{{ bos_token }}", "")
    assert "other special tokens in front" in differs(silent_policy, silent)
    chatml = load_tokenizer(str(models["chatml"]))
    assert "behind a turn" in differs(chatml, chatml)
    assert (
        has_value_head(models["same"], "score")
        and has_value_head(models["policy"], "score") is False
        and has_value_head("org/name", "score") is None
    )
    bare = tmp_path / "bare"
    policy.save_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template: put a chat_template.jinja"):
        load_tokenizer(str(bare))


def test_a_policy_whose_config_lacks_the_end_of_turn_stops_anyway(models, tmp_path):
    """RLHFlow/LLaMA3-SFT is such a one: vLLM under OpenRLHF knows no stop tokens but EOS and
    generation_config.json's.
    """
    tokenizer = load_tokenizer(str(models["policy"]))
    source = tmp_path / "source"
    source.mkdir()
    for file in models["policy"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id, "temperature": 0.6})
    )
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    tokenizer.chat_template = "{# mine #}" + tokenizer.chat_template
    prepare_policy(SimpleNamespace(model_name_or_path=str(source)), tokenizer, tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert (
        set(config["eos_token_id"]) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")}
        and config["temperature"] == 0.6
    )
    assert (tmp_path / "policy" / "model.safetensors").resolve() == (source / "model.safetensors").resolve()
    assert load_tokenizer(str(tmp_path / "policy")).chat_template.startswith("{# mine #}")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize(
    "maximum, episodes, expected",
    [(None, 1, (24, 2, 1)), (2, 3, (8, 18, 1)), (13, 3, (24, 2, 2)), (99, 3, (24, 2, 3))],
)
def test_only_whole_rollouts_are_written(maximum, episodes, expected):
    prompts = 26
    args = SimpleNamespace(
        seed=1, rollout_batch_size=4, num_episodes=episodes, max_rollouts=maximum, dataset_name_or_path=["p"]
    )
    chosen, left, passes = whole_rollouts(args, list(range(prompts)))
    assert (len(chosen), len(left), passes) == expected and sorted(chosen + left) == list(range(prompts))
    assert whole_rollouts(args, list(range(prompts)))[0] == chosen != sorted(chosen)
    with pytest.raises(UserError, match="3 prompts of p are fewer than rollout_batch_size 4"):
        whole_rollouts(args, [1, 2, 3])


def test_a_checkpoint_is_taken_that_policy_and_value_model_have(tmp_path):
    def save(role, *tags, latest=None):
        for tag in tags:
            (tmp_path / role / f"global_step{tag}").mkdir(parents=True, exist_ok=True)
        if latest:
            (tmp_path / role / "latest").write_text(f"global_step{latest}")

    assert process.checkpoint_to_resume(tmp_path) is None
    save("_actor", 4)
    assert process.checkpoint_to_resume(tmp_path) is None  # a folder and no whole checkpoint
    save("_actor", 4, 10, latest=10)
    assert process.checkpoint_to_resume(tmp_path) is None
    save("_critic", 4, 10, latest=4)  # its 10 is torn
    assert (
        process.checkpoint_to_resume(tmp_path) == "global_step4"
        and (tmp_path / "_actor" / "latest").read_text() == "global_step4"
    )
    save("_actor", latest=10)
    save("_critic", latest=10)
    assert process.checkpoint_to_resume(tmp_path) == "global_step10"


class Runs:
    """run_openrlhf.py on two fake GPUs with the stub as OpenRLHF: in this process, or as a command."""

    def __init__(self, models, stub, folder, patch, capture):
        self.models, self.folder, self.model, self.patch, self.capture = (
            models,
            folder,
            folder / "iter1" / "model",
            patch,
            capture,
        )
        smi = folder / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(
            '#!/bin/sh\nif [ "$1" = -L ]; then echo "GPU 0: fake"; echo "GPU 1: fake"; else echo 81920; echo '
            "81920; fi\n"
        )
        smi.chmod(0o755)
        for name in ("CUDA_VISIBLE_DEVICES", "WANDB_API_KEY", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(stub))
        patch.syspath_prepend(str(stub))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv(
            "ACCELERATE_USE_CPU", "true"
        )  # rewards are scored on the CPU, whatever the fake GPUs say
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
        patch.setenv(
            "http_proxy", "http://127.0.0.1:9"
        )  # nobody is there: what is asked on this machine does not go through it
        self.work = folder / "iter1" / "model.work"

    def command(self, **more):
        values = {
            "model_name_or_path": str(self.models["policy"]),
            "reward_name_or_path": str(self.models["same"]),
            "max_input_length": 200,
            "dataset_name_or_path": str(self.models["prompts"]),
            "output_dir": str(self.model),
            "rollout_batch_size": 4,
            "batch_size": 4,
            "micro_batch_size": 1,
            "max_new_tokens": 50,
            "save_steps": 2,
            "warmup_steps": 0,
        } | more
        (self.folder / "train.yaml").write_text(
            yaml.safe_dump({k: v for k, v in values.items() if v is not None})
        )
        return [sys.executable, str(ROOT / "ppo/openrlhf/run_openrlhf.py"), str(self.folder / "train.yaml")]

    def run(self, env=(), **more):
        """The script's `main` as its last line runs it; what it and its processes printed."""
        command, status = self.command(**more), 0
        self.capture.readouterr()
        visible_gpus.cache_clear()
        with self.patch.context() as patch:
            for key, value in dict(env).items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", command[1:])
            try:
                cli.run(run_openrlhf.main)
            except SystemExit as end:
                status = end.code
        visible_gpus.cache_clear()
        printed = self.capture.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)


@pytest.fixture
def runs(models, stub, tmp_path, monkeypatch, capfd):
    yield Runs(models, stub, tmp_path, monkeypatch, capfd)
    visible_gpus.cache_clear()


def check_output(runs, models):
    """A plain model folder that loads as the policy did, and a manifest that says complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads(Path(f"{runs.model}.manifest.json").read_text())
    assert manifest["complete"] and manifest["num_gpus"] == 2 and manifest["counts"]["rollouts"] >= 5
    assert (
        AutoTokenizer.from_pretrained(runs.model).chat_template
        == AutoTokenizer.from_pretrained(models["policy"]).chat_template
    )
    config = json.loads((runs.model / "config.json").read_text())
    assert (
        config.get("use_cache", True)
        and config["pad_token_id"]
        == json.loads((models["policy"] / "config.json").read_text())["pad_token_id"]
    )
    assert AutoModelForCausalLM.from_pretrained(runs.model).generation_config.eos_token_id
    assert (
        not any(file.is_symlink() for file in runs.model.iterdir())
        and (runs.model / "preprocessor_config.json").is_file()
    )
    assert (
        not (runs.work / "checkpoints").exists()
        and (runs.work / "prompts.jsonl").is_file()
        and (runs.work / "openrlhf.log").is_file()
    )
    return manifest


def test_failure_resume_stop_and_end(runs, models):
    failed = runs.run({"STUB_FAIL": "3"})
    told = "error: OpenRLHF ended with status 1: RuntimeError: STUB: CUDA out of memory; the log is"
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith(told)
    assert (
        not runs.model.exists() and "from 0 to" in failed.stdout and "--ckpt.load_enable" not in failed.stdout
    )
    with open(f"{runs.model}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training into" in runs.run().stderr
    other = runs.run(kl_coef=0.5)
    assert other.returncode == 2 and "kl_coef was 0.01 and is now 0.5" in other.stderr
    fewer = runs.run({"CUDA_VISIBLE_DEVICES": "0"})
    assert fewer.returncode == 2 and "half done on 2 GPUs and 1 are used now" in fewer.stderr
    torn = runs.run({"STUB_TORN": "_actor4"})
    assert (
        "continuing from global_step2" in torn.stdout and "from 2 to" in torn.stdout and torn.returncode == 2
    )

    process_ = subprocess.Popen(
        runs.command(), stdout=subprocess.PIPE, text=True, env=dict(os.environ) | {"STUB_HANG": "5"}
    )
    seen = ""
    for line in process_.stdout:
        seen += line
        if "STUB hangs" in line:
            break
    assert "continuing from global_step2" in seen  # policy had 4, the value model 2
    children = subprocess.run(
        ["pgrep", "-P", str(process_.pid)], capture_output=True, text=True
    ).stdout.split()
    process_.send_signal(signal.SIGINT)
    assert process_.wait(60) == 130 and children
    for child in children:
        assert not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    done = runs.run()
    assert done.returncode == 0, done.stderr
    assert (
        "continuing from global_step4" in done.stdout and "STUB reward None" in done.stdout
    )  # OpenRLHF's own reward model
    check_output(runs, models)
    begun = time.monotonic()
    again = runs.run()
    assert (
        again.returncode == 0
        and "is complete, nothing to do" in again.stdout
        and time.monotonic() - begun < 20
    )
    changed = runs.run(learning_rate=1e-3)
    assert changed.returncode == 2 and "complete with other settings: learning_rate" in changed.stderr


def test_a_reward_model_with_other_tokens_is_served_beside_it(runs, models):
    done = runs.run(reward_name_or_path=str(models["chatml"]), num_episodes=2, save_steps=0)
    assert done.returncode == 0, done.stderr
    assert (
        "our reward server takes one of the GPUs that train" in done.stderr
        and "another id or none" in done.stderr
    )
    log = (runs.work / "openrlhf.log").read_text()
    reward = float(log.split("STUB reward ")[1].split(",")[0])
    first = json.loads((runs.work / "prompts.jsonl").read_text().split("\n")[0])
    rewards = Rewards(reward_arguments(models, reward_name_or_path=[str(models["chatml"])])).load()
    assert reward == pytest.approx(
        rewards([first["prompt"] + "a STUB answer.<|eot_id|>"], [first["prompt"]], [first["label"]])[0],
        abs=2e-5,
    )
    assert "--critic.model_name_or_path " + shlex.quote(str(runs.work / "policy")) in done.stdout
    counts = check_output(runs, models)["counts"]
    assert counts["prompts"] == 24 - 24 % 4 or counts["prompts"] < 26
    assert counts["rollouts"] == counts["prompts"] // 4 * 2
    skipped = [
        json.loads(line) for line in (runs.work / "prompts.skipped.jsonl").read_text().split("\n")[:-1]
    ]
    assert len(skipped) + counts["prompts"] == 26 and sum(counts["skipped"].values()) == len(skipped)


def test_a_function_scores_in_openrlhfs_own_process(runs, models):
    done = runs.run(reward_name_or_path=None, reward_function=models["function"], save_steps=0)
    assert done.returncode == 0, done.stderr
    assert f"STUB reward {len('a STUB answer.') / 10}," in done.stdout
    check_output(runs, models)


def test_wrong_set_ups_are_one_line_and_leave_nothing(runs, models, tmp_path):
    stale = runs.work / "checkpoints" / "_actor"
    stale.mkdir(parents=True)
    found = {"stale": runs.run(), "dead url": None, "local": None}
    stale.rmdir()
    (tmp_path / "file").write_text("")
    found["output"] = runs.run(output_dir=str(tmp_path / "file" / "model"))
    found["dead url"] = runs.run(reward_name_or_path=None, reward_url="http://127.0.0.1:9/get_reward")
    found["local"] = runs.run(reward_name_or_path=str(models["chatml"]), reward_backend="local")
    found["few"] = runs.run(rollout_batch_size=400, batch_size=400)
    expected = {
        "stale": "_actor has no manifest",
        "dead url": "nobody answers",
        "local": "cannot be used so",
        "output": "cannot write",
        "few": "fewer than rollout_batch_size 400",
    }
    for name, done in found.items():
        errors = [line for line in done.stderr.splitlines() if not line.startswith("ppo: ")]
        assert done.returncode == 2 and len(errors) == 1 and expected[name] in errors[0], (name, done.stderr)


def test_what_shapes_the_model_is_told_from_what_does_not():
    args = openrlhf_arguments.arguments(
        {
            "model_name_or_path": "a/b",
            "reward_name_or_path": "c/d",
            "dataset_name_or_path": "p.jsonl",
            "output_dir": "o",
        }
    )
    settings, inputs = run_openrlhf.shaping(args)
    assert {"kl_coef", "batch_size", "seed", "max_new_tokens"} <= set(settings)
    assert not {"num_gpus", "report_to", "project", "output_dir", "micro_batch_size"} & set(settings)
    assert inputs["reward_name_or_path 1"] == "c/d" and inputs["dataset_name_or_path 1"] == "p.jsonl"
