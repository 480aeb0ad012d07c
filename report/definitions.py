"""What each figure of the page means: key → (name, definition).

The page shows them as notes and as hints of its headings.
"""

DEFINITIONS = {
    "iterate": (
        "iterate",
        "Iterate i is the policy that iteration i left; iterate 0 is the one the run started from.",
    ),
    "sampled": (
        "sampled, greedy",
        "Sampled: K answers a prompt at the run's temperature. Greedy: one answer, the most likely token "
        "each time.",
    ),
    "reward": (
        "reward",
        "Mean held-out reward by the reward model that training used: a prompt's answers are averaged first, "
        "then the prompts. "
        "The scale is the reward model's own.",
    ),
    "gold": (
        "gold",
        "Mean of the task's own score of the held-out answers, computed by a program (gold_function) that "
        "the reward model never sees.",
    ),
    "judge": (
        "second judge",
        "Mean held-out reward by a second reward model (eval_reward_model) that training never used.",
    ),
    "interval": (
        "95% interval",
        "Percentile bootstrap over prompts (10,000 resamples, fewer from 2,000 prompts on). Differences are "
        "paired: both "
        "policies answer the same prompts. One run tells nothing about another seed: the interval covers the "
        "choice of prompts only.",
    ),
    "reward_win": (
        "win rate",
        "Share of comparisons in which the newer policy's answer has the larger reward, ties counting half. "
        "Sampled: each of "
        "its K answers against each of the other's K to the same prompt, averaged over prompts. Greedy: one "
        "comparison a prompt.",
    ),
    "gold_win": ("win rate by gold", "As the win rate, by gold instead of reward."),
    "judge_win": ("win rate by the second judge", "As the win rate, by the second judge."),
    "lc_win": (
        "win rate at equal length",
        "What a logistic regression says the win rate by reward would be if both answers were equally long, "
        "in the "
        "manner of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): P(win) = σ(θ + "
        "φ·tanh(Δ/s)), Δ the difference in tokens, s "
        "its standard deviation; the rate is σ(θ), with an interval of ±1.96 standard errors clustered by "
        "prompt. The paper's term for an "
        "instruction's difficulty needs many models and is left out. Not given where fewer than a twentieth "
        "of the comparisons lie on one side of "
        "equal length: it would be an extrapolation.",
    ),
    "counts": (
        "won, tied, lost",
        "Prompts whose greedy answer has a larger, the same, or a smaller reward than the other policy's.",
    ),
    "best_of": (
        "best of k",
        "Expected reward of the best of k answers, by the unbiased estimator over all subsets of the K there "
        "are, averaged over "
        "prompts. Gold of the best of k: of the answer with the largest reward of the k. Where it falls with "
        "k, the reward misleads.",
    ),
    "kl": (
        "KL to the reference",
        "Kullback-Leibler divergence of the iterate from the reference policy, nats per response, estimated "
        "from its own "
        "sampled answers and averaged over prompts; ± is one standard error. In a PPO run without "
        "divergence.json: of PPO's last rollout.",
    ),
    "kl_per_token": ("KL per token", "The same, divided by the tokens of the responses."),
    "length": (
        "length",
        "Mean tokens of a response, the end of turn included where the generator counts it.",
    ),
    "length_p90": ("length, 90th percentile", "Nine of ten responses are no longer than this, in tokens."),
    "length_correlation": (
        "reward and length",
        "Pearson correlation of reward and length in tokens, both less their mean over the prompt's answers.",
    ),
    "by_length": (
        "reward by length",
        "Mean reward of the sampled held-out answers within bins of length. The edges are the eighths of all "
        "iterates' lengths together; a bin with fewer than five answers is left out. Lines that lie on each "
        "other: the gain is length alone.",
    ),
    "truncated": (
        "cut off",
        "Share of the responses that hit the limit of new tokens (finish reason length).",
    ),
    "empty": (
        "empty",
        "Share of the responses without any text: the policy ended its turn at once. They are never chosen, "
        "but may be rejected.",
    ),
    "repetition": (
        "repeated",
        "Mean share of a response's 4-grams that stood in it before (seq-rep-4, Welleck et al. 2019, arXiv "
        "1908.04319), on the "
        "responses to up to 500 prompts of a seeded sample.",
    ),
    "looping": ("looping", "Share of these responses in which at least half of the 4-grams are repeated."),
    "distinct": (
        "distinct n-grams",
        "Different n-grams over all n-grams of the sampled held-out answers to the same up to 500 prompts "
        "(Li et al. 2016, "
        "arXiv 1510.03055). An n-gram is of words and signs. It falls with the amount of text: compare "
        "iterates, not runs.",
    ),
    "different_texts": (
        "different answers",
        "Mean share of different texts among the K answers to a prompt.",
    ),
    "tied": (
        "ties",
        "Share of the pairs of different answers to one prompt that have exactly the same reward.",
    ),
    "spread": ("spread", "Mean over prompts of the standard deviation of a prompt's K rewards."),
    "all_equal": ("all equal", "Share of prompts whose rewards are all the same."),
    "at_top": ("at the largest", "Share of rewards that equal the largest of the file."),
    "null_share": ("null", "Share of responses without a reward."),
    "histogram": (
        "histogram of rewards",
        "Rewards of all responses that the iteration trained on, sampled from the previous iterate: share in "
        "40 equal "
        "bins from the smallest to the largest reward of all iterations shown.",
    ),
    "pairs": ("pairs", "Pairs trained on, and those held out from training."),
    "margin": (
        "reward margin",
        "Mean reward of chosen less that of rejected, over the pairs of the iteration.",
    ),
    "chosen_longer": (
        "chosen longer by",
        "Mean tokens of chosen less those of rejected. Well above 0: the pairs teach length.",
    ),
    "loss": (
        "loss",
        "The training loss at the last log entry; in the chart, over optimizer steps of all iterations.",
    ),
    "accuracy": (
        "accuracy",
        "Share of pairs whose implicit reward, beta times the log-ratio of policy to reference, is larger "
        "for chosen than for "
        "rejected; last log entry of training.",
    ),
    "eval_accuracy": ("held-out accuracy", "The same on the pairs held out from training. 0.5 is chance."),
    "margins": (
        "implicit margin",
        "Implicit reward of chosen less that of rejected, mean over the pairs since the entry before.",
    ),
    "grad_norm": ("gradient norm", "Norm of the gradient before clipping, at the log entry."),
    "learning_rate": ("learning rate", "At the log entry."),
    "ppo_log": (
        "PPO's log",
        "One point a rollout: mean reward of its responses, their KL to the reference (nats per response), "
        "length in tokens, "
        "entropy (nats per token), share clipped, losses of policy and critic, and the variance of returns "
        "that the critic explains.",
    ),
    "step": (
        "step",
        "What is done with a policy, in turn: sample (its held-out answers and the responses that the next "
        "policy is trained on), annotate both, measure, train the next policy.",
    ),
    "seconds": (
        "seconds",
        "Wall clock of a finished step as the driver measured it, summed over its starts. A step that was "
        "killed left no time: what it spent is not in the sum.",
    ),
    "work": (
        "working",
        "Seconds in which responses were sampled, scored or measured (by their manifests; of shards side by "
        "side the longest) or optimizer and evaluation steps were made (the trainer's run times; PPO: its "
        "rollouts).",
    ),
    "waiting": (
        "waiting",
        "Share of a step's seconds that was not working: starting Python and engines, loading models, the "
        "reference's pass, merging, saving. It does not see a GPU that idles within those working seconds.",
    ),
    "tokens_per_second": (
        "tokens/s",
        "Sampling: tokens sampled a second of working time. Training: tokens passed through the model a "
        "second of the trainer's time; PPO: tokens sampled a second of a rollout, learning included.",
    ),
    "gpu_hours": (
        "GPU-hours",
        "GPUs that the step held (processes, times tensor_parallel_size) times its seconds, busy or not; 0 "
        "on the CPU.",
    ),
    "sample_margin": (
        "margin, in the samples",
        "Training: reward of chosen less that of rejected. Held-out: reward of the last answer shown less "
        "that of "
        "the first, of greedy answers where there are, else of the means.",
    ),
}
