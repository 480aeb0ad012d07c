"""How far the policy of an online run is from the start: KL(policy ‖ start) in each round, from a part of the
answers that it trains on.

It is what evaluation/divergence.py estimates as `kl` (k1, nats a response: log π − log π_start summed over a
response's tokens, mean over a prompt's responses, then over prompts), of the first two responses to the first
prompts of the round. These stand in a drawn order, and the first two responses are samples as any others;
chosen and rejected ones are not. Policy and start are both computed by the trainer, in one dtype.

With staleness 1 the answers are those of the policy π₀ one round before, not of π, which is about to be
trained on them. The figure is then KL(π₀ ‖ start) − KL(π₀ ‖ π), too small by how far one round goes.
"""

import itertools
from pathlib import Path

import torch

from common.records import read_generated
from common.tokens import PROMPT, RESPONSES
from dpo_iteration import reference
from evaluation.metrics import mean_and_error
from generation.gen_hf import Arguments
from generation.mixture import is_mixed

PROMPTS = 64  # of a round, for its KL: about 5% of what training on 320 computes


def is_plain(args: Arguments) -> bool:
    """Whether answers are samples of the policy itself: temperature 1, and nothing that cuts its tail off."""
    more = args.top_p < 1 or args.top_k > 0 or (args.sampling_args or {}).keys() - {"stop"}
    return not is_mixed(args) and args.temperature == 1 and not more


def rows_of(generated: Path) -> list[dict]:
    """The first two responses to the first prompts of a round, as token ids of a pair's two sides."""
    found = []
    for record in itertools.islice(read_generated(generated), PROMPTS):
        one, other = record[RESPONSES][:2]
        if one and other:
            found.append({"prompt_ids": record[PROMPT], "chosen_ids": one, "rejected_ids": other})
    return found


@torch.no_grad()
def estimate(
    generated: Path, policy: torch.nn.Module, start: torch.nn.Module, passes: reference.Passes
) -> dict:
    """{kl, kl_se, kl_per_token} of a round's answers, in nats; {} where all are empty. All ranks call it.

    Args:
        policy, start: as they are called, with TRL's fused head. passes: how both are computed.
    """
    rows, training = rows_of(generated), policy.training
    if not rows:
        return {}
    policy.eval()  # DeepSpeed's returns nothing
    found = []
    for model in (policy, start):
        sums = torch.zeros(len(rows), 2)
        for done, values in reference.compute(model, rows, passes, check=False):
            sums[done] = values[done].cpu()
        found.append(sums.double())
    policy.train(training)
    ratios = found[0] - found[1]
    tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    kl, error = mean_and_error(ratios.mean(1).tolist())
    found = {"kl": kl, "kl_se": error, "kl_per_token": ratios.sum().item() / tokens}
    return {key: value if value is None else round(value, 6) for key, value in found.items()}
