"""Prints the bytes of DeepSpeed's buckets of gradients, as it makes them for a model of 72 weights under
`accelerate launch` with one of our configurations, and if it reduced them beside the backward pass; a script.
"""

import torch
from accelerate import Accelerator

from dpo_iteration.models import prepare_cpu


def total(optimizer):
    made = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    made = [one for buffers in made for one in (buffers if isinstance(buffers, list) else [buffers])]
    return sum(buffer.nbytes for buffer in made)


if __name__ == "__main__":
    prepare_cpu(threads=1)
    accelerator = Accelerator(mixed_precision="bf16")
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False}
    model = torch.nn.Linear(8, 8)
    engine, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    found, optimizer = [], engine.optimizer
    if engine.zero_optimization_stage() == 3:
        found = [total(optimizer)]
    else:  # made at the first gradient of a pass, and freed after it
        for overlap in (optimizer.overlap_comm, True):
            optimizer.overlap_comm = overlap
            optimizer.setup_buckets()
            found.append(total(optimizer))
            optimizer._release_ipg_buffers()
    print("buckets:", *found)
