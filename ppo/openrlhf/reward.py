"""The project's rewards for OpenRLHF's rollouts: any reward model of annotate_data, weighted sums of them, or
a Python function.

What OpenRLHF 0.11.2 hands over for a response (utils/agent.py): `query`, the decoded tokens of prompt and
response with special tokens; `prompt`, the templated text that was sampled from; `label`, in our prompts file
the record as JSON. The messages come out of the label, the response out of the query; then a reward model
sees its own template and its own tokens, as in get_rewards.py.

A reward *model* is served by ppo/openrlhf/serve_reward.py in a process of its own. OpenRLHF calls
`reward_func` in its sampling processes, one response at a time, where a model would be loaded once for each
engine, on its GPU or on none: only functions are called there,

    RLHF_REWARD_CONFIG=reward.yaml python -m openrlhf.cli.train_ppo_ray … --reward.remote_url
    ppo/openrlhf/reward.py

with the keys of `RewardArguments` in reward.yaml.
"""

import functools
import json
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # OpenRLHF loads this file by its path

from annotate_data.arguments import Arguments as Annotation
from annotate_data.arguments import check as check_annotation
from common import records
from common.cli import UserError, arg, build, read_yaml
from ppo.openrlhf.inherit import inherit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "RLHF_REWARD_CONFIG"
CPU_PARAMETERS = 200e6  # more than these are not scored without a GPU
# Of get_rewards.py: what is about its files, about pair-preference models, or has another name here.
NOT_TAKEN = (
    "dataset_name_or_path output_dir K overwrite chunk_records ranking save_pair_probabilities chat_template"
).split()


@dataclass(kw_only=True)
class RewardArguments(inherit(Annotation, NOT_TAKEN)):
    policy: str = arg(
        help="folder or hub name of the policy: its tokenizer tells the response from the prompt"
    )
    reward_chat_template: str | None = arg(
        None, "jinja file in place of the reward model's own chat template"
    )
    allow_cpu: bool = arg(
        False, f"score models of more than {CPU_PARAMETERS / 1e6:.0f} million parameters without a GPU too"
    )


def annotation(args: RewardArguments) -> Annotation:
    """Arguments of get_rewards.py for the same rewards."""
    if not args.reward_name_or_path and not args.reward_function:
        raise UserError("no reward: give reward_name_or_path or reward_function")
    same = Annotation.__dataclass_fields__.keys() - NOT_TAKEN
    values = {key: getattr(args, key) for key in same}
    return Annotation("-", "-", chat_template=args.reward_chat_template, **values)


def check(args: RewardArguments) -> Annotation:
    """Refuse what is known to be wrong before a model is loaded.

    Raises:
        UserError: as get_rewards.py's check; a pair-preference model.
    """
    asked = annotation(args)
    check_annotation(asked)
    if "pair_preference" in asked.reward_type:
        raise UserError(
            "a pair-preference model compares responses, PPO needs a reward for one: take a Bradley-Terry "
            "model or ArmoRM"
        )
    return asked


