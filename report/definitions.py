"""What each figure of the page is called and means, and how it is written; tables, charts, notes and hints
take it from here.
"""

from typing import NamedTuple


class Figure(NamedTuple):
    """`shape`: how a number is written, see `page.SHAPES`."""

    name: str
    meaning: str
    shape: str = "number"


DEFINITIONS = {
    "iterate": Figure(
        "iterate", "Iterate i is the policy that iteration i left; iterate 0 is the one the run started from."
    ),
    "sampled": Figure(
        "sampled, greedy",
        "Sampled: K answers a prompt at the run's temperature. Greedy: one answer, the most likely token "
        "each time.",
    ),
    "reward": Figure(
        "reward",
        "Mean held-out reward by the reward model that training used: a prompt's answers are averaged first, "
        "then the prompts. The scale is the reward model's own.",
    ),
    "gold": Figure(
        "gold",
        "Mean of the task's own score of the held-out answers, computed by a program (gold_function) that "
        "the reward model never sees.",
    ),
    "judge": Figure(
        "second judge",
        "Mean held-out reward by a second reward model (eval_reward_model) that training never used.",
    ),
    "interval": Figure(
        "95% interval",
        "Percentile bootstrap over prompts (10,000 resamples, fewer from 2,000 prompts on). Differences are "
        "paired: both policies answer the same prompts. The interval covers the choice of prompts only: one "
        "run tells nothing about another seed.",
    ),
    "reward_win": Figure(
        "win rate",
        "Share of comparisons in which the newer policy's answer has the larger reward, ties counting half. "
        "Sampled: each of its K answers against each of the other's K to the same prompt, averaged over "
        "prompts. Greedy: one comparison a prompt.",
        "share",
    ),
    "gold_win": Figure("win rate by gold", "As the win rate, by gold instead of reward.", "share"),
    "judge_win": Figure("win rate by judge", "As the win rate, by the second judge.", "share"),
    "lc_win": Figure(
        "win rate at equal length",
        "What a logistic regression says the win rate by reward would be if both answers were equally long, "
        "in the manner of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): P(win) = σ(θ "
        "+ φ·tanh(Δ/s)), Δ the difference in tokens, s its standard deviation; the rate is σ(θ), with an "
        "interval of ±1.96 standard errors clustered by prompt. The paper's term for an instruction's "
        "difficulty needs many models and is left out. Not given where fewer than a twentieth of the "
        "comparisons lie on one side of equal length: it would be an extrapolation.",
        "share",
    ),
    "counts": Figure(
        "won/tied/lost",
        "Prompts whose greedy answer has a larger, the same, or a smaller reward than the other policy's.",
    ),
    "best_of": Figure(
        "best of k",
        "Expected reward of the best of k answers, by the unbiased estimator over all subsets of the K there "
        "are, averaged over prompts. Gold of the best of k: of the answer with the largest reward of the k. "
        "Where it falls with k, the reward misleads.",
    ),
    "kl": Figure(
        "KL to the reference",
        "Kullback-Leibler divergence of the iterate from the reference policy, nats per response, estimated "
        "from its own sampled answers and averaged over prompts; ± is one standard error. In a PPO run "
        "without divergence.json: of PPO's last rollout.",
    ),
    "kl_per_token": Figure("KL per token", "The same, divided by the tokens of the responses."),
    "length": Figure(
        "length",
        "Mean tokens of a response, the end of turn included where the generator counts it.",
        "tokens",
    ),
    "length_p90": Figure("90th percentile", "Nine of ten responses are no longer than this.", "tokens"),
    "length_correlation": Figure(
        "reward and length",
        "Pearson correlation of reward and length in tokens, both less their mean over the prompt's answers.",
    ),
    "by_length": Figure(
        "reward by length",
        "Mean reward of the sampled held-out answers within bins of length. The edges are the eighths of all "
        "iterates' lengths together; a bin with fewer than five answers is left out. Lines that lie on each "
        "other: the gain is length alone.",
    ),
    "truncated": Figure(
        "cut off", "Share of the responses that hit the limit of new tokens (finish reason length).", "share"
    ),
    "empty": Figure(
        "empty",
        "Share of the responses without any text: the policy ended its turn at once. They are never chosen, "
        "but may be rejected.",
        "share",
    ),
    "repetition": Figure(
        "repeated",
        "Mean share of a response's 4-grams that stood in it before (seq-rep-4, Welleck et al. 2019, arXiv "
        "1908.04319), on the responses to up to 500 prompts of a seeded sample.",
        "share",
    ),
    "looping": Figure(
        "looping", "Share of these responses in which at least half of the 4-grams are repeated.", "share"
    ),
    "distinct": Figure(
        "distinct n-grams",
        "Different n-grams over all n-grams of the sampled held-out answers to the same up to 500 prompts "
        "(Li et al. 2016, arXiv 1510.03055). An n-gram is of words and signs. It falls with the amount of "
        "text: compare iterates, not runs.",
        "fine",
    ),
    "different_texts": Figure(
        "different answers", "Mean share of different texts among the K answers to a prompt.", "share"
    ),
    "tied": Figure(
        "ties",
        "Share of the pairs of different answers to one prompt that have exactly the same reward.",
        "share",
    ),
    "spread": Figure("spread", "Mean over prompts of the standard deviation of a prompt's K rewards."),
    "all_equal": Figure("all equal", "Share of prompts whose rewards are all the same.", "share"),
    "at_top": Figure("at the largest", "Share of rewards that equal the largest of the file.", "share"),
    "null_share": Figure("null", "Share of responses without a reward.", "share"),
    "histogram": Figure(
        "histogram of rewards",
        "Rewards of all responses that the iteration trained on, sampled from the previous iterate and "
        "what else its mixture names: share in 40 equal bins from the smallest to the largest reward of all "
        "iterations shown.",
    ),
    "pairs": Figure("pairs", "Pairs trained on, and those held out from training.", "count"),
    "margin": Figure(
        "margin of pairs",
        "Mean reward of chosen less that of rejected, over the pairs of the iteration; of training on chosen "
        "responses alone, less that of the prompt's worst.",
    ),
    "chosen_longer": Figure(
        "chosen longer by",
        "Mean tokens of chosen less those of rejected. Well above 0: the pairs teach length.",
        "tokens",
    ),
    "loss": Figure(
        "loss",
        "The training loss at the last log entry; in the chart, over optimizer steps of all iterations.",
        "fine",
    ),
    "accuracy": Figure(
        "accuracy",
        "Share of pairs whose implicit reward, beta times the log-ratio of policy to reference, is larger "
        "for chosen than for rejected; last log entry of training.",
        "share",
    ),
    "eval_accuracy": Figure(
        "held-out accuracy", "The same on the pairs held out from training. 0.5 is chance.", "share"
    ),
    "margins": Figure(
        "implicit margin",
        "Implicit reward of chosen less that of rejected, mean over the pairs since the entry before.",
    ),
    "grad_norm": Figure("gradient norm", "Norm of the gradient before clipping, at the log entry.", "fine"),
    "learning_rate": Figure("learning rate", "At the log entry."),
    "ppo_log": Figure(
        "PPO's log",
        "One point a rollout: mean reward of its responses, their KL to the reference (nats per response; "
        "OpenRLHF's is a mean over tokens), length in tokens, entropy (nats per token), share clipped, "
        "losses of policy and critic, the variance of returns that the critic explains, and how far the "
        "engine that sampled is off the trainer with the same weights (nats per token).",
    ),
    "rounds_log": Figure(
        "rounds of online training",
        "One point a round (online/rounds.jsonl): rewards and length of the answers that it trained on, "
        "their KL to the start (dpo_iteration/rounds_kl.py), implicit margin of the pairs, "
        "prompts whose answers all had one reward, how many rounds the weights that sampled were behind, the "
        "share of the round in which the trainer waited for answers, and that in which the servers sampled "
        "none.",
    ),
    "step": Figure(
        "step",
        "What is done with a policy, in turn: sample (its held-out answers and the responses that the next "
        "policy is trained on), annotate both, measure, train the next policy.",
    ),
    "seconds": Figure(
        "seconds",
        "Wall clock of a finished step as the driver measured it, summed over its starts. A step that was "
        "killed left no time: what it spent is not in the sum.",
        "count",
    ),
    "work": Figure(
        "working",
        "Seconds in which responses were sampled, scored or measured (by their manifests; of shards side by "
        "side the longest) or optimizer and evaluation steps were made (the trainer's run times; PPO: its "
        "rollouts).",
        "count",
    ),
    "waiting": Figure(
        "waiting",
        "Share of a step's seconds that was not working: starting Python and engines, loading models, the "
        "reference's pass, merging, saving. It does not see a GPU that idles within those working seconds.",
        "share",
    ),
    "tokens_per_second": Figure(
        "tokens/s",
        "Sampling: tokens sampled a second of working time. Training: tokens passed through the model a "
        "second of the trainer's time; PPO: tokens sampled a second of a rollout, learning included.",
        "count",
    ),
    "mfu": Figure(
        "of the GPUs' peak",
        "Model FLOPs utilisation: 6 operations for each token and weight (4 with LoRA; attention and what is "
        "computed again aside), over the trainer's time and the peak in bf16 of the GPUs there were.",
        "share",
    ),
    "gpus": Figure("GPUs", "GPUs that the step held: processes, times tensor_parallel_size."),
    "gpu_hours": Figure("GPU-hours", "GPUs that the step held times its seconds, busy or not; 0 on the CPU."),
    "sample_margin": Figure(
        "margin, in the samples",
        "Training: reward of chosen less that of rejected. Held-out: reward of the last answer shown less "
        "that of the first, of greedy answers where there are, else of the means.",
    ),
}
