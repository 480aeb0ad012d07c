r"""PPO in one file: settings, algorithm, training. Plain data parallel, for one GPU, a few, or a CPU.

In:  a policy, prompts, and what scores a response: reward models (as annotate_data/get_rewards.py takes them,
     also with another tokenizer than the policy's), a function of your own, or a weighted sum.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`. Next to it: a line of
     figures for each rollout (`.log.jsonl`), the prompts left out (`.skipped.jsonl`), and last a manifest
     (`.manifest.json`).

    accelerate launch --config_file configs/ddp.yaml --num_processes 1 ppo/train_ppo.py \
        configs/ppo_tiny.yaml:ppo --model_name_or_path tiny/built/policy \
        --reward_name_or_path tiny/built/reward_model --max_input_length 64 --max_new_tokens 32 \
        --dataset_name_or_path tiny/built/prompts/iter1.jsonl --output_dir models/ppo_tiny

Training repeats two steps (Ziegler et al. 2019, arXiv 1909.08593; details: arXiv 2403.17031):

    rollout   sample responses and score them; the reward of a token is −kl_coef · kl(token), plus the score
              at the last one
    learn     advantages by one of ESTIMATORS; `ppo_epochs` passes in shuffled batches: clipped policy loss,
              clipped value loss

Four models take part: the policy, the reference (the policy as it was at the start, frozen), the value model
where the estimator has one, and what scores. Left out to keep this readable: sharded models, LoRA, a fast
engine for sampling. Every process holds all models and the whole rollout as numbers, so that whitening,
advantages and the order of the responses are the same everywhere. Only passes through models are shared out,
and gradients added up. That is for models of up to about a billion parameters.

What surrounds the algorithm: checks.py refuses settings that cannot work, inputs.py loads models and prompts,
output.py writes checkpoints, log and model.

Nothing is found by looking for padding tokens: positions say where a response ends, so PAD may be EOS. All
randomness of a rollout is drawn from seeds made of `seed` and the rollout's number. A killed run continues
from its last checkpoint when the same command is started again, to the same weights on a CPU.
"""

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from annotate_data.functions import EXAMPLE
from annotate_data.get_rewards import combine, make_scorers
from common import models, trackers
from common.chat import ChatTemplate
from common.cli import UserError, arg, build, count, parse, run, shaping_values
from common.devices import check_processes, check_torch, prepare_threads
from common.functions import function_file
from common.manifest import with_date
from common.records import PromptArguments, sample_seed
from common.training import Training, say
from dpo_iteration import saved
from ppo.checks import check, check_paths, check_samples, scoring
from ppo.inputs import load, load_critic, read_prompts, scorable_prompts
from ppo.output import Log, begin, finish, save

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

# Largest mean distance of a log-probability from the reference's before anything was learned, by precision.
OFF_BY_ROUNDING = {"no": 1e-3, "bf16": 0.1}
# In bf16 the first step's ratio may be this many times as far from 1 as rounding was seen to move it, within
# these limits.
TIMES_ROUNDING, LEAST_ROUNDING, MOST_ROUNDING = 3, 0.02, 0.3
# What learns → its loss among the figures of an optimizer step.
LOSSES = {"policy": "policy_loss", "critic": "value_loss"}


