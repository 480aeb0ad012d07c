"""What train_ppo.py starts from: models, looked at before they are trusted, and prompts as token ids."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from common import models
from common.chat import ChatTemplate
from common.cli import UserError, count
from common.records import BadRecord
from common.records import read_prompts as read_records
from common.training import is_main, say
from dpo_iteration.rows import check_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ppo.openrlhf.arguments import Arguments as OpenRLHFArguments
    from ppo.train_ppo import Arguments


def load(
    auto_class: type, name: str, args: "Arguments", missing: Iterable[str] = (), **more: object
) -> "PreTrainedModel":
    """A model in fp32; a checkpoint that lacks weights other than `missing` is refused."""
    import torch

    config = models.load_config(name, trust_remote_code=args.trust_remote_code)
    model, report = models.load_weights(
        auto_class,
        name,
        dtype=torch.float32,
        attn_implementation=args.attn_implementation or models.choose_attention(config, auto_class, False),
        trust_remote_code=args.trust_remote_code,
        **more,
    )
    lacking = sorted(set(report["missing_keys"]) - set(missing))
    if lacking:
        raise UserError(f"{name} lacks the weights {', '.join(lacking[:3])}: they would be random")
    return model


def load_critic(args: "Arguments", tokenizer: "PreTrainedTokenizerBase", scorers: list) -> "PreTrainedModel":
    """The value model: a sequence classifier with one label, of which `score` is applied at every token."""
    import torch
    import transformers

    vocabulary, start = tokenizer.get_vocab(), args.critic_name_or_path
    if start is None:
        models_of_rewards = [scorer for scorer in scorers if type(scorer).__name__ == "BradleyTerry"]
        same = [s.name for s in models_of_rewards if s.tokenizer.get_vocab() == vocabulary]
        start = next(iter(same), None)
    elif models.load_tokenizer(start, trust_remote_code=args.trust_remote_code).get_vocab() != vocabulary:
        raise UserError(
            f"critic_name_or_path {start} has another vocabulary than the policy, whose token ids it would "
            "be given; leave it out to start from the policy"
        )
    name, new_head = start or args.model_name_or_path, start is None
    kind = transformers.AutoModelForSequenceClassification
    critic = load(kind, name, args, missing={"score.weight"} if new_head else (), num_labels=1)
    if not isinstance(getattr(critic, "score", None), torch.nn.Linear) or critic.score.out_features != 1:
        raise UserError(f"{name}: its classifier has no head `score` with one output to take values from")
    models.check_embeddings(name, max(vocabulary.values()), critic.get_input_embeddings().num_embeddings)
    if new_head:
        torch.nn.init.zeros_(critic.score.weight)
    head = "the policy, with a new head that says 0" if new_head else "head and all"
    say(f"value model: from {name}, {head}")
    return critic


def rendered_prompts(
    args: "Arguments | OpenRLHFArguments", template: ChatTemplate, skipped: list
) -> Iterator[tuple[dict, str, list[int]]]:
    """Yield (prompt record, its templated text, its token ids) of all sets.

    Prompts that are too long, records that hold no prompt, and those that the template refuses become
    entries of the skipped file in the list `skipped`; where `bad_prompts` is refuse, the first of the latter
    two is an error. A warning names the parts of prompts that the template leaves out.
    """
    template.need()
    silent = {}
    for name in args.dataset_name_or_path:
        for number, record in enumerate(read_records(name, args, keep_bad=True), 1):
            where = f"{name} record {number}"
            if isinstance(record, BadRecord):
                _leave_out(args, skipped, record.id, str(record))
                continue
            prompt, tools = record["prompt"], record.get("tools")
            try:
                text = template.render(prompt, True, tools)
                left_out = template.left_out(prompt, True, tools)
            except UserError as error:
                _leave_out(args, skipped, record["id"], f"{where}: {error}")
                continue
            ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > args.max_input_length:
                reason = f"prompt of {len(ids)} tokens, more than {args.max_input_length}"
                skipped.append({"id": record["id"], "reason": reason})
                continue
            for part in left_out:
                silent.setdefault(part, where)
            yield record, text, ids
    if skipped:
        _warn(f"{count(len(skipped), 'prompt')} skipped, for example {skipped[0]['reason']}")
    for part, where in silent.items():
        _warn(
            f"the chat template leaves out the {part} of prompts such as {where}: the policy sees none of it"
        )


def _warn(text):
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _leave_out(args, skipped, prompt_id, reason):
    if args.bad_prompts == "refuse":
        raise UserError(f"{reason}; mend or remove it, or set bad_prompts skip")
    skipped.append({"id": prompt_id, "reason": reason})


def check_count(args: "Arguments | OpenRLHFArguments", kept: list, skipped: list[dict]):
    """Refuse fewer prompts than a rollout takes."""
    if len(kept) < args.rollout_batch_size:
        such = f" ({len(skipped)} skipped, such as: {skipped[0]['reason']})" if skipped else ""
        raise UserError(
            f"{len(kept)} prompts{such} for rollouts of {args.rollout_batch_size}: lower rollout_batch_size, "
            "raise max_input_length, or give more prompts"
        )


def read_prompts(
    args: "Arguments", template: ChatTemplate, policy: "PreTrainedModel"
) -> tuple[list[dict], list[dict]]:
    """(prompt records with their token ids under "ids", entries of the skipped file)."""
    skipped = []
    kept = [record | {"ids": ids} for record, _, ids in rendered_prompts(args, template, skipped)]
    check_count(args, kept, skipped)
    check_bos(template.tokenizer, {"prompt_ids": kept[0]["ids"]})
    positions = models.positions(policy.config)
    if positions and args.max_input_length + args.max_new_tokens > positions:
        raise UserError(
            f"{args.model_name_or_path} has {positions} positions: max_input_length "
            f"{args.max_input_length} + max_new_tokens {args.max_new_tokens} are more"
        )
    highest = max(max(record["ids"]) for record in kept)
    models.check_embeddings(args.model_name_or_path, highest, policy.get_input_embeddings().num_embeddings)
    return kept, skipped


def scorable_prompts(args: "Arguments", scorers: list, prompts: list[dict]) -> tuple[list[dict], list[dict]]:
    """(prompts that all scorers can read, entries of the skipped file for the others)."""
    kept, bad, silent = [], [], set()
    for record in prompts:
        messages, tools = record["prompt"], record.get("tools")
        try:
            for scorer in scorers:
                scorer.check(messages, tools)
        except UserError as error:
            _leave_out(args, bad, record["id"], str(error))
        else:
            kept.append(record)
            silent |= {(s.name, part) for s in scorers for part in s.left_out(messages, tools)}
    check_count(args, kept, bad)
    if bad:
        _warn(f"{len(bad)} prompts are skipped as a scorer cannot read them, for example {bad[0]['reason']}")
    for name, part in sorted(silent):
        _warn(f"{name} does not see the {part} of the prompts")
    return kept, bad
