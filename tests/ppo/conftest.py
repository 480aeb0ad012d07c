"""What the tests of the small PPO share."""

import json
import sys

import micro
import pytest
import training

FUNCTION = "def letters(messages, response):\n    return response.count('a') - 0.2 * len(response)\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with models, prompts and a reward function.

    Micro models are random, so a response seldom ends by itself.
    """
    folder = tmp_path_factory.mktemp("ppo")
    policy = micro.make_policy(folder / "policy", tie_word_embeddings=True)
    (policy / "preprocessor_config.json").write_text("{}")
    micro.make_reward_model(folder / "rm")
    micro.make_reward_model(folder / "rm_chatml", family="chatml")
    micro.write_prompts(folder / "prompts.jsonl", 12)
    (folder / "reward.py").write_text(FUNCTION)
    (folder / "one.jsonl").write_text(json.dumps({"prompt": "Q"}) + "\n")
    (folder / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture
def here(monkeypatch):
    """Start train_ppo.py in this process."""
    from ppo import train_ppo

    def go(words):
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", *words])
        training.reset()
        train_ppo.main()

    return go
