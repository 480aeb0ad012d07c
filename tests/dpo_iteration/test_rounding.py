"""The check of packed rows against padded ones in bf16: it passes what is rounding, and no fault of the
layout, at any length.
"""

import micro
import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from common import shared_prompts
from common.cli import UserError
from common.shared_prompts import Packed, only_wanted, prepare
from dpo_iteration.packing import collate_packed
from dpo_iteration.rounding import check_packing

PROMPT, LONGEST = 30, 50


@pytest.fixture(scope="module", autouse=True)
def one_process():
    torch.set_num_threads(1)
    PartialState(cpu=True)


def make_model(layers, spread, seed=0):
    """A prepared model in bf16 whose attention is far from even and whose logits have the standard deviation
    `spread`.
    """
    torch.manual_seed(seed)
    config = micro.make_config(
        micro.make_tokenizer(),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.2 if "proj" in name else 1.0)
        model.lm_head.weight.normal_(std=spread / config.hidden_size**0.5)
    model = model.to(torch.bfloat16)
    add_fused_lm_head(model)
    return model


@torch.no_grad()
def sampled(model, pairs=3):
    """Pairs of responses that the model itself sampled, of LONGEST tokens each."""
    prompts = torch.randint(3, 250, (pairs, PROMPT), generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    torch.manual_seed(1)
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        min_new_tokens=LONGEST,
        max_new_tokens=LONGEST,
    )
    both = found[:, PROMPT:].view(2, pairs, -1).transpose(0, 1).tolist()
    return [
        {"prompt_ids": prompt, "chosen_ids": a, "rejected_ids": b, "scale": 1.0}
        for prompt, (a, b) in zip(prompts.tolist(), both, strict=False)
    ]


def cut(rows, length):
    return [row | {key: row[key][:length] for key in ("chosen_ids", "rejected_ids")} for row in rows]


def look(model, batch):
    prepare(model)
    hook = only_wanted(model.base_model)
    try:
        check_packing(model, model, batch, 0, True, "policy")
    finally:
        hook.remove()
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("layers, spread", [(2, 2.0), (8, 6.0)])
def test_rounding_passes_at_any_length(layers, spread, capsys):
    """The kernel of a GPU is not here, so attention's sums are rounded once more, as another order of sums
    would.
    """
    model = make_model(layers, spread)
    rows = sampled(model)
    for length in (1, LONGEST):
        look(model, collate_packed(cut(rows, length)))
    true = shared_prompts._attend
    with pytest.MonkeyPatch.context() as patch:
        again = lambda made: (made.float() * (1 + 2**-8 * (torch.rand(made.shape) - 0.5))).to(made.dtype)  # noqa: E731
        patch.setattr(shared_prompts, "_attend", lambda *given: again(true(*given)))
        for length in (1, LONGEST):
            look(model, collate_packed(cut(rows, length)))
    assert capsys.readouterr().out.count("packing check passed") == 4


def hidden(at, length, start, before):
    return at, length, start + 1, before - 1


def spans(change):
    """Plant a fault: `change` (first column, columns, first column of the prefix, its columns) of each
    response.
    """

    def plant(patch, rows):
        true = Packed.spans
        patch.setattr(
            Packed,
            "spans",
            lambda self, narrow=False: (change(*one) if one[3] else one for one in true(self, narrow)),
        )
        return collate_packed(rows)

    return plant


def positions(patch, rows):
    batch = collate_packed(rows)
    for start, prefix, own in batch["row"].groups:
        batch["row"].positions[0, start + prefix : start + prefix + sum(own)] += 1
    return batch


def missing(patch, rows):
    return collate_packed(
        [row | {"prompt_ids": row["prompt_ids"][:9] + row["prompt_ids"][10:]} for row in rows]
    ) | {"pairs": rows}


def swapped(patch, rows):
    return collate_packed(
        [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
    ) | {"pairs": rows}


FAULTS = {
    "a prompt token is missing": missing,
    "positions are off by one": positions,
    "the responses are swapped": swapped,
    "the prompt's last token is not seen": spans(
        lambda at, length, start, before: (at, length, start, before - 1)
    ),
    "ten tokens of the prompt are not seen": spans(
        lambda at, length, start, before: (at, length, start + 10, before - 10)
    ),
    "chosen leaks into rejected": spans(lambda at, length, start, before: (at, length, start, at - start)),
    "the pair before leaks": spans(lambda at, length, start, before: (at, length, 0, start + before)),
}


@pytest.fixture(scope="module")
def small():
    model = make_model(3, 2.0)
    return model, sampled(model)


@pytest.mark.parametrize("length", [1, LONGEST])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_layout_is_found_at_any_length(small, fault, length, monkeypatch):
    model, rows = small
    batch = FAULTS[fault](monkeypatch, cut(rows, length))
    with pytest.raises(UserError, match="differ from the padded ones by .*--share_prompts false"):
        look(model, batch)
