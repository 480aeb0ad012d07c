r"""Train a policy by PPO, small enough to read: the algorithm in one file, plain data parallel, for one GPU,
a few, or a CPU.

In:  a policy, prompts, and what scores a response: reward models (as annotate_data/get_rewards.py takes them, also with
     another tokenizer than the policy's), a function of your own, or a weighted sum.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`; beside it one line of
figures for
     each rollout (`.log.jsonl`), the prompts left out (`.skipped.jsonl`), and last a manifest
     (`.manifest.json`).

    python ppo/train_ppo.py configs/train_ppo_tiny.yaml
    accelerate launch --num_processes 2 ppo/train_ppo.py configs/train_ppo_tiny.yaml

A rollout, then passes over it, again and again (Ziegler et al. 2019, arXiv 1909.08593; details: arXiv
2403.17031):

    rollout   sample responses; score each; reward of a token = −kl_coef · kl(token), plus the score at the last one
    learn     advantages by GAE; `ppo_epochs` passes in shuffled batches: clipped policy loss, clipped value loss

The four models: the policy, the reference (the policy as it was at the start, frozen), the value model, and
what scores. What was left out for the sake of reading: sharded models, LoRA, a fast engine for sampling.
Every process holds all four and the whole rollout as numbers, so that whitening, GAE and the order of the
responses are the same everywhere; only passes through models are shared out, and gradients added up. That is
for models of up to about a billion parameters. Beside this file: arguments.py (settings), inputs.py
(loading), output.py (checkpoints, log, manifest).

Nothing is found by looking for padding tokens: where a response ends is known by position, so PAD may be EOS.
All that is random in a rollout is drawn from seeds made of `seed` and the rollout's number. With
`--save_steps N` a killed run continues from its last checkpoint when the same command is started again, to
the same weights on a CPU.
"""

import copy
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from annotate_data.get_rewards import combine, make_scorers
from common import chat, models, trackers
from common.cli import UserError, parse, run
from common.devices import check_processes, check_torch, prepare_threads
from common.manifest import with_date
from common.records import sample_seed
from dpo_iteration import saved
from dpo_iteration.output import is_complete, is_main, say
from ppo.arguments import Arguments, arguments, check, check_paths, check_samples, scoring, shaping  # noqa: F401 (arguments: for ppo/run.py)
from ppo.inputs import load, load_critic, read_prompts, scorable_prompts, without_dropout
from ppo.output import Log, begin, finish, lock_output, save

OFF_BY_ROUNDING = {
    "no": 1e-3,
    "bf16": 0.1,
}  # of a log-probability before anything was learned, mean over tokens, by precision
# Mean distance of the first pass's ratio from 1 in bf16: so many times what rounding was seen to do, within
# these limits.
TIMES_ROUNDING, LEAST_ROUNDING, MOST_ROUNDING = 3, 0.02, 0.3


# The mathematics. Tensors are [responses, tokens]; `mask` is 1 at a response's tokens and 0 behind them.


def kl_estimate(log_probs, ref_log_probs, estimator):
    """Each token's KL to the reference, estimated from the token that was sampled
    (joschu.net/blog/kl-approx.html).

    k1 = log π/π_ref is unbiased and may be negative; k2 = k1²/2 is not; k3 = e^(−k1) − 1 + k1 is unbiased and
    never negative.
    """
    k1 = log_probs - ref_log_probs
    return {"k1": lambda: k1, "k2": lambda: k1.square() / 2, "k3": lambda: (-k1).expm1() + k1}[estimator]()


def token_rewards(scores, kl, mask, kl_coef):
    """−kl_coef · kl at every token, plus the response's score at its last one. `scores`: [responses]."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def whiten(values, mask, shift_mean=True):
    """`values` scaled to variance 1 over all tokens of the mask, and moved to mean 0 unless not `shift_mean`;
    0 elsewhere.
    """
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean).square() * mask).sum() / mask.sum()
    white = (values - mean) * variance.clamp(min=1e-8).rsqrt()
    return (white if shift_mean else white + mean) * mask


def gae(values, rewards, mask, gamma, lam):
    """(advantages, returns) by generalised advantage estimation (arXiv 1506.02438), 0 behind a response's
    end.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1},  return_t = A_t + V_t;  V is 0 once the response has ended.
    """
    values, rewards = values * mask, rewards * mask
    advantages, following, next_value = values.new_zeros(values.shape), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t], next_value = following, values[:, t]
    return advantages, advantages + values


def policy_loss(log_probs, old_log_probs, advantages, clip):
    """(loss, ratio π/π_old) of each token: −min(ratio · A, clipped ratio · A) (arXiv 1707.06347)."""
    ratio = (log_probs - old_log_probs).exp()
    return -(ratio * advantages).minimum(ratio.clamp(1 - clip, 1 + clip) * advantages), ratio


def value_loss(values, old_values, returns, clip):
    """Each token's ½ max((V − R)², (V_clipped − R)²), V_clipped being at most `clip` away from the rollout's
    value.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return (values - returns).square().maximum((clipped - returns).square()) / 2


