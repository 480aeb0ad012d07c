"""The memory that training is said to take, against published numbers, DeepSpeed's estimators and what torch
really keeps.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from training import ROOT, save_config
from transformers import AutoConfig, AutoModelForCausalLM

from common.cli import UserError
from dpo_iteration import memory
from dpo_iteration.fitting import METHODS
from dpo_iteration.memory import FOUR_BITS, GIB, activations, need, states

COUNT = 8_030_261_248


def test_parameters_are_counted_from_the_config(llama):
    assert (llama.parameters, llama.layers, llama.query, llama.key_value) == (COUNT, 32, 4096, 1024)
    assert llama.lora(16) == 41_943_040  # what peft trains with all linear layers of Llama-3-8B
    like = memory.shape_like(8.03)
    assert (like.layers, like.hidden, like.intermediate, like.linear) == (32, 4096, 14336, llama.linear)


def test_the_papers_own_example():
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB."""
    found = [states(method, 7.5e9, 64)[0] / 1e9 for method in ("ddp", "zero1", "zero2", "zero3")]
    assert found == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


@pytest.mark.parametrize("gpus", [1, 8])
def test_deepspeeds_estimators_agree(llama, gpus):
    """DeepSpeed adds to the paper's states the fp32 gradients of the step, 4 bytes (2 more than bf16 ones in
    stage 3), and in stage 3 one gathered layer with its gradients, 4 bytes. We name these buffers, beside a
    bucket of gradients.
    """
    largest, bucket = max(llama.layer, llama.head), 2 * 5e8
    ours = states("zero2", COUNT, gpus)[0] + memory.buffers("zero2", llama, gpus)[0]
    _, theirs = estimate_zero2_model_states_mem_needs(COUNT, gpus, 1, False)
    assert ours - bucket == pytest.approx(theirs, abs=2)
    _, theirs, _ = estimate_zero3_model_states_mem_needs(COUNT, largest, gpus, 1, False)
    ours = states("zero3", COUNT, gpus)[0] + memory.buffers("zero3", llama, gpus)[0]
    assert ours - bucket == pytest.approx(theirs, abs=2)
    cpu, theirs, _ = estimate_zero3_model_states_mem_needs(COUNT, largest, gpus, additional_buffer_factor=1)
    found = need("zero3_offload", llama, gpus, 1, 2048)
    assert found.cpu == cpu and found.states + found.buffers - bucket == theirs


@pytest.mark.parametrize("method, beside", [("zero2", [2]), ("zero3", [])])
def test_a_bucket_of_gradients_is_as_large_for_a_small_model(method, beside):
    """By DeepSpeed itself, which is asked how many it makes, and how many in stage 2 with `overlap_comm`."""
    launcher = ["--config_file", ROOT / "configs" / f"{method}.yaml", "--num_processes", 1]
    script, path = Path(__file__).with_name("gradient_buckets.py"), f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    said = training.start(launcher=launcher, script=script, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="").stdout
    found = [int(word) for word in re.search("^buckets: (.*)$", said, re.M)[1].split()]
    nothing = memory.Shape(*[0] * 9)
    one, _ = memory.buffers(method, nothing, 1)
    assert found == [one, *(times * one for times in beside)] and one == 1e9


def test_adapters_and_four_bits(llama):
    """Frozen weights take their own bytes alone, in bf16 or 4 bits; adapters are in fp32."""
    few = llama.lora(16)
    assert states("zero2", COUNT, 8, few)[0] == 2 * (COUNT + few) + 14 * few / 8
    assert states("ddp", COUNT, 8, few)[0] == 2 * COUNT + 16 * few
    assert states("zero3", COUNT, 8, few)[0] == pytest.approx((2 * COUNT + 16 * few) / 8)
    assert states("ddp", COUNT, 1, few, frozen=0.6)[0] == pytest.approx(0.6 * COUNT + 16 * few)
    for method in METHODS:
        full, small = (need(method, llama, 8, 1, 2048, trainable=trainable) for trainable in (None, few))
        assert small.total < full.total
    qlora = need("ddp", llama, 1, 1, 2048, trainable=few, frozen=FOUR_BITS)
    assert qlora.total < 16 * GIB < need("ddp", llama, 1, 1, 2048, trainable=few).total


