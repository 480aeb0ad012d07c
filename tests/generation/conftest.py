"""What several files of generation need."""

import pytest

from generation import get_hf2


@pytest.fixture
def starts(monkeypatch):
    """Lets get_hf2 use one engine for all tests; counts how often it asked for one."""
    from engine import shared_engine

    asked = []

    def start(args, limit, needed):
        asked.append(needed)
        return shared_engine()

    shared_engine()
    monkeypatch.setattr(get_hf2, "start_engine", start)
    return asked
