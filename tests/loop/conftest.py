"""What several files need: the tiny models, and a small finished run to compare with."""

import faults
import pytest


@pytest.fixture(scope="session", autouse=True)
def built(tmp_path_factory):
    """Tiny models and prompts, built from nothing by the loop's own setup command where they are not there yet."""
    end = faults.loop(tmp_path_factory.mktemp("built") / "run", "--check")
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]


@pytest.fixture(scope="session")
def undisturbed(built, tmp_path_factory):
    """(folder of a finished run of one iteration with the engine, its settings)."""
    folder = tmp_path_factory.mktemp("small")
    settings = faults.small_settings(folder)
    end = faults.loop(folder / "run", *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    return folder / "run", settings
