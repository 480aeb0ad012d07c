"""What the tests of training share."""

import functools

import faults
import micro
import online
import pytest
import training

from dpo_iteration.memory import Shape, shape_of


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a policy and rewarded answers."""
    folder = tmp_path_factory.mktemp("work")
    micro.make_policy(folder / "policy")
    training.write_rewarded(folder / "rewarded.jsonl")
    return folder


@pytest.fixture
def train(work):
    """Train in this process: `train(NAME, WORDS…)` from `work`/policy into `work`/NAME, which is returned."""
    return functools.partial(training.train, work)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Shape:
    """The shape of Llama-3-8B."""
    return shape_of(training.save_config(tmp_path_factory.mktemp("llama"), **training.LLAMA_8B))


@pytest.fixture(scope="session")
def live_port(built, tmp_path_factory):
    """The port of a real server of the tiny policy that takes new weights."""
    port = faults.free_ports()
    stop = online.start_server(tmp_path_factory.mktemp("servers"), port)
    yield port
    assert stop().returncode == 0
