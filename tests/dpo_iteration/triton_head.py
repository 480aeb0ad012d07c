"""STAND-IN for a GPU, a script: TRL's fused LM head by its Triton kernels, which Triton's interpreter runs on
the CPU (TRITON_INTERPRET=1), and what it should give, saved to the file that is named.
"""

import copy
import sys

import micro
import torch
from training import make_rows
from transformers import AutoModelForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import utils

from common.shared_prompts import only_wanted, prepare
from dpo_iteration.packing import PaddedCollator, collate_packed, score

CASES = {  # name → architecture, precision, temperature of the logits
    "llama": ("llama", torch.float32, 1.0),
    "capped logits": ("gemma2", torch.float32, 1.0),
    "temperature": ("llama", torch.float32, 0.7),
    "bf16": ("llama", torch.bfloat16, 1.0),
}
VOCABULARY, TILE, TOKENS = 1500, 1200, 16  # so small that there are several tiles, not all of them full
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # that the trainer asks for


def fold_by(name):
    """Let the head fold its tiles by Triton's kernels, whatever the device, or by torch alone."""
    for module in (chunked_logprob, utils):
        module._use_triton = lambda device: name == "triton"


def exact(logits, labels):
    """OUTPUTS and the mask of the labels, by their formulas."""
    logps, mask = logits.double().log_softmax(-1), labels != -100
    own = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    top = logits.argmax(-1) == labels
    return own, -(logps.exp() * logps).sum(-1), logits.double().mean(-1), top, mask


def graded(model, chosen, rejected):
    """Sums of the responses, and the gradients of a loss of them."""
    model.zero_grad()
    (chosen.sum() - 0.5 * rejected.sum()).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return {"sums": torch.cat([chosen, rejected]).detach().double(), "gradients": gradients}


def by_formula(model, batch, temperature):
    """What is right, in float64, by the model's own logits."""
    model, mask = copy.deepcopy(model).double(), batch["completion_mask"].bool()
    labels = batch["input_ids"].masked_fill(~mask, -100)[:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    *outputs, mask = exact(logits / temperature, labels)
    sums = torch.where(mask, outputs[0], 0).sum(1)
    tokens = {name: values[mask].detach() for name, values in zip(OUTPUTS, outputs, strict=True)}
    return graded(model, *sums.chunk(2)) | {"tokens": tokens}


def by_head(model, batch):
    found = score(model, batch)
    mask = found.outputs.label_mask
    tokens = {name: getattr(found.outputs, name)[mask].detach() for name in OUTPUTS}
    return graded(model, found.chosen, found.rejected) | {"tokens": tokens}


def with_best(model, row):
    """A pair whose rejected response ends in the model's favourite, which random ids never hit."""
    ids = torch.tensor([row["prompt_ids"] + row["rejected_ids"][:-1]])
    best = model(input_ids=ids).logits[0, -1].argmax()
    return row | {"scale": 1.0, "rejected_ids": [*row["rejected_ids"][:-1], int(best)]}


def case(architecture, dtype, temperature):
    """{how it was computed: sums, gradients, values a token}."""
    torch.manual_seed(0)
    config = micro.make_config(micro.make_tokenizer(), architecture, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").train()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
        rows = [with_best(model, row) for row in make_rows(3, longest=8)]
    padded = PaddedCollator(0)(rows)
    made = {"formula": by_formula(model, padded, temperature)}
    utils.add_fused_lm_head(model, temperature, outputs=OUTPUTS)
    for layout, batch in (("padded", padded), ("packed", collate_packed(rows))):
        if layout == "packed":
            prepare(model)
            only_wanted(model.base_model)
        for name in ("torch", "triton"):
            fold_by(name)
            made[f"{name}, {layout}"] = by_head(model, batch)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    utils._CHUNKED_LOGPROB_CHUNK_SIZE, chunked_logprob.TOKEN_CHUNK_SIZE = TILE, TOKENS
    torch.save({name: case(*given) for name, given in CASES.items()}, sys.argv[1])
