"""TRL's fused LM head as a GPU folds it, by Triton's kernels: log-probabilities, what is logged beside them,
and gradients, of padded and of packed rows.
"""

import importlib.util
import os
import sys
from pathlib import Path

import faults
import pytest
import torch
import training
from training import ROOT

SCRIPT = Path(__file__).with_name("triton_head.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What triton_head.py saves: {case: {how: sums, gradients, values a token}}.

    torch's CPU build comes without Triton, vLLM's with it: the package is taken from that environment.
    """
    folder = tmp_path_factory.mktemp("triton")
    if importlib.util.find_spec("triton") is None:
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = Path(faults.vllm_python()).parents[1] / "lib" / python / "site-packages"
        there = list(packages.glob("triton*"))
        if not there:
            pytest.skip("no Triton is in the environments rlhflow and vllm")
        for path in there:
            (folder / path.name).symlink_to(path)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    training.start(folder / "found.pt", script=SCRIPT, PYTHONPATH=path, TRITON_INTERPRET="1")
    return torch.load(folder / "found.pt")


def furthest(found, expected):
    """(largest difference of a value, largest of a gradient as a share of it)."""
    pairs = [(found["sums"], expected["sums"])]
    if found["tokens"]["log_probs"].shape == expected["tokens"]["log_probs"].shape:  # packed ones share some
        pairs += [(found["tokens"][name], tokens) for name, tokens in expected["tokens"].items()]
    values = [(one.double() - other.double()).abs().max().item() for one, other in pairs]
    mine, theirs = found["gradients"], expected["gradients"]
    return max(values), max(((mine[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", ["llama", "capped logits", "temperature"])
def test_kernels_give_what_the_formula_gives(found, case, layout):
    """Against float64. Some labels are the model's favourites, and most are not."""
    value, gradient = furthest(found[case][f"triton, {layout}"], found[case]["formula"])
    assert value < 1e-4 and gradient < 1e-5
    top = found[case][f"triton, {layout}"]["tokens"]["is_top1"]
    assert 3 <= top.sum() < len(top) / 2


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_kernels_give_what_torch_gives_in_bf16(found, layout):
    """The tests without a GPU have torch's folding, whose logits are rounded alike."""
    value, gradient = furthest(found["bf16"][f"triton, {layout}"], found["bf16"][f"torch, {layout}"])
    assert value < 1e-4 and gradient < 0.03


def test_it_was_the_kernels(found):
    """Sums of another order differ in their last digits."""
    for case in found.values():
        for layout in ("padded", "packed"):
            one, other = (case[f"{name}, {layout}"]["gradients"] for name in ("torch", "triton"))
            assert any((one[key] != other[key]).any() for key in one)
