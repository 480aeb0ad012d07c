"""What several files of training share as a fixture."""

import sys

import pytest


@pytest.fixture
def here(monkeypatch):
    """Start run_dpo.py in this process: for what needs no process of its own."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from dpo_iteration import run_dpo

    def go(arguments):
        monkeypatch.setattr(sys, "argv", ["run_dpo.py", *arguments])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(1)  # these models are too small for more
        run_dpo.main()

    return go
