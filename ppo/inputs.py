"""What train_ppo.py starts from: models, looked at before they are trusted, and prompts as token ids."""

import sys

from common import chat, models
from common.cli import UserError
from common.records import BadRecord
from common.records import read_prompts as read_records
from dpo_iteration.output import is_main, say
from dpo_iteration.rows import check_bos


def load(auto_class, name, args, missing=(), **more):
    """A model in fp32; a checkpoint that lacks weights other than `missing` is refused."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        softcap = getattr(
            config.get_text_config(), "attn_logit_softcapping", None
        )  # sdpa would leave it out in silence
        attention = args.attn_implementation or ("eager" if softcap else "sdpa")
        model, report = auto_class.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=args.trust_remote_code,
            **more,
        )
    except Exception as error:  # hub, file and remote code fail in many ways
        raise UserError(f"cannot load {name}: {' '.join(str(error).split())[:300]}") from None
    lacking = sorted(set(report["missing_keys"]) - set(missing))
    if lacking:
        raise UserError(f"{name} lacks the weights {', '.join(lacking[:3])}: they would be random")
    return model


def without_dropout(model):
    """Switch dropout off, be it a module or a number that a module hands to its attention."""
    for module in model.modules():
        for key in (
            "p",
            "attention_dropout",
            "dropout",
            "activation_dropout",
            "hidden_dropout",
            "attn_dropout",
        ):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)


def load_critic(args, tokenizer, scorers):
    """A sequence classifier with one label, of which `score` is applied at every token."""
    import torch
    import transformers

    vocabulary, name = tokenizer.get_vocab(), args.critic_name_or_path
    if name is None:
        fitting = [
            s for s in scorers if type(s).__name__ == "BradleyTerry" and s.tokenizer.get_vocab() == vocabulary
        ]
        name = fitting[0].name if fitting else None
    elif models.load_tokenizer(name, trust_remote_code=args.trust_remote_code).get_vocab() != vocabulary:
        raise UserError(
            f"--critic_name_or_path {name} has another vocabulary than the policy, whose token ids it would "
            "be given; "
            "leave it out to start from the policy"
        )
    new_head = name is None
    critic = load(
        transformers.AutoModelForSequenceClassification,
        name or args.model_name_or_path,
        args,
        missing={"score.weight"} if new_head else set(),
        num_labels=1,
    )
    if not isinstance(getattr(critic, "score", None), torch.nn.Linear) or critic.score.out_features != 1:
        raise UserError(
            f"{name or args.model_name_or_path}: its classifier has no head `score` with one output to take "
            "values from"
        )
    size, needed = critic.get_input_embeddings().num_embeddings, max(vocabulary.values())
    if size <= needed:
        raise UserError(
            f"{name or args.model_name_or_path} has {size} embeddings, the policy's tokens need "
            f"{needed + 1}: no match"
        )
    if new_head:
        torch.nn.init.zeros_(critic.score.weight)
    say(
        f"value model: from {name or args.model_name_or_path}, "
        + ("the policy, with a new head that says 0" if new_head else "head and all")
    )
    return critic


def rendered_prompts(args, tokenizer, bad):
    """Yield (prompt record, its templated text) of all sets.

    Records that hold no prompt, or one that the template refuses, become entries of the skipped file in the
    list `bad`; where `bad_prompts` is refuse, the first is an error. What the template leaves out of prompts'
    tools is told.
    """
    chat.need_template(tokenizer)
    silent = {}
    for name in args.dataset_name_or_path:
        for number, record in enumerate(
            read_records(name, args.dataset_key, args.dataset_split, args.system_prompt, keep_bad=True), 1
        ):
            where = f"{name} record {number}"
            try:
                if isinstance(record, BadRecord):
                    raise record
                text = chat.render(
                    tokenizer, record["prompt"], True, args.template_kwargs, record.get("tools"), args.date
                )
                for part in chat.left_out(
                    tokenizer, record["prompt"], True, args.template_kwargs, record.get("tools")
                ):
                    silent.setdefault(part, where)
            except UserError as error:
                known = isinstance(error, BadRecord)
                _leave_out(
                    args,
                    bad,
                    error.id if known else record["id"],
                    str(error) if known else f"{where}: {error}",
                )
            else:
                yield record, text
    if bad:
        _warn(f"{len(bad)} prompts cannot be used and are skipped, for example {bad[0]['reason']}")
    for part, where in silent.items():
        _warn(
            f"the chat template leaves out the {part} of prompts such as {where}, so the policy does not see "
            "them"
        )


def _warn(text):
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _leave_out(args, bad, prompt_id, reason):
    if args.bad_prompts == "refuse":
        raise UserError(f"{reason}; mend or remove it, or give --bad_prompts skip")
    bad.append({"id": prompt_id, "reason": reason})


def read_prompts(args, tokenizer, policy):
    """(prompt records with their token ids under "ids", entries of the skipped file)."""
    kept, long, bad = [], [], []
    for record, text in rendered_prompts(args, tokenizer, bad):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > args.max_input_length:
            long.append(
                {
                    "id": record["id"],
                    "reason": f"prompt of {len(ids)} tokens, more than {args.max_input_length}",
                }
            )
        else:
            kept.append(record | {"ids": ids})
    if len(kept) < args.rollout_batch_size:
        left = f"{len(long)} skipped as too long" + (
            f", {len(bad)} that cannot be used, such as {bad[0]['reason']}" if bad else ""
        )
        raise UserError(
            f"{len(kept)} prompts ({left}) for rollouts of {args.rollout_batch_size}: "
            "lower --rollout_batch_size, raise --max_input_length, or give more prompts"
        )
    check_bos(tokenizer, {"prompt_ids": kept[0]["ids"]})
    positions = models.positions(policy.config)
    if positions and args.max_input_length + args.max_new_tokens > positions:
        raise UserError(
            f"{args.model_name_or_path} has {positions} positions: --max_input_length "
            f"{args.max_input_length} + "
            f"--max_new_tokens {args.max_new_tokens} are more"
        )
    highest, embeddings = (
        max(max(record["ids"]) for record in kept),
        policy.get_input_embeddings().num_embeddings,
    )
    if highest >= embeddings:
        raise UserError(
            f"the tokenizer gives token id {highest} and {args.model_name_or_path} has {embeddings} "
            "embeddings: no match"
        )
    return kept, bad + long


def scorable_prompts(args, scorers, prompts):
    """(prompts that all scorers can read, entries of the skipped file for the others)."""
    kept, bad = [], []
    for record in prompts:
        try:
            for scorer in scorers:
                scorer.check(record["prompt"], record.get("tools"))
        except UserError as error:
            _leave_out(args, bad, record["id"], str(error))
        else:
            kept.append(record)
    if len(kept) < args.rollout_batch_size:
        raise UserError(
            f"{len(kept)} prompts for rollouts of {args.rollout_batch_size}; {len(bad)} are none that all "
            f"scorers can read: {bad[0]['reason']}"
        )
    if bad:
        _warn(f"{len(bad)} prompts are skipped as a scorer cannot read them, for example {bad[0]['reason']}")
    silent = {
        (scorer.name, part)
        for scorer in scorers
        for record in kept
        for part in scorer.left_out(record["prompt"], record.get("tools"))
    }
    for name, part in sorted(silent):
        _warn(f"{name} does not see the {part} of the prompts")
    return kept, bad