# ---- How good a token was --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A way to advantages.

    Attributes:
        words: what it is, for --help.
        shape: scores [prompts, samples_per_prompt] → what is put in their place.
        critic: whether a value model learns beside the policy; without one values are 0 and gae_lambda is 1:
            a token's advantage is the sum of the rewards from there on.
        compares: whether a score counts against those of the same prompt, so that there must be two.
    """

    words: str
    shape: "Callable[[Tensor], Tensor]"
    critic: bool = False
    compares: bool = True


ESTIMATORS = {
    "gae": Estimator(
        "generalised advantage estimation, by a value model (arXiv 1506.02438)",
        lambda scores: scores,
        critic=True,
        compares=False,
    ),
    "reinforce": Estimator("the score itself", lambda scores: scores, compares=False),
    "rloo": Estimator(
        "the score less the mean of the prompt's others (arXiv 2402.14740)",
        lambda scores: (scores - scores.mean(1, keepdim=True)) * scores.shape[1] / (scores.shape[1] - 1),
    ),
    "group_norm": Estimator(
        "the score in standard deviations from the prompt's mean, as GRPO has it (arXiv 2402.03300)",
        lambda scores: (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6),
    ),
}


# ---- Settings --------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Arguments(PromptArguments):
    """ppo/openrlhf/arguments.py takes these too, but for a few, and has defaults of its own for some."""

    model_name_or_path: str = arg(
        help="policy to start from, and the reference: hub name or folder", shapes=False
    )
    critic_name_or_path: str | None = arg(
        None,
        "start of the value model, a classifier with the policy's vocabulary; None: the first reward model "
        "if it has that vocabulary, else the policy with a new head",
        shapes=False,
    )
    reward_name_or_path: list[str] | None = arg(
        None, "reward model, or several: hub name or folder", shapes=False
    )
    reward_type: list[str] = arg(["auto"], "kind of the reward models, see annotate_data/get_rewards.py")
    reward_function: str | None = arg(None, "FILE.py:NAME, f(messages, response[, record]) → number")
    reward_weights: list[float] | None = arg(
        None, "one for each reward model, then the function's; the sum is the score"
    )
    trust_remote_code: bool = arg(False, "run Python code that comes with a model", shapes=False)
    attn_implementation: str | None = arg(
        None, "of policy and value model; None: eager where scores are soft-capped, else sdpa", shapes=False
    )

    dataset_name_or_path: list[str] = arg(
        help="prompts, one set or several: hub name, a data set's folder, .jsonl, .json, …", shapes=False
    )
    output_dir: str = arg(help="folder of the trained model", shapes=False)
    overwrite: bool = arg(False, "start again where an output exists or is half done", shapes=False)
    seed: int = arg(42, "seed of sampling and of the order of prompts and responses")

    max_input_length: int = arg(1024, "tokens of the templated prompt; longer prompts are skipped and listed")
    max_new_tokens: int = arg(1024, "tokens of a response; one without an end of turn by then is cut off")
    temperature: float = arg(1.0, "of sampling; log-probabilities are those of the logits divided by it")
    top_p: float = arg(
        1.0,
        "nucleus sampling; log-probabilities are of the whole distribution all the same, so below 1 the "
        "policy that samples is not quite the one that learns",
    )
    generation_batch_size: int = arg(64, "responses that a process samples at once")

    num_episodes: float = arg(1.0, "passes over the prompts")
    max_rollouts: int | None = arg(None, "maximum number of rollouts")
    rollout_batch_size: int = arg(128, "prompts of a rollout, over all processes")
    samples_per_prompt: int = arg(1, "responses to each prompt of a rollout")
    batch_size: int = arg(128, "responses per optimizer step, over all processes")
    micro_batch_size: int = arg(8, "responses in one pass through a model, per process", shapes=False)
    ppo_epochs: int = arg(1, "passes over a rollout's responses")

    learning_rate: float = arg(5e-7, "peak learning rate of the policy")
    critic_learning_rate: float = arg(9e-6, "peak learning rate of the value model")
    lr_scheduler_type: str = arg(
        "cosine", "schedule of both", ("constant", "constant_with_warmup", "cosine", "linear")
    )
    warmup_steps: float = arg(0.0, "optimizer steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = arg(0.0, "decoupled weight decay of both models")
    max_grad_norm: float = arg(1.0, "gradients of each model are scaled down to this norm; 0: never")
    kl_coef: float = arg(
        0.01, "reward taken off per nat that a response is off the reference; with kl_target the start"
    )
    kl_target: float | None = arg(None, "nats per response that kl_coef is steered to; None: kl_coef stays")
    kl_horizon: int = arg(10000, "responses; the larger, the slower kl_coef is steered")
    kl_estimator: str = arg(
        "k1",
        "of a token's KL in the reward; k1: log-ratio, k2: half its square, k3: ratio − 1 − log-ratio",
        ("k1", "k2", "k3"),
    )
    advantage_estimator: str = arg(
        "gae",
        "; ".join(f"{name}: {estimator.words}" for name, estimator in ESTIMATORS.items())
        + ". All but gae do without a value model, its learning rate, gae_lambda and value_clip",
        [*ESTIMATORS],
    )
    gamma: float = arg(1.0, "discount of a later token's reward, per token")
    gae_lambda: float = arg(0.95, "0: advantages from the next value alone, 1: from the rewards alone")
    clip: float = arg(0.2, "a token's probability ratio earns no more beyond 1 ± this")
    value_clip: float = arg(0.2, "a value earns no more beyond the rollout's value ± this")
    value_coef: float = arg(
        0.1, "weight of the value loss; matters through max_grad_norm alone, the models being two"
    )
    missing_eos_penalty: float = arg(1.0, "taken off the score of a response that was cut off, as in TRL")
    whiten_rewards: bool = arg(False, "scale the tokens' rewards to variance 1, keep their mean")
    whiten_advantages: bool = arg(True, "scale the advantages to mean 0 and variance 1")

    bf16: bool = arg(
        True, "compute in bfloat16 on a GPU and save in it; the weights that learn are fp32 all the while"
    )
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, slower", shapes=False)
    cpu_threads: int | None = arg(
        None, "threads of a process without a GPU; None: the cores shared out", shapes=False
    )
    save_steps: int = arg(20, "rollouts between checkpoints; 0 writes none", shapes=False)
    save_total_limit: int = arg(2, "checkpoints kept while training", shapes=False)
    keep_checkpoints: bool = arg(
        False, "keep checkpoints, with the value model, once the model is saved", shapes=False
    )
    logging_steps: int = arg(1, "rollouts between lines of progress", shapes=False)
    report_to: list[str] = arg(
        ["none"], f"trackers, one or several: none, {', '.join(trackers.FIGURES)}", shapes=False
    )
    project: str | None = arg(
        None,
        "project of the run at the trackers; None: as their variables say (WANDB_PROJECT, …), else "
        f"{trackers.PROJECT}",
        shapes=False,
    )
    run_name: str | None = arg(None, "name of the run at the trackers", shapes=False)

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.advantage_estimator]


def arguments(values: dict, where: str = "") -> Arguments:
    """Arguments from a mapping, checked without torch and before the files are there.

    Args:
        where: names the mapping in errors.
    """
    args = build(Arguments, values, where)
    check(args)
    return args


def shaping(args: Arguments) -> tuple[dict, dict]:
    """(settings, inputs) that shape the model; what its manifest holds."""
    inputs = {
        "model_name_or_path": args.model_name_or_path,
        "critic_name_or_path": args.critic_name_or_path,
        "chat_template": args.chat_template,
    }
    inputs |= {f"dataset_name_or_path {i}": name for i, name in enumerate(args.dataset_name_or_path, 1)}
    inputs |= {f"reward_name_or_path {i}": name for i, name in enumerate(args.reward_name_or_path or [], 1)}
    if args.reward_function:
        inputs["reward_function"] = str(function_file(args.reward_function, "reward_function", EXAMPLE)[0])
    return shaping_values(args), inputs


# ---- The mathematics -------------------------------------------------------------------------------------
# Tensors are [responses, tokens]; `mask` is 1 at a response's tokens and 0 after them.


def kl_estimate(log_probs: "Tensor", ref_log_probs: "Tensor", estimator: str) -> "Tensor":
    """Each token's KL to the reference, estimated from the token that was sampled
    (joschu.net/blog/kl-approx.html).

    k1 = log π/π_ref is unbiased and may be negative; k2 = k1²/2 is not; k3 = e^(−k1) − 1 + k1 is unbiased and
    never negative.
    """
    k1 = log_probs - ref_log_probs
    return {"k1": lambda: k1, "k2": lambda: k1.square() / 2, "k3": lambda: (-k1).expm1() + k1}[estimator]()


def token_rewards(scores: "Tensor", kl: "Tensor", mask: "Tensor", kl_coef: float) -> "Tensor":
    """−kl_coef · kl at every token, plus the response's score at its last one. `scores`: [responses]."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def whiten(values: "Tensor", mask: "Tensor", shift_mean: bool = True) -> "Tensor":
    """`values` scaled to variance 1 over the mask's tokens, and to mean 0 with `shift_mean`; 0 elsewhere."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean).square() * mask).sum() / mask.sum()
    white = (values - mean) * variance.clamp(min=1e-8).rsqrt()
    return (white if shift_mean else white + mean) * mask


def gae(values: "Tensor", rewards: "Tensor", mask: "Tensor", gamma: float, lam: float) -> tuple:
    """(advantages, returns) by generalised advantage estimation (arXiv 1506.02438), 0 after the end.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1},  return_t = A_t + V_t;  V is 0 after the end, too.
    """
    values, rewards = values * mask, rewards * mask
    advantages, following, next_value = values.new_zeros(values.shape), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t], next_value = following, values[:, t]
    return advantages, advantages + values


def policy_loss(
    log_probs: "Tensor", old_log_probs: "Tensor", advantages: "Tensor", clip: float
) -> tuple["Tensor", "Tensor"]:
    """(loss, ratio π/π_old) of each token: −min(ratio · A, clipped ratio · A) (arXiv 1707.06347)."""
    ratio = (log_probs - old_log_probs).exp()
    return -(ratio * advantages).minimum(ratio.clamp(1 - clip, 1 + clip) * advantages), ratio


def value_loss(values: "Tensor", old_values: "Tensor", returns: "Tensor", clip: float) -> "Tensor":
    """Each token's ½ max((V − R)², (V_clipped − R)²); V_clipped is V kept within `clip` of the rollout's."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return (values - returns).square().maximum((clipped - returns).square()) / 2