def steer(kl_coef, kl, target, horizon, responses):
    """The next kl_coef: a step up where `kl` (nats per response) is above `target`, down below (arXiv
    1909.08593, §2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


# From token ids to numbers. A row is one response: {"prompt": ids, "response": ids, …}.


def padded(rows, pad, device):
    """What a model is given for `rows`: prompts padded on the left, responses on the right, so that they meet
    in one column.

    Returns:
        (model's inputs, responses [rows, R], mask [rows, R]) with R the longest response.
    """
    import torch

    before, behind = (max(len(row[side]) for row in rows) for side in ("prompt", "response"))
    ids = torch.full((len(rows), before + behind), pad)
    there = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start, end = before - len(row["prompt"]), before + len(row["response"])
        ids[i, start:end], there[i, start:end] = torch.tensor(row["prompt"] + row["response"]), 1
    positions = (there.cumsum(1) - 1).clamp(min=0)
    ids, there, positions = (tensor.to(device) for tensor in (ids, there, positions))
    inputs = {"input_ids": ids, "attention_mask": there, "position_ids": positions, "use_cache": False}
    return inputs, ids[:, before:], there[:, before:].float()


def log_probs_of(policy, inputs, responses, temperature, entropy=False):
    """(log-probabilities of the response's tokens, entropies of the distributions they come from), both
    [rows, R], in fp32.

    Entropies are None unless asked for: they take two more tensors of the vocabulary's size, which here is
    what fills a GPU.
    """
    count = responses.shape[1]
    logits = policy(**inputs, logits_to_keep=count + 1).logits[
        :, -count - 1 : -1
    ]  # a token comes from the one before it
    every = (logits.float() / temperature).log_softmax(-1)
    entropies = -(every.exp() * every).sum(-1) if entropy else None
    return every.gather(-1, responses[..., None])[..., 0], entropies


def values_of(critic, inputs, responses):
    """Values [rows, R] in fp32: what is expected from where each token of the response is about to be
    chosen.
    """
    import torch

    count = responses.shape[1]
    hidden = critic.base_model(**inputs).last_hidden_state[:, -count - 1 : -1]
    with torch.autocast(hidden.device.type, enabled=False):  # bf16 has 8 bits: too few for a sum of rewards
        return critic.score(hidden.float())[..., 0]


class PPO:
    """The four models, and one method for each thing that is done with them."""

    def __init__(self, args, accelerator):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.args, self.accelerator, self.device = args, accelerator, accelerator.device
        self.tokenizer = models.load_tokenizer(
            args.model_name_or_path,
            trust_remote_code=args.trust_remote_code,
            chat_template=args.chat_template,
        )
        self.policy = load(transformers.AutoModelForCausalLM, args.model_name_or_path, args)
        self.prompts, self.skipped = read_prompts(args, self.tokenizer, self.policy)

        # All sampling settings are ours: a model's generation config may hold a top_k, of which training
        # knows nothing.
        self.stops = set(chat.stop_token_ids(self.tokenizer, self.policy.generation_config.eos_token_id))
        self.generation_config = saved.generation_config(
            args.model_name_or_path, self.tokenizer
        )  # goes with the trained model
        self.pad = next(
            t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if t is not None
        )
        self.policy.generation_config = transformers.GenerationConfig(
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=sorted(self.stops),
            pad_token_id=self.pad,
        )

        threads = torch.get_num_threads()
        self.scorers = make_scorers(scoring(args))
        check_samples(args, [type(scorer).__name__ for scorer in self.scorers])
        self.prompts, refused = scorable_prompts(args, self.scorers, self.prompts)
        self.skipped += refused
        for scorer in self.scorers:
            scorer.load()
        torch.set_num_threads(threads)
        self.critic = load_critic(args, self.tokenizer, self.scorers)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        for model in (self.policy, self.reference, self.critic):
            model.to(self.device)
        for model in (self.policy, self.critic):
            without_dropout(model)
            if args.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        rollouts = max(1, int(args.num_episodes * len(self.prompts) / args.rollout_batch_size + 1e-9))
        self.rollouts = min(rollouts, args.max_rollouts or rollouts)
        self.kl_coef, self.done = args.kl_coef, 0  # rollouts
        steps = (
            self.rollouts
            * args.ppo_epochs
            * args.rollout_batch_size
            * args.samples_per_prompt
            // args.batch_size
        )
        warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else int(args.warmup_steps)
        if warmup > steps:
            raise UserError(
                f"--warmup_steps {args.warmup_steps:g} is more than the {steps} optimizer steps of this run"
            )
        self.learners = {}  # name → (model, its optimizer, its schedule)
        for name, model, rate in (
            ("policy", self.policy, args.learning_rate),
            ("critic", self.critic, args.critic_learning_rate),
        ):
            optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=args.weight_decay)
            schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps)
            self.learners[name] = (model, optimizer, schedule)

    # Rollouts

    def rollout(self, number):
        """Rows of rollout `number` (from 1 on), all of them on every process, and the seconds of each
        part.
        """
        args, rows, seconds = self.args, [], {"generate": 0.0, "score": 0.0, "evaluate": 0.0}
        prompts = [
            self.prompts[i]
            for i in self.order((number - 1) * args.rollout_batch_size, args.rollout_batch_size)
        ]
        size = args.generation_batch_size // args.samples_per_prompt
        batches = [
            prompts[i : i + size] for i in range(0, len(prompts), size)
        ]  # the same whatever the number of processes
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
        return [
            row
            for _, new in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
            for row in new
        ], seconds

    def order(self, start, count):
        """Indices of prompts number `start` to `start + count` of the run: each pass over them shuffled
        anew.
        """
        import torch

        found, total = [], len(self.prompts)
        while len(found) < count:
            episode, place = divmod(start + len(found), total)
            shuffled = torch.randperm(
                total,
                generator=torch.Generator().manual_seed(sample_seed(self.args.seed, episode, "prompts")),
            )
            found += shuffled[place : place + count - len(found)].tolist()
        return found

    def generate(self, prompts, seed):
        """`samples_per_prompt` rows for each prompt, with the response up to its first stop token, and its
        text.
        """
        import torch

        many = [
            {"prompt": prompt["ids"], "response": [], "record": prompt}
            for prompt in prompts
            for _ in range(self.args.samples_per_prompt)
        ]
        inputs, *_ = padded(many, self.pad, self.device)
        self.policy.eval()
        torch.manual_seed(seed)
        try:
            with torch.no_grad(), self.accelerator.autocast():
                sampled = self.policy.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                "the policy's probabilities are not finite any more: lower --learning_rate; checkpoints are "
                "kept"
            ) from None
        for row, ids in zip(many, sampled[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((i for i, token in enumerate(ids) if token in self.stops), None)
            row["cut"] = end is None
            row["response"] = ids if end is None else ids[: end + 1]
            row["text"] = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return many

    def score(self, rows):
        """Give each row its score: texts go to the scorers, which have templates and tokenizers of their
        own.
        """
        K, args = self.args.samples_per_prompt, self.args
        groups = [rows[i : i + K] for i in range(0, len(rows), K)]
        asked = []
        for group in groups:
            others = {key: value for key, value in group[0]["record"].items() if key != "ids"}
            ends = ["length" if row["cut"] else "stop" for row in group]
            lengths = [len(row["response"]) for row in group]
            asked.append(
                others
                | {"responses": [row["text"] for row in group], "finish_reasons": ends, "num_tokens": lengths}
            )
        parts = []
        for scorer in self.scorers:
            found = {index: entry["rewards"] for index, entry in scorer.score(asked)}
            parts.append([found[index] for index in range(len(asked))])
        for group, record, *scores in zip(groups, asked, *parts):
            for row, score in zip(group, combine(scores, args.reward_weights or [1.0])):
                if score is None:
                    raise UserError(
                        f"a response to prompt {record['id']} has a score that is not finite: "
                        f"{row['text'][:80]!r}; mend what scores it"
                    )
                row["score"] = score
                del row["record"]

    def evaluate(self, rows):
        """Give each row the log-probabilities of policy and reference and the values, [tokens] each, and the
        mean entropy.

        In bf16 the first rows also get what rounding does to their ratios: the policy's pass is made once
        more with all positions moved on by one, which rotary encodings do not see but for rounding.
        """
        import torch

        from common.shared_prompts import is_rotary

        rounds = self.accelerator.mixed_precision == "bf16" and is_rotary(self.policy)
        for start in range(0, len(rows), self.args.micro_batch_size):
            some = rows[start : start + self.args.micro_batch_size]
            inputs, responses, _ = padded(some, self.pad, self.device)
            with torch.no_grad(), self.accelerator.autocast():
                found, entropies = log_probs_of(
                    self.policy, inputs, responses, self.args.temperature, entropy=True
                )
                ref, _ = log_probs_of(self.reference, inputs, responses, self.args.temperature)
                values = values_of(self.critic, inputs, responses)
                if rounds and start == 0:
                    moved, _ = log_probs_of(
                        self.policy,
                        inputs | {"position_ids": inputs["position_ids"] + 1},
                        responses,
                        self.args.temperature,
                    )
                    for i, row in enumerate(some):
                        n = len(row["response"])
                        row["rounding"] = (moved[i, :n] - found[i, :n]).expm1().abs().cpu()
            for i, row in enumerate(some):
                n = len(row["response"])
                row |= {
                    "log_probs": found[i, :n].cpu(),
                    "ref_log_probs": ref[i, :n].cpu(),
                    "values": values[i, :n].cpu(),
                }
                row["entropy"] = entropies[i, :n].sum().item()

    # Learning

    def advantages(self, rows):
        """Tensors [responses, longest] on the device for `learn`, and the figures that are logged of a
        rollout.
        """
        import torch

        args, stack = (
            self.args,
            lambda key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], True).to(self.device),
        )
        data = {key: stack(key) for key in ("log_probs", "ref_log_probs", "values")}
        lengths = torch.tensor([len(row["response"]) for row in rows], device=self.device)
        mask = data["mask"] = (torch.arange(lengths.max(), device=self.device) < lengths[:, None]).float()
        cut, scores = ([row[key] for row in rows] for key in ("cut", "score"))
        rewarded = [score - args.missing_eos_penalty * without_end for score, without_end in zip(scores, cut)]
        kl = kl_estimate(data["log_probs"], data["ref_log_probs"], args.kl_estimator)
        rewards = token_rewards(torch.tensor(rewarded, device=self.device), kl, mask, self.kl_coef)
        total = rewards.sum() / len(rows)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        data["advantages"], data["returns"] = gae(data["values"], rewards, mask, args.gamma, args.gae_lambda)
        error = ((data["returns"] - data["values"]) * mask)[mask > 0]
        spread = data["returns"][mask > 0].var(correction=0)
        if args.whiten_advantages:
            data["advantages"] = whiten(data["advantages"], mask)
        figures = {
            "reward": sum(scores) / len(rows),
            "reward_less_kl": total.item(),
            "kl": ((data["log_probs"] - data["ref_log_probs"]) * mask).sum().item() / len(rows),
            "entropy": sum(row["entropy"] for row in rows) / lengths.sum().item(),
            "response_length": lengths.float().mean().item(),
            "truncated_fraction": sum(cut) / len(rows),
            "explained_variance": (1 - error.var(correction=0) / spread.clamp(min=1e-12)).item(),
            "kl_coef": self.kl_coef,
        }
        return data, figures

    def learn(self, rows, data, number):
        """`ppo_epochs` passes over the rows; returns the figures, means over tokens and steps."""
        import torch

        args, rank, world = self.args, self.accelerator.process_index, self.accelerator.num_processes
        for model, *_ in self.learners.values():
            model.train()
        figures = []
        for epoch in range(args.ppo_epochs):
            shuffle = torch.Generator().manual_seed(sample_seed(args.seed, number, f"epoch {epoch}"))
            for batch in torch.randperm(len(rows), generator=shuffle).split(args.batch_size):
                tokens = data["mask"][
                    batch
                ].sum()  # of all processes: the loss is one mean over the step's tokens
                sums = torch.zeros(6, device=self.device)
                for some in batch[rank::world].split(args.micro_batch_size):
                    sums += self.backward(
                        [rows[i] for i in some], {key: value[some] for key, value in data.items()}, tokens
                    )
                self.add_up(
                    [
                        sums,
                        *(
                            p.grad
                            for model, *_ in self.learners.values()
                            for p in model.parameters()
                            if p.grad is not None
                        ),
                    ]
                )
                names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio", "ratio_distance")
                figure = dict(zip(names, (sums / tokens).tolist()))
                distance = figure.pop("ratio_distance")
                if not figures:
                    self.check_ratio(distance, rows, number)
                for name, (model, optimizer, schedule) in self.learners.items():
                    norm = torch.nn.utils.clip_grad_norm_(
                        model.parameters(), args.max_grad_norm or math.inf
                    ).item()
                    if not math.isfinite(norm) or not math.isfinite(
                        figure[f"{'value' if name == 'critic' else name}_loss"]
                    ):
                        raise UserError(
                            f"loss or gradient of the {name} is not finite in rollout {number}, before it "
                            "could reach the weights; "
                            "lower the learning rates or look at the scores; what is on disk is kept"
                        )
                    figure[f"{name}_grad_norm"], figure[f"{name}_learning_rate"] = (
                        norm,
                        schedule.get_last_lr()[0],
                    )
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                figures.append(figure)
        return {key: sum(figure[key] for figure in figures) / len(figures) for key in figures[0]}

    def backward(self, rows, data, tokens):
        """Add the gradients of some rows of an optimizer step of `tokens` tokens; returns sums over the rows'
        tokens.
        """
        import torch

        inputs, responses, mask = padded(rows, self.pad, self.device)
        old = {key: value[:, : responses.shape[1]] for key, value in data.items()}
        with self.accelerator.autocast():
            log_probs, _ = log_probs_of(self.policy, inputs, responses, self.args.temperature)
            values = values_of(self.critic, inputs, responses)
        losses, ratio = policy_loss(log_probs, old["log_probs"], old["advantages"], self.args.clip)
        value_losses = value_loss(values, old["values"], old["returns"], self.args.value_clip)
        (((losses + self.args.value_coef * value_losses) * mask).sum() / tokens).backward()
        with torch.no_grad():
            clipped = ((ratio - 1).abs() > self.args.clip).float()
            parts = (losses, value_losses, clipped, ratio - 1 - ratio.log(), ratio, (ratio - 1).abs())
            return torch.stack([(part * mask).sum() for part in parts])

    def check_ratio(self, distance, rows, number):
        """Stop where the first step of a rollout, before which nothing was learned, sees other
        log-probabilities than the rollout.
        """
        import torch

        limit = OFF_BY_ROUNDING["no"]
        if self.accelerator.mixed_precision == "bf16":
            seen = [row["rounding"] for row in rows if "rounding" in row]
            limit = (
                min(max(TIMES_ROUNDING * torch.cat(seen).mean().item(), LEAST_ROUNDING), MOST_ROUNDING)
                if seen
                else MOST_ROUNDING
            )
        if not distance < limit:
            raise UserError(
                f"rollout {number}: the probability ratio of the first step is off 1 by {distance:.2g} in "
                "the mean, "
                f"more than rounding ({limit:.2g}): "
                "passes of the same weights differ. Look for dropout or noise in the model, and at its "
                "attention "
                "(--attn_implementation eager)"
            )

    def check_start(self, figures):
        """What must hold before anything was learned."""
        if (
            abs(figures["kl"])
            > figures["response_length"] * OFF_BY_ROUNDING[self.accelerator.mixed_precision]
        ):
            raise UserError(
                f"the policy is {figures['kl']:.3g} nats off the reference before anything was learned, and "
                "both are the same model: "
                "look for dropout or noise in the model, and at its attention (--attn_implementation eager)"
            )

    # Processes and files

    def gather(self, value):
        """The values of all processes, on every process."""
        from accelerate.utils import gather_object

        return gather_object([value]) if self.accelerator.num_processes > 1 else [value]

    def add_up(self, tensors):
        """Sum tensors over all processes, in place."""
        import torch

        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


def train(args, settings, inputs, started):
    """Load, learn, save: what needs torch."""
    check_torch()
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
    begin(ppo, settings, inputs)
    say(
        f"{len(ppo.prompts)} prompts, {len(ppo.skipped)} skipped; {ppo.rollouts} rollouts of "
        f"{args.rollout_batch_size} × {args.samples_per_prompt} "
        f"responses, {args.ppo_epochs} passes over each in steps of {args.batch_size}; responses end with "
        f"{sorted(ppo.stops)}"
    )
    log, ready = Log(ppo, settings, trackers.chosen(args.report_to)), time.time()
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
    finish(ppo, log.entries, ready - started, started)
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


def main():
    started = time.time()
    args = parse(Arguments, __doc__)
    args = with_date(args, args.output_dir)
    check(args)
    check_paths(args)
    check_processes()
    settings, inputs = shaping(args)
    if is_complete(args, settings, inputs):
        say(f"{args.output_dir} is complete, nothing to do")
        return
    lock = lock_output(args) if is_main() else None
    prepare_threads()
    try:
        train(args, settings, inputs, started)
        if lock:
            os.unlink(lock.name)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise UserError(
            "the GPU's memory is full: lower --micro_batch_size or --generation_batch_size, or give "
            "--gradient_checkpointing true; "
            "four models are held, see the top of --help; checkpoints are kept"
        ) from None
    finally:
        if lock:
            lock.close()


if __name__ == "__main__":
    run(main)
