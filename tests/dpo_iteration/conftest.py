"""What the tests of training share."""

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
