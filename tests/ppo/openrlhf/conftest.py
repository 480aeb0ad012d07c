"""What the tests of ppo/openrlhf share: OpenRLHF's wheel, and micro models."""

import json

import micro
import openrlhf_stub
import pytest

from common.models import load_tokenizer

FUNCTION = (
    "def length(messages, response, record):\n"
    "    assert messages[-1]['role'] == 'user' and record['number'] >= 0\n"
    "    return len(response) / 10\n"
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    """Ray's note of a cluster of the machine's own is none of a test's."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The published wheel, unzipped."""
    return openrlhf_stub.unzip(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def stub(source, tmp_path_factory):
    """A folder for PYTHONPATH with the real parser and the stub's training."""
    return openrlhf_stub.install(source, tmp_path_factory.mktemp("stub_openrlhf"))


@pytest.fixture(scope="session")
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


@pytest.fixture
def rollouts(models):
    """A function that gives (records as generation writes them, (queries, prompts, labels) as OpenRLHF's
    agent.py makes them of the same tokens).
    """
    tokenizer = load_tokenizer(str(models["policy"]))

    def encode(text):
        return tokenizer(text=text, add_special_tokens=False)["input_ids"]

    def make(count=6):
        endings = ["<|eot_id|>", "", "<|end_of_text|>"]
        records, texts = [], []
        for i, line in enumerate(models["prompts"].read_text().split("\n")[:count]):
            row = json.loads(line)
            record = {"id": f"p{i}", "prompt": row["context_messages"], "number": row["number"]}
            response = f" answer {i}, öffentlich\n" + "x" * i
            prompt = tokenizer.apply_chat_template(
                record["prompt"], tokenize=False, add_generation_prompt=True
            )
            query = tokenizer.decode(
                encode(prompt) + encode(response + endings[i % 3]), skip_special_tokens=False
            )
            records.append(record | {"responses": [response]})
            texts.append((query, prompt, json.dumps(record)))
        return records, [list(part) for part in zip(*texts)]

    return make
