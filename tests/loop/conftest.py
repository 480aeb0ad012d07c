"""What several files need: the tiny models, and a small finished run to compare with."""

import faults
import pytest
import yaml


@pytest.fixture(scope="session")
def built():
    """Tiny models and prompts, built from nothing by the loop's own setup command where they are not there
    yet.
    """
    command = yaml.safe_load((faults.ROOT / faults.CONFIG).read_text())["setup_command"]
    end = faults.ended(["bash", "-c", f"source ./envs.sh; use_env rlhflow; {command}"], timeout=None)
    assert end.returncode == 0, end.stderr


@pytest.fixture(scope="session")
def undisturbed(built, tmp_path_factory):
    """(folder of a finished run of one iteration with the engine, its settings)."""
    folder = tmp_path_factory.mktemp("small")
    settings = faults.small_settings(folder)
    end = faults.loop(folder / "run", *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    return folder / "run", settings
