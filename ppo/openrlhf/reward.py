"""The project's rewards for OpenRLHF's rollouts: any reward model of annotate_data, a Python function, or
weighted sums of them. serve_reward.py hands them out over HTTP.

What OpenRLHF 0.11.2 asks with (utils/agent.py): `query`, the decoded tokens of prompt and response with
special tokens; `prompt`, the templated text that was sampled from; `label`, in our prompts file the record as
JSON. The messages come out of the label, the response out of the query; then a reward model sees its own
template and its own tokens, as in get_rewards.py.
"""

import json
import re
import threading
from dataclasses import dataclass

from annotate_data.arguments import Arguments as Annotation
from annotate_data.arguments import check as check_annotation
from annotate_data.kinds import KINDS
from common import records
from common.cli import UserError, arg
from ppo.openrlhf.inherit import inherit

# Of get_rewards.py: what is about its files, about pair-preference models, or has another name here.
NOT_TAKEN = (
    "dataset_name_or_path output_dir K overwrite chunk_records ranking save_pair_probabilities chat_template"
).split()
COMPARES = (
    "a pair-preference model compares responses, PPO needs a reward for one: take a Bradley-Terry model or "
    "ArmoRM"
)


@dataclass(kw_only=True)
class RewardArguments(inherit(Annotation, NOT_TAKEN)):
    policy: str = arg(
        help="folder or hub name of the policy: its tokenizer tells the response from the prompt"
    )
    reward_chat_template: str | None = arg(
        None, "jinja file in place of the reward model's own chat template"
    )


def check(args: RewardArguments) -> Annotation:
    """Arguments of get_rewards.py for the same rewards; refuses what is known to be wrong before a model is
    loaded.

    Raises:
        UserError: as get_rewards.py's check; no reward; a pair-preference model.
    """
    if not args.reward_name_or_path and not args.reward_function:
        raise UserError(
            "no reward: give reward_name_or_path (a reward model), reward_function (FILE.py:NAME) or "
            "reward_url (a server)"
        )
    values = {key: getattr(args, key) for key in Annotation.__dataclass_fields__.keys() - NOT_TAKEN}
    asked = Annotation("-", "-", chat_template=args.reward_chat_template, **values)
    check_annotation(asked)
    if any(KINDS[kind].scorer.compares for kind in asked.reward_type if kind != "auto"):
        raise UserError(COMPARES)
    return asked


class Texts:
    """Takes OpenRLHF's texts apart with the policy's tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        specials = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self.specials = re.compile(
            "|".join(re.escape(token) for token in specials if token.strip()) or "(?!)"
        )

    def response(self, query: str, prompt: str) -> str:
        """The response in a query as generation/get_hf2.py would have written it: without special tokens.

        Raises:
            UserError: the query does not begin with the prompt.
        """
        if not query.startswith(prompt):  # where decoding does not give the text back
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
        if not query.startswith(prompt):
            raise UserError(
                f"a query does not begin with its prompt: {prompt[:80]!r} … and {query[:80]!r} …; was it cut "
                "to data.max_len?"
            )
        return self.specials.sub("", query[len(prompt) :])

    def record(self, query: str, prompt: str, label: str) -> dict:
        """The record that get_rewards.py's scorers take, of one response."""
        try:
            record = json.loads(label)
            messages = records.to_messages(record["prompt"], "label")
        except (TypeError, ValueError, KeyError):
            raise UserError(
                f"a label holds no record of ours: {str(label)[:80]!r}; use the prompts file that "
                "run_openrlhf.py writes"
            ) from None
        return record | {"prompt": messages, "responses": [self.response(query, prompt)]}


class Rewards:
    """Rewards of queries; loads tokenizer and scorers in `load`. One call at a time is at work."""

    def __init__(self, args: RewardArguments):
        self.args, self.asked, self.lock = args, check(args), threading.Lock()

    def load(self) -> "Rewards":
        from annotate_data.get_rewards import make_scorers
        from common.devices import check_torch, prepare_threads
        from common.models import load_tokenizer

        prepare_threads()
        if self.args.reward_name_or_path:
            check_torch()
        self.texts = Texts(load_tokenizer(self.args.policy, trust_remote_code=self.args.trust_remote_code))
        self.scorers = make_scorers(self.asked)
        for scorer in self.scorers:
            if scorer.compares:
                raise UserError(f"{scorer.name}: {COMPARES}")
            scorer.load()
        return self

    def __call__(self, queries: list, prompts: list, labels: list) -> list[float]:
        """list of rewards (floats), one for each query.

        Raises:
            UserError: a query that cannot be taken apart, a scorer that fails, a reward that is not finite.
        """
        from annotate_data.backbone import BadRecord
        from annotate_data.get_rewards import combine

        given = [self.texts.record(*three) for three in zip(queries, prompts, labels, strict=True)]
        parts = []
        with self.lock:
            for scorer in self.scorers:
                try:
                    found = {index: entry["rewards"][0] for index, entry in scorer.score(given)}
                except BadRecord as error:
                    raise UserError(f"{given[error.index]['id']}: {error}") from None
                parts.append([found[index] for index in range(len(given))])
        rewards = combine(parts, self.args.reward_weights or [1.0])
        bad = [record["id"] for record, reward in zip(given, rewards, strict=True) if reward is None]
        if bad:
            raise UserError(f"no finite reward for {', '.join(bad[:3])}: PPO cannot go on without one")
        return rewards
