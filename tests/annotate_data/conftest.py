"""What several files of annotation need: no GPU, and micro reward models."""

import micro
import pytest


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    from rewarding import CPU

    for key, value in CPU.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reward model of each kind: {name: folder}."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "bt": micro.make_reward_model(folder / "bt"),
        "armorm": micro.make_armorm(folder / "armorm"),
        "pair-preference-model-x": micro.make_pair_preference(folder / "pair-preference-model-x"),
    }
