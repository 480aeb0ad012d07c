"""Where the roles go on GPUs of given sizes, and what is refused with what would do."""

import pytest
from openrlhf_stub import SMALL, arguments, placed

from common.cli import UserError
from ppo.openrlhf.command import check_batches


@pytest.mark.parametrize(
    "gpus, gib, more, expected",
    [
        (1, 80, {}, ("1 GPU of 80 GiB", "193 GB in all", "take 4 GPUs of 80 GiB", "LoRA is out")),
        (1, 141, {}, ("1 GPU of 141 GiB", "take 2 GPUs", "offload true")),
        (2, 80, {}, ("take 4 GPUs of 80 GiB", "offload true")),
        (8, 80, {"max_tokens_per_gpu": 100}, ("below the 2048 tokens",)),
        (6, 80, {}, ("does not divide by 6 GPUs", "batch_size 126")),
        (12, 80, {}, ("no multiple of gpus_per_node 8",)),
        (8, 80, {"num_engines": 4}, ("must be the 8 GPUs that sample", "take 8")),
        (8, 80, {"tensor_parallel_size": 3}, ("does not divide the 8 GPUs",)),
        (2, 80, {"colocate": False}, ("needs one node with 4 or 8 GPUs",)),
        (8, 80, {"packing": True, "attn_implementation": "sdpa"}, ("needs flash attention",)),
        (8, 80, {"batch_size": 96}, ("no multiple of batch_size 96",)),
        (
            8,
            80,
            {"rollout_batch_size": 8, "batch_size": 8},
            ("8 responses a rollout do not divide by 8 GPUs × micro_batch_size 2",),
        ),
    ],
)
def test_what_does_not_fit_or_divide_is_refused_with_what_would(gpus, gib, more, expected):
    with pytest.raises(UserError) as caught:
        placed(arguments(**more), gpus, gib)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_offered_fits_then():
    placed(arguments(), 4), placed(arguments(), 2, 141), placed(arguments(offload=True), 1, 141)


def test_a_model_beyond_one_gpu_gets_engines_of_several():
    found, _ = placed(arguments(), 16, 80, billions=32)
    assert (found.tensor_parallel, found.engines, found.zero_stage) == (2, 8, 3)


def test_without_flash_attention_nothing_is_packed():
    found, _ = placed(arguments(**SMALL), 8, billions=0.5, flash=False)
    assert (found.attn_implementation, found.packing, found.max_tokens_per_gpu) == ("sdpa", False, None)
    check_batches(arguments(**SMALL), found)


def test_a_machine_whose_memory_cannot_take_what_is_moved_out_is_refused():
    found, notes = placed(arguments(), 8, machine=200)
    assert found.gpus == 8 and "of the machines' memory" in notes[0]
    with pytest.raises(UserError, match="1 machine of 100 GiB cannot take them; take colocate false"):
        placed(arguments(), 8, machine=100)
    placed(arguments(), 16, machine=100)  # two of them can