def special_strings(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern | None:
    """A pattern of the special tokens that decoding without them would leave out; None without any."""
    found = set(tokenizer.all_special_tokens) | {
        str(t) for t in tokenizer.added_tokens_decoder.values() if t.special
    }
    found = sorted((t for t in found if t.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


class Texts:
    """Takes OpenRLHF's texts apart with the policy's tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer, self.specials = tokenizer, special_strings(tokenizer)
        self.decoded = functools.lru_cache(4096)(self._decoded)

    def _decoded(self, prompt):
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def response(self, query: str, prompt: str) -> str:
        """The response in a query as generation/get_hf2.py would have written it: without special tokens.

        Raises:
            UserError: the query does not begin with the prompt.
        """
        for start in (prompt, self.decoded(prompt)):  # the second where decoding does not give the text back
            if query.startswith(start):
                text = query[len(start) :]
                return self.specials.sub("", text) if self.specials else text
        raise UserError(
            f"a query does not begin with its prompt: {prompt[:80]!r} … and {query[:80]!r} …; was it cut to "
            "data.max_len?"
        )

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
    """Rewards of queries; loads tokenizer and scorers in `load`. One call at a time is at work.

    Raises:
        UserError: as `check`; a model beyond CPU_PARAMETERS without a GPU.
    """

    def __init__(self, args: RewardArguments):
        self.args, self.asked, self.lock = args, check(args), threading.Lock()

    def load(self) -> "Rewards":
        from annotate_data.get_rewards import make_scorers
        from annotate_data.preference import PairPreference
        from common.devices import prepare_threads
        from ppo.openrlhf.prompts import load_tokenizer

        prepare_threads()
        self.texts = Texts(load_tokenizer(self.args.policy, self.args.trust_remote_code))
        self.scorers = make_scorers(self.asked)
        for scorer in self.scorers:
            if isinstance(scorer, PairPreference):
                raise UserError(
                    f"{scorer.name} compares responses, PPO needs a reward for one: take a Bradley-Terry "
                    "model or ArmoRM"
                )
            self._check_device(scorer)
            scorer.load()
        return self

    def _check_device(self, scorer):
        import torch

        from common.devices import check_torch
        from dpo_iteration.memory import shape_of

        if not hasattr(scorer, "config") or self.args.allow_cpu:
            return
        check_torch()
        if torch.cuda.is_available():
            return
        count = shape_of(scorer.name, trust_remote_code=self.args.trust_remote_code).parameters
        if count > CPU_PARAMETERS:
            raise UserError(
                f"{scorer.name} has {count / 1e9:.1f} billion parameters and this process has no GPU: start "
                "ppo/openrlhf/serve_reward.py where one is and give its address as reward_url, or say "
                "--allow_cpu true"
            )

    def __call__(self, queries: list, prompts: list, labels: list) -> list[float]:
        """list of rewards (floats), one for each query.

        Raises:
            UserError: a query that cannot be taken apart, a scorer that fails, a reward that is not finite.
        """
        from annotate_data.backbone import BadRecord
        from annotate_data.get_rewards import combine, rounded

        given = [self.texts.record(*three) for three in zip(queries, prompts, labels, strict=True)]
        parts = []
        with self.lock:
            for scorer in self.scorers:
                part = [None] * len(given)
                try:
                    for index, entry in scorer.score(given):
                        part[index] = rounded(entry["rewards"][0])
                except BadRecord as error:
                    raise UserError(f"{given[error.index]['id']}: {error}") from None
                parts.append(part)
        rewards = combine(parts, self.args.reward_weights) if self.args.reward_weights else parts[0]
        bad = [record["id"] for record, reward in zip(given, rewards, strict=True) if reward is None]
        if bad:
            raise UserError(f"no finite reward for {', '.join(bad[:3])}: PPO cannot go on without one")
        return rewards


def answer(rewards: list[float]) -> dict:
    """What OpenRLHF reads: a number for one response, lists for several (it sends one at a time)."""
    value = rewards[0] if len(rewards) == 1 else rewards
    return {"rewards": value, "scores": value, "extra_logs": {}}


@functools.cache
def _configured():
    path = os.environ.get(CONFIG)
    if not path:
        raise UserError(f"{CONFIG} names no YAML of reward settings")
    args = build(RewardArguments, read_yaml(path, "reward settings"), path)
    if args.reward_name_or_path:
        raise UserError(
            f"{path} names reward models, which would be loaded in every sampling process: serve them with "
            "ppo/openrlhf/serve_reward.py"
        )
    return Rewards(args).load()


_loading = threading.Lock()


def reward_func(queries: list, prompts: list, labels: list, **kwargs: object) -> dict:
    """Called by OpenRLHF, from several threads at once, with lists of one entry each."""
    with _loading:
        rewards = _configured()
    return answer(rewards(queries, prompts, labels))
