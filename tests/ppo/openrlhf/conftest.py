"""What the tests of ppo/openrlhf share: OpenRLHF's wheel, and micro models."""

import json
import os
import shutil
import sys
from pathlib import Path

import faults
import micro
import openrlhf_stub
import pytest

from common import locks
from common.models import load_tokenizer

CPU = Path(__file__).with_name("cpu")
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


@pytest.fixture(scope="session")
def environment():
    """A virtual environment with OpenRLHF and the stand-in, beside the project's own."""
    folder = Path(os.environ.get("envs_dir", openrlhf_stub.ROOT / ".envs"), "openrlhf-cpu")
    wanted, stamp = (CPU / "requirements.txt").read_text(), folder / "stamp"
    with locks.hold(folder.with_suffix(".lock"), f"making {folder}", wait=True):
        if not stamp.is_file() or stamp.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            install(folder)
        [packages] = folder.glob("lib/python*/site-packages")
        shutil.copytree(CPU, packages, dirs_exist_ok=True)
        (packages / "stand_in_for_cuda.pth").write_text("import stand_in_for_cuda\n")
        for name, version in (("flash_attn", "2.8.3"), ("vllm", "0.29.0+cpu")):  # what is looked for
            info = packages / f"{name}-{version}.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        stamp.write_text(wanted)
    return folder


def install(folder):
    def run(*words):
        end = faults.ended(words, timeout=3600)
        assert end.returncode == 0, end.stderr[-2000:]

    pip = (folder / "bin/python", "-m", "pip")
    run(sys.executable, "-m", "venv", folder)
    run(*pip, "install", "-q", "-r", CPU / "requirements.txt")
    run(*pip, "install", "-q", "--no-deps", "openrlhf==0.11.2")
    run(*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