def steer(kl_coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """The next kl_coef: a step up where `kl` (nats per response) is above `target`, down below (arXiv
    1909.08593, §2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


# ---- From token ids to numbers. A row is one response: {"prompt": ids, "response": ids, …} ----------------


def padded(rows: list[dict], pad: int, device: "torch.device") -> tuple:
    """What a model is given for `rows`: prompts padded on the left, responses on the right, so that they meet
    in one column.

    Returns:
        (model's inputs, responses [rows, R], mask [rows, R]) with R the longest response.
    """
    import torch

    before, after = (max(len(row[side]) for row in rows) for side in ("prompt", "response"))
    ids = torch.full((len(rows), before + after), pad)
    there = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start, end = before - len(row["prompt"]), before + len(row["response"])
        ids[i, start:end], there[i, start:end] = torch.tensor(row["prompt"] + row["response"]), 1
    positions = (there.cumsum(1) - 1).clamp(min=0)
    ids, there, positions = (tensor.to(device) for tensor in (ids, there, positions))
    inputs = {"input_ids": ids, "attention_mask": there, "position_ids": positions, "use_cache": False}
    return inputs, ids[:, before:], there[:, before:].float()


def log_probs_of(
    policy: "PreTrainedModel", inputs: dict, responses: "Tensor", temperature: float, entropy: bool = False
) -> tuple:
    """(log-probabilities of the response's tokens, entropies of their distributions), [rows, R] in fp32.

    Entropies are None unless asked for: they take two more tensors of the vocabulary's size, which here is
    what fills a GPU.
    """
    count = responses.shape[1]
    logits = policy(**inputs, logits_to_keep=count + 1).logits
    every = (logits[:, -count - 1 : -1].float() / temperature).log_softmax(
        -1
    )  # a token comes from the one before
    entropies = -(every.exp() * every).sum(-1) if entropy else None
    return every.gather(-1, responses[..., None])[..., 0], entropies


def values_of(critic: "PreTrainedModel", inputs: dict, responses: "Tensor") -> "Tensor":
    """Values [rows, R] in fp32: what is expected where each token of the response is about to be chosen."""
    import torch

    count = responses.shape[1]
    hidden = critic.base_model(**inputs).last_hidden_state[:, -count - 1 : -1]
    with torch.autocast(hidden.device.type, enabled=False):  # bf16 has 8 bits: too few for a sum of rewards
        return critic.score(hidden.float())[..., 0]


# ---- The algorithm ---------------------------------------------------------------------------------------


class PPO:
    """The four models, and a method for each thing that is done with them.

    Attributes:
        learners: name → (model, optimizer, schedule), what learns.
        done: rollouts that were learned from. rollouts: how many there will be.
        prompts: records with their token ids under "ids". skipped: entries of the skipped file.
        stops: ids of the tokens that end a response.
    """

    def __init__(self, args: Arguments, accelerator):
        self.args, self.accelerator, self.device = args, accelerator, accelerator.device
        self.load_policy()
        self.load_scorers()
        self.critic = load_critic(args, self.tokenizer, self.scorers) if args.estimator.critic else None
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval().to(self.device)
        rates = {"policy": args.learning_rate, "critic": args.critic_learning_rate}
        learners = {name: model for name in LOSSES if (model := getattr(self, name)) is not None}
        for model in learners.values():
            models.without_dropout(model.to(self.device))
            if args.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rollouts = max(1, int(args.num_episodes * len(self.prompts) / args.rollout_batch_size + 1e-9))
        self.rollouts = min(rollouts, args.max_rollouts or rollouts)
        self.kl_coef, self.done = args.kl_coef, 0
        self.learners = {name: self.learner(model, rates[name]) for name, model in learners.items()}

    def load_policy(self):
        """Tokenizer, policy and prompts; how the policy samples, and where responses end."""
        import transformers

        args = self.args
        name, trust = args.model_name_or_path, args.trust_remote_code
        template = ChatTemplate(models.load_tokenizer(name, trust_remote_code=trust), args)
        self.tokenizer = template.tokenizer
        self.policy = load(transformers.AutoModelForCausalLM, name, args)
        self.prompts, self.skipped = read_prompts(args, template, self.policy)
        known = self.policy.generation_config.eos_token_id
        self.stops = set(template.stop_token_ids(known))
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad = next(token for token in known if token is not None)
        # Saved with the trained model. Sampling here follows our settings alone: a model's own generation
        # config may hold a top_k, which training knows nothing of.
        self.generation_config = saved.generation_config(name, template)
        self.policy.generation_config = transformers.GenerationConfig(
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=sorted(self.stops),
            pad_token_id=self.pad,
        )

    def load_scorers(self):
        """What scores a response; prompts that a scorer cannot read are skipped."""
        import torch

        threads = torch.get_num_threads()
        self.scorers = make_scorers(scoring(self.args))
        check_samples(self.args, self.scorers)
        self.prompts, refused = scorable_prompts(self.args, self.scorers, self.prompts)
        self.skipped += refused
        for scorer in self.scorers:
            scorer.load()
        torch.set_num_threads(threads)  # a scorer sets its own

    def learner(self, model: "PreTrainedModel", learning_rate: float) -> tuple:
        """(model, its optimizer, its schedule)."""
        import torch
        import transformers

        args = self.args
        responses = self.rollouts * args.rollout_batch_size * args.samples_per_prompt
        steps = responses * args.ppo_epochs // args.batch_size
        warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else int(args.warmup_steps)
        if warmup > steps:
            raise UserError(
                f"warmup_steps {args.warmup_steps:g} is more than the {steps} optimizer steps of this run"
            )
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=args.weight_decay)
        return model, optimizer, transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps)

    # Rollouts

    def rollout(self, number: int) -> tuple[list[dict], dict]:
        """(rows of rollout `number`, from 1 on, all of them on every process; the seconds of each part)."""
        args, seconds = self.args, {"generate": 0.0, "score": 0.0, "evaluate": 0.0}
        size = args.rollout_batch_size
        prompts = [self.prompts[i] for i in self.order((number - 1) * size, size)]
        size = args.generation_batch_size // args.samples_per_prompt
        # The same batches whatever the number of processes.
        batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        rows = []
        try:
            for i in range(self.accelerator.process_index, len(batches), self.accelerator.num_processes):
                times = [time.monotonic()]
                new = self.generate(batches[i], sample_seed(args.seed, number, f"batch {i}"))
                times.append(time.monotonic())
                self.score(new)
                times.append(time.monotonic())
                self.evaluate(new)
                times.append(time.monotonic())
                rows.append((i, new))
                for part, begun, ended in zip(seconds, times, times[1:]):
                    seconds[part] += ended - begun
        except UserError as error:  # of one process, told by all: rank 0 alone prints errors
            rows = str(error)
        parts = self.gather(rows)
        for part in parts:
            if isinstance(part, str):
                raise UserError(part)
        batches = sorted((batch for part in parts for batch in part), key=lambda batch: batch[0])
        return [row for _, new in batches for row in new], seconds

    def order(self, start: int, count: int) -> list[int]:
        """Indices of prompts number `start` to `start + count` of the run; each pass has its own order."""
        import torch

        found, total = [], len(self.prompts)
        while len(found) < count:
            episode, place = divmod(start + len(found), total)
            shuffle = torch.Generator().manual_seed(sample_seed(self.args.seed, episode, "prompts"))
            shuffled = torch.randperm(total, generator=shuffle)
            found += shuffled[place : place + count - len(found)].tolist()
        return found

    def generate(self, prompts: list[dict], seed: int) -> list[dict]:
        """`samples_per_prompt` rows a prompt: the response up to its first stop token, and its text."""
        import torch

        rows = [
            {"prompt": prompt["ids"], "response": [], "record": prompt}
            for prompt in prompts
            for _ in range(self.args.samples_per_prompt)
        ]
        inputs, *_ = padded(rows, self.pad, self.device)
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        self.policy.eval()
        torch.manual_seed(seed)
        try:
            with torch.no_grad(), self.accelerator.autocast():
                sampled = self.policy.generate(**given)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                "the policy's probabilities are not finite any more: lower learning_rate; checkpoints are "
                "kept"
            ) from None
        for row, ids in zip(rows, sampled[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((i for i, token in enumerate(ids) if token in self.stops), None)
            row["cut"] = end is None
            row["response"] = ids if end is None else ids[: end + 1]
            row["text"] = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return rows

    def score(self, rows: list[dict]):
        """Give each row its score. Scorers get texts, and have templates and tokenizers of their own."""
        K, asked = self.args.samples_per_prompt, []
        groups = [rows[i : i + K] for i in range(0, len(rows), K)]
        for group in groups:
            record = {key: value for key, value in group[0]["record"].items() if key != "ids"}
            record["responses"] = [row["text"] for row in group]
            record["finish_reasons"] = ["length" if row["cut"] else "stop" for row in group]
            record["num_tokens"] = [len(row["response"]) for row in group]
            asked.append(record)
        parts = []
        for scorer in self.scorers:
            found = {index: entry["rewards"] for index, entry in scorer.score(asked)}
            parts.append([found[index] for index in range(len(asked))])
        for group, record, *scores in zip(groups, asked, *parts):
            for row, score in zip(group, combine(scores, self.args.reward_weights or [1.0])):
                if score is None:
                    raise UserError(
                        f"a response to prompt {record['id']} has a score that is not finite: "
                        f"{row['text'][:80]!r}; mend what scores it"
                    )
                row["score"] = score
                del row["record"]

    def evaluate(self, rows: list[dict]):
        """Give each row the log-probabilities of policy and reference and the values, [tokens] each, and the
        sum of its tokens' entropies.

        In bf16 the first rows also get what rounding does to their ratios: the policy's pass is repeated with
        all positions moved on by one, which rotary encodings do not see but for rounding.
        """
        import torch

        from common.shared_prompts import is_rotary

        temperature = self.args.temperature
        rounds = self.accelerator.mixed_precision == "bf16" and is_rotary(self.policy)
        for start in range(0, len(rows), self.args.micro_batch_size):
            batch = rows[start : start + self.args.micro_batch_size]
            inputs, responses, _ = padded(batch, self.pad, self.device)
            found = {}
            with torch.no_grad(), self.accelerator.autocast():
                log_probs, entropies = log_probs_of(self.policy, inputs, responses, temperature, entropy=True)
                found["log_probs"] = log_probs
                found["ref_log_probs"], _ = log_probs_of(self.reference, inputs, responses, temperature)
                if self.critic:
                    found["values"] = values_of(self.critic, inputs, responses)
                if rounds and start == 0:
                    moved = inputs | {"position_ids": inputs["position_ids"] + 1}
                    again, _ = log_probs_of(self.policy, moved, responses, temperature)
                    found["rounding"] = (again - log_probs).expm1().abs()
            for i, row in enumerate(batch):
                n = len(row["response"])
                row |= {key: value[i, :n].cpu() for key, value in found.items()}
                row["entropy"] = entropies[i, :n].sum().item()

    # Learning

    def advantages(self, rows: list[dict]) -> tuple[dict, dict]:
        """(tensors [responses, longest] on the device for `learn`, the figures that are logged of a rollout).

        The rows are in order of their prompts, `samples_per_prompt` after one another.
        """
        import torch

        def stack(key: str) -> "Tensor":
            return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], True).to(self.device)

        args = self.args
        data = {key: stack(key) for key in ("log_probs", "ref_log_probs", "values") if key in rows[0]}
        lengths = torch.tensor([len(row["response"]) for row in rows], device=self.device)
        mask = data["mask"] = (torch.arange(lengths.max(), device=self.device) < lengths[:, None]).float()
        cut, scores = ([row[key] for row in rows] for key in ("cut", "score"))
        penalised = [score - args.missing_eos_penalty * is_cut for score, is_cut in zip(scores, cut)]
        kl = kl_estimate(data["log_probs"], data["ref_log_probs"], args.kl_estimator)
        shaped = args.estimator.shape(torch.tensor(penalised).view(-1, args.samples_per_prompt)).flatten()
        rewards = token_rewards(shaped.to(self.device), kl, mask, self.kl_coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        values, gae_lambda = (
            (data["values"], args.gae_lambda) if self.critic else (torch.zeros_like(mask), 1.0)
        )
        data["advantages"], returns = gae(values, rewards, mask, args.gamma, gae_lambda)
        explained = {}
        if self.critic:
            data["returns"] = returns
            error, spread = ((returns - values) * mask)[mask > 0], returns[mask > 0].var(correction=0)
            explained["explained_variance"] = (1 - error.var(correction=0) / spread.clamp(min=1e-12)).item()
        if args.whiten_advantages:
            data["advantages"] = whiten(data["advantages"], mask)
        figures = {
            "reward": sum(scores) / len(rows),
            "reward_less_kl": (sum(penalised) - self.kl_coef * (kl * mask).sum().item()) / len(rows),
            "kl": ((data["log_probs"] - data["ref_log_probs"]) * mask).sum().item() / len(rows),
            "entropy": sum(row["entropy"] for row in rows) / lengths.sum().item(),
            "response_length": lengths.float().mean().item(),
            "truncated_fraction": sum(cut) / len(rows),
            **explained,
            "kl_coef": self.kl_coef,
        }
        return data, figures

    def learn(self, rows: list[dict], data: dict, number: int) -> dict:
        """`ppo_epochs` passes over the rows; returns the figures, means over tokens and steps."""
        import torch

        args, rank, world = self.args, self.accelerator.process_index, self.accelerator.num_processes
        for model, *_ in self.learners.values():
            model.train()
        figures = []
        for epoch in range(args.ppo_epochs):
            shuffle = torch.Generator().manual_seed(sample_seed(args.seed, number, f"epoch {epoch}"))
            for batch in torch.randperm(len(rows), generator=shuffle).split(args.batch_size):
                # Of all processes: the loss is one mean over the step's tokens.
                tokens, sums = data["mask"][batch].sum(), {}
                for part in batch[rank::world].split(args.micro_batch_size):
                    mine = {key: value[part] for key, value in data.items()}
                    for key, value in self.backward([rows[i] for i in part], mine, tokens).items():
                        sums[key] = sums.get(key, 0) + value
                parameters = [p for model, *_ in self.learners.values() for p in model.parameters()]
                self.add_up([*sums.values(), *(p.grad for p in parameters if p.grad is not None)])
                figure = {key: (value / tokens).item() for key, value in sums.items()}
                distance = figure.pop("ratio_distance")
                if not figures:
                    self.check_ratio(distance, rows, number)
                for name in self.learners:
                    figure |= self.step(name, figure[LOSSES[name]], number)
                figures.append(figure)
        return {key: sum(figure[key] for figure in figures) / len(figures) for key in figures[0]}

    def backward(self, rows: list[dict], data: dict, tokens: "Tensor") -> dict:
        """Add the gradients of some rows of an optimizer step of `tokens` tokens; returns the step's figures,
        as sums over the rows' tokens.
        """
        import torch

        args = self.args
        inputs, responses, mask = padded(rows, self.pad, self.device)
        old = {key: value[:, : responses.shape[1]] for key, value in data.items()}
        with self.accelerator.autocast():
            log_probs, _ = log_probs_of(self.policy, inputs, responses, args.temperature)
            values = values_of(self.critic, inputs, responses) if self.critic else None
        losses, ratio = policy_loss(log_probs, old["log_probs"], old["advantages"], args.clip)
        loss, figures = losses, {"policy_loss": losses}
        if self.critic:
            figures["value_loss"] = value_loss(values, old["values"], old["returns"], args.value_clip)
            loss = losses + args.value_coef * figures["value_loss"]
        ((loss * mask).sum() / tokens).backward()
        with torch.no_grad():
            distance = (ratio - 1).abs()
            figures |= {
                "clip_fraction": (distance > args.clip).float(),
                "approx_kl": ratio - 1 - ratio.log(),
                "ratio": ratio,
                "ratio_distance": distance,
            }
            return {key: (figure * mask).sum() for key, figure in figures.items()}

    def step(self, name: str, loss: float, number: int) -> dict:
        """One optimizer step of a learner, by gradients of all processes; returns its figures."""
        import torch

        model, optimizer, schedule = self.learners[name]
        limit = self.args.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise UserError(
                f"loss or gradient of the {name} is not finite in rollout {number}, before it could reach "
                "the weights; lower the learning rates or look at the scores; what is on disk is kept"
            )
        figures = {f"{name}_grad_norm": norm, f"{name}_learning_rate": schedule.get_last_lr()[0]}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return figures

    # Nothing was learned yet: the same weights must say the same

    def check_start(self, figures: dict):
        """Stop where the first rollout's log-probabilities are not those of the reference."""
        limit = OFF_BY_ROUNDING[self.accelerator.mixed_precision]
        if abs(figures["kl"]) > figures["response_length"] * limit:
            raise UserError(
                f"the policy is {figures['kl']:.3g} nats off the reference before anything was learned, and "
                "both are the same model: look for dropout or noise in the model, and at its attention "
                "(attn_implementation eager)"
            )

    def check_ratio(self, distance: float, rows: list[dict], number: int):
        """Stop where a rollout's first step sees other log-probabilities than the rollout did."""
        import torch

        limit = OFF_BY_ROUNDING["no"]
        if self.accelerator.mixed_precision == "bf16":
            seen = [row["rounding"] for row in rows if "rounding" in row]
            rounding = TIMES_ROUNDING * torch.cat(seen).mean().item() if seen else MOST_ROUNDING
            limit = min(max(rounding, LEAST_ROUNDING), MOST_ROUNDING)
        if not distance < limit:
            raise UserError(
                f"rollout {number}: the probability ratio of the first step is off 1 by {distance:.2g} in "
                f"the mean, more than rounding ({limit:.2g}): passes of the same weights differ. Look for "
                "dropout or noise in the model, and at its attention (attn_implementation eager)"
            )

    # Processes

    def gather(self, value: object) -> list:
        """The values of all processes, on every process."""
        from accelerate.utils import gather_object

        return gather_object([value]) if self.accelerator.num_processes > 1 else [value]

    def add_up(self, tensors: list):
        """Sum tensors over all processes, in place."""
        import torch

        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


# ---- The training ----------------------------------------------------------------------------------------


def train(args: Arguments, training: Training, started: float):
    """Load, learn, save: what needs torch. `started`: seconds since the epoch."""
    check_torch()
    models.quiet_libraries()
    import torch
    from accelerate import Accelerator

    from dpo_iteration.models import prepare_cpu

    gpu = torch.cuda.is_available()
    if not gpu:
        say("note: no GPU found, training on the CPU in float32")
        prepare_cpu(args.cpu_threads)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 and gpu else "no")
    accelerator.wait_for_everyone()  # every rank has looked at what is there; now rank 0 may write
    ppo = PPO(args, accelerator)
    begin(ppo, training)
    say(
        f"{len(ppo.prompts)} prompts, {len(ppo.skipped)} skipped; {ppo.rollouts} rollouts of "
        f"{args.rollout_batch_size} × {args.samples_per_prompt} responses, {count(args.ppo_epochs, 'pass')} "
        f"over each in steps of {args.batch_size}; responses end with {sorted(ppo.stops)}"
    )
    log, ready = Log(ppo, training.settings), time.time()
    for number in range(ppo.done + 1, ppo.rollouts + 1):
        begun = time.monotonic()
        rows, seconds = ppo.rollout(number)
        data, figures = ppo.advantages(rows)
        if number == 1:
            ppo.check_start(figures)
        learning = time.monotonic()
        figures |= ppo.learn(rows, data, number)
        if args.kl_target:
            ppo.kl_coef = steer(ppo.kl_coef, figures["kl"], args.kl_target, args.kl_horizon, len(rows))
        ppo.done, now = number, time.monotonic()
        seconds |= {"learn": now - learning, "all": now - begun}
        figures["tokens_per_second"] = figures["response_length"] * len(rows) / seconds["all"]
        log.add(figures, seconds)
        if args.save_steps and number % args.save_steps == 0:
            save(ppo)
    log.close()
    finish(ppo, training, log.entries, {"start": ready - started, "all": time.time() - started})
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


def main():
    started = time.time()
    args = parse(Arguments, __doc__)
    args = with_date(args, args.output_dir)
    check(args)
    check_paths(args)
    check_processes()
    training = Training(args.output_dir, "ppo/train_ppo.py", *shaping(args), args.overwrite)
    if training.is_complete():
        say(f"{args.output_dir} is complete, nothing to do")
        return
    try:
        with training.locked():
            prepare_threads()
            train(args, training, started)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise UserError(
            "the GPU's memory is full: lower micro_batch_size or generation_batch_size, or give "
            "gradient_checkpointing true; four models are held, see the top of --help; checkpoints are kept"
        ) from None


if __name__ == "__main__":
    run(main)