def test_checkpoints_are_counted_as_they_are_kept():
    """Two that are kept and the one being written, 16 bytes a parameter; test_sharding.py weighs a real
    one.
    """
    args = SimpleNamespace(save_steps=10, save_total_limit=2, bf16=True)
    assert memory.checkpoint_bytes(args, 8e9) == 3 * 16 * 8e9
    args.save_steps = 0
    assert memory.checkpoint_bytes(args, 8e9) == 0


def test_the_pass_of_the_reference_counts(llama):
    """LoRA under FSDP on one GPU trains in less than the frozen policy's first pass takes where that is held
    in fp32.
    """
    found = need("ddp", llama, 8, 1, 2048, bf16=False)
    assert found.reference == 4 * COUNT and need("zero2", llama, 8, 1, 2048).reference == 2 * COUNT
    assert found.total >= found.reference


def kept_by_torch(sizes, method, bf16, checkpointing):
    """Bytes a token that one more layer keeps for the backward pass, each storage once, weights left out."""
    mixed = bf16 and method == "ddp"

    def count(layers):
        config = AutoConfig.for_model("llama", vocab_size=64, num_hidden_layers=layers, **sizes)
        dtype = torch.bfloat16 if bf16 and not mixed else torch.float32
        whole = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model = whole.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # Autocast's copies of the weights too are left out.
        shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
        found = {}

        def pack(tensor):
            if tensor.shape not in shapes and tensor.numel() > 128:
                found[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = model(input_ids=torch.randint(0, 64, (2, 128)), use_cache=False).last_hidden_state
        assert out.requires_grad
        return sum(size for size, _ in found.values()) / 256

    return count(3) - count(2)


@pytest.mark.parametrize("wide", [{}, {"intermediate_size": 320, "num_key_value_heads": 4}])
@pytest.mark.parametrize(
    ("method", "bf16"), [("zero2", True), ("fsdp2", True), ("ddp", True), ("ddp", False)]
)
def test_activations_are_what_torch_keeps(tmp_path, wide, method, bf16):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= wide
    shape = memory.shape_of(save_config(tmp_path, vocab_size=64, num_hidden_layers=2, **sizes))
    kept = memory.layer_activations(shape, method, bf16)
    assert kept == pytest.approx(kept_by_torch(sizes, method, bf16, False), rel=0.01)
    checkpoint = kept_by_torch(sizes, method, bf16, True)
    stream = 2 if bf16 and method != "ddp" else 4
    assert checkpoint == pytest.approx(stream * shape.hidden, rel=0.01)


def test_activations_grow_as_they_should(llama):
    one, two = (activations(llama, pairs, 2048, "zero2", False) for pairs in (1, 2))
    fixed = 2 * one - two  # the gradient of the head's weight and the tile of logits
    assert fixed == pytest.approx(6 * llama.head + 2 * 4096 * 32768)
    assert activations(llama, 1, 2048, "zero2", True) < one / 5
    # By far less than the logits in fp32 of both sequences twice, which a head that is not fused would keep.
    assert activations(llama, 8, 2048) < activations(llama, 8, 2048, checkpointing=False) / 8


def test_a_config_is_known_by_its_method(tmp_path):
    assert [memory.method_of(ROOT / "configs" / f"{name}.yaml") for name in METHODS] == list(METHODS)
    path = tmp_path / "a.yaml"
    path.write_text("deepspeed_config: {zero_stage: 1}\n")
    assert memory.method_of(path) == "zero1"
    path.write_text("deepspeed_config: {zero_stage: 4}\n")
    with pytest.raises(UserError, match="0, 1, 2 or 3"):
        memory.method_of(path)
