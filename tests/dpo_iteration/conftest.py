"""What the tests of training share."""

import functools

import micro
import pytest
import training


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
