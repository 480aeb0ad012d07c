"""Operations of a training: against torch's own count of those that are made."""

from types import SimpleNamespace

import micro
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_iteration import speed
from dpo_iteration.memory import shape_of

TOKENS = 24


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_that_torch_counts(tmp_path, tied, frozen):
    """Attention over other tokens aside, which is a matter of lengths."""
    folder = micro.make_policy(tmp_path / "policy", tie_word_embeddings=tied, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or "embed" in name)  # LoRA's few weights ask for gradients, too
    ids = torch.randint(3, 250, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    shape = shape_of(str(folder))
    assert shape.tied == tied
    attention = 3 * 2 * 2 * shape.layers * TOKENS**2 * shape.query  # scores and their use; twice backwards
    head = 2 * TOKENS * shape.head if frozen and tied else 0  # here it is the one weight that is not frozen
    expected = TOKENS * speed.flops_per_token(shape, frozen)
    made = counter.get_total_flops() - attention - head  # of matrices: without the weights of norms
    assert made == pytest.approx(expected, rel=5e-3)


def test_figures_of_a_gpu(monkeypatch, tmp_path):
    """STAND-IN for a GPU: torch's answers of one."""
    folder = micro.make_policy(tmp_path / "policy")
    args = SimpleNamespace(
        model_name_or_path=str(folder), revision=None, trust_remote_code=False, use_peft=False
    )
    device = SimpleNamespace(
        device="cpu", num_processes=4, gather=lambda value: torch.stack([value, value + 1])
    )
    trainer = SimpleNamespace(accelerator=device, tokens=10**9)
    assert speed.of_training(trainer, args, 10.0) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    unknown = SimpleNamespace(**vars(args) | {"model_name_or_path": str(tmp_path / "gone")})
    assert speed.of_training(trainer, unknown, 10.0) == {
        "gpu_memory_gib": 3
    }  # hours of training are not lost
    for name, peak in (("NVIDIA H100 80GB HBM3", 989), ("Tesla T4", None)):
        monkeypatch.setattr(speed, "gpu_name", lambda name=name: name)
        found = speed.of_training(trainer, args, 10.0)
        rate = 1e9 * speed.flops_per_token(shape_of(str(folder))) / 10 / 4 / 1e12
        assert found["gpu_memory_gib"] == 3 and found["tflops_per_gpu"] == pytest.approx(rate)
        assert found.get("mfu") == (pytest.approx(rate / peak) if peak else None)
