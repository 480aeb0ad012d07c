"""What several files need: a small finished run to compare with."""

import faults
import pytest


@pytest.fixture(scope="session")
def undisturbed(built, tmp_path_factory):
    """(folder of a finished run of one iteration with the engine, its settings)."""
    folder = tmp_path_factory.mktemp("small")
    settings = faults.small_settings(folder)
    end = faults.loop(folder / "run", *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    return folder / "run", settings
