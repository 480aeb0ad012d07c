"""What several files of annotation need: no GPU, micro reward models, and the script in this process."""

import sys

import micro
import pytest


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    from rewarding import CPU

    for key, value in CPU.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Makes a reward model of an architecture once and gives its folder."""
    from rewarding import FAMILIES

    made = {}

    def make(architecture="llama"):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture] = micro.make_reward_model(folder, FAMILIES[architecture], architecture)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def models(model, tmp_path_factory):
    """A reward model of each kind: {name: folder}."""
    folder = tmp_path_factory.mktemp("kinds")
    pairs = micro.make_pair_preference(folder / "pair-preference-model-x")
    return {"bt": model(), "armorm": micro.make_armorm(folder / "armorm"), "pairs": pairs}


@pytest.fixture
def annotate(monkeypatch, tmp_path):
    """Runs get_rewards.py in this process, on gen.jsonl into out.jsonl; gives the records."""
    from rewarding import command, read

    from annotate_data import get_rewards

    def run(*models, source="gen.jsonl", target="out.jsonl", **settings):
        monkeypatch.setattr(sys, "argv", command(tmp_path / source, tmp_path / target, *models, **settings))
        get_rewards.main()
        return read(tmp_path / target)

    return run


@pytest.fixture
def refused(annotate):
    """The text, of one line, by which `annotate` is refused."""
    from common import cli

    def run(*models, **settings):
        with pytest.raises(cli.UserError) as told:
            annotate(*models, **settings)
        message = str(told.value)
        del told  # its frames hold the lock on the output
        assert "\n" not in message
        return message

    return run
