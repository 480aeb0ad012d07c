"""Hand-made runs for the tests of the report: seconds to write, with trouble planted where asked.

No model.
"""

import json
import random
from pathlib import Path

WORDS = [
    a + b
    for a in "ba ce di fo gu la me ni po ru sa te vi xo zu".split()
    for b in "lan mer kos tin dar wep sul".split()
]
GOLD = (
    'def gold_score(messages, response):\n    return float(response.rsplit("gold=", 1)[1].split()[0]) if '
    '"gold=" in response else 0.0\n'
)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def answer(rng, words, gold):
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f" gold={gold:.4f} end"


def rewarded(
    path, tag, prompts=60, K=4, shift=0.0, gold=0.0, words=30, seed=0, reward_of_length=0.0, **trouble
):
    """A rewarded file; prompts are hard or easy alike for every seed. Returns its records.

    Args:
        shift, gold: means of reward and of gold. words: mean length. reward_of_length: reward of a word above
            30.
        trouble: `ties` (rewards rounded to whole tens), `same` (all texts of a prompt alike), `cut` (share
            cut off),
            `saturated` (rewards are 0 or 1, mostly 1), `loops` (one word again and again).
    """
    rng, rows = random.Random(f"{path.parent.name}/{path.name} {seed}"), []  # whatever folder the test has
    for n in range(prompts):
        hard, texts, rewards, sizes, reasons = random.Random(f"{tag} {n}").gauss(0, 1), [], [], [], []
        for _ in range(K):
            size = max(8, round(rng.gauss(words, words / 5)))
            texts.append(
                texts[0]
                if trouble.get("same") and texts
                else "so " * size + "gold=0.5 end"
                if trouble.get("loops")
                else answer(rng, size, gold + hard / 10 + rng.gauss(0, 0.1))
            )
            reward = (
                hard + shift + reward_of_length * (size - 30) + rng.gauss(0, 0.05 if reward_of_length else 1)
            )
            reward = (
                float(round(reward / 10) * 10)
                if trouble.get("ties")
                else float(rng.random() < 0.9)
                if trouble.get("saturated")
                else reward
            )
            rewards.append(round(reward, 6))
            sizes.append(size + 2)
            reasons.append("length" if rng.random() < trouble.get("cut", 0) else "stop")
        rows.append(
            {
                "id": f"{tag}{n:04d}",
                "prompt": [{"role": "user", "content": f"question {n} of {tag}"}],
                "responses": texts,
                "rewards": rewards,
                "num_tokens": sizes,
                "finish_reasons": reasons,
            }
        )
    write(path, rows)
    return rows


def history(steps=20, accuracy=0.8):
    entries = [
        {
            "step": s,
            "loss": 0.69 - s / 100,
            "rewards/accuracies": 0.5 + s / 50,
            "rewards/margins": s / 40,
            "grad_norm": 1.0,
            "learning_rate": 1e-4 * (1 - s / steps),
        }
        for s in range(1, steps + 1)
    ]
    return [
        *entries,
        {"step": steps, "eval_loss": 0.6, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": 0.4},
    ]


def make_run(
    folder,
    iterations=2,
    upto=None,
    kind="dpo",
    plan=None,
    training=None,
    settings=None,
    judge=None,
    kl=None,
    accuracy=0.8,
    prompts=60,
):
    """A run's folder.

    Args:
        upto: the last iterate that has been evaluated; None: all. plan: function i → arguments of `rewarded`
            of iterate i's
            held-out answers (None: a healthy run). training: function i → those of iteration i's training
            responses.
        judge: function i → the second judge's shift. kl: function i → nats per response.
    """
    folder, upto = Path(folder), iterations if upto is None else upto
    plan = plan or (lambda i: {"shift": 0.6 * i, "gold": 0.4 + 0.08 * i})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gold.py").write_text(GOLD)
    values = {
        "run_dir": str(folder),
        "seed": 0,
        "model_name_or_path": "tiny",
        "heldout_prompts": "heldout.jsonl",
        "prompts": ["a.jsonl"],
        "gold_function": f"{folder}/gold.py:gold_score",
        "generation": {"K": 4, "temperature": 1.0},
    }
    values |= {"backend": "small", "ppo": {"kl_coef": 0.05}} if kind == "ppo" else {"iterations": iterations}
    (folder / "loop.yaml").write_text(json.dumps(values | (settings or {})))
    stages = []
    for i in range(upto + 1):
        own = folder / f"iter{i}"
        (own / "logs").mkdir(parents=True, exist_ok=True)
        if i:
            versions = {"python": "3.11.7", "torch": "2.13.0+cpu"}
            manifest = {
                "complete": True,
                "settings": {},
                "inputs": {},
                "versions": versions,
                "num_processes": 1,
                "seconds": {"all": 12.0},
            }
            if kind == "dpo":
                rows = rewarded(
                    own / "rewarded.jsonl", f"t{i}", prompts=prompts, **((training or plan)(i - 1))
                )
                pairs = []
                for row in rows:
                    best, worst = (row["rewards"].index(f(row["rewards"])) for f in (max, min))
                    if best != worst:
                        pairs.append(
                            {
                                "id": row["id"],
                                "chosen_index": best,
                                "rejected_index": worst,
                                "split": "train",
                                "chosen_num_tokens": row["num_tokens"][best],
                                "rejected_num_tokens": row["num_tokens"][worst],
                                "margin": row["rewards"][best] - row["rewards"][worst],
                                "source": str(own / "rewarded.jsonl"),
                            }
                        )
                write(own / "pairs.jsonl", pairs)
                write_json(own / "model.trainer_state.json", {"log_history": history(accuracy=accuracy)})
                manifest |= {
                    "metrics": {
                        "train_runtime": 6.0,
                        "num_tokens": 6000,
                        "loss": 0.5,
                        "rewards/accuracies": 0.9,
                        "eval_rewards/accuracies": accuracy,
                    },
                    "counts": {"train_pairs": 50, "eval_pairs": 10},
                }
            else:
                write(
                    own / "model.log.jsonl",
                    [
                        {
                            "step": s,
                            "reward": s / 10,
                            "kl": s / 5,
                            "entropy": 1.0 - s / 40,
                            "response_length": 30.0 + s / 10,
                            "truncated_fraction": 0.0,
                            "policy_loss": -0.01,
                            "value_loss": 1 / s,
                            "clip_fraction": 0.1,
                            "explained_variance": 0.5,
                            "kl_coef": 0.05,
                            "tokens_per_second": 900.0,
                            "seconds": {"all": 0.5, "learn": 0.2},
                        }
                        for s in range(1, 21)
                    ],
                )
            write_json(own / "model.manifest.json", manifest)
            stages.append(
                {"iteration": i, "stage": "train", "seconds": 12, "finished": f"2026-01-01T00:0{i}:00+0000"}
            )
        for kind_of, K in (("sampled", 4), ("greedy", 1)):
            path = own / f"heldout_{kind_of}.rewarded.jsonl"
            rows = rewarded(path, "h", prompts=prompts, K=K, **plan(i))
            if judge:
                rng = random.Random(f"judge {i} {kind_of}")
                judged = [
                    row
                    | {
                        "rewards": [
                            random.Random(row["id"]).gauss(0, 1) + judge(i) + rng.gauss(0, 1)
                            for _ in row["rewards"]
                        ]
                    }
                    for row in rows
                ]
                write(own / f"heldout_{kind_of}.judged.jsonl", judged)
        if kl:
            write_json(
                own / "divergence.json",
                {"kl": kl(i), "kl_se": 0.1, "kl_per_token": kl(i) / 32, "estimator": "k1"},
            )
        write_json(
            own / "metrics.json",
            {
                "gold_function": values["gold_function"],
                "seconds": 30.0,
                "files": {
                    "sampled": "heldout_sampled.rewarded.jsonl",
                    "greedy": "heldout_greedy.rewarded.jsonl",
                },
            },
        )
        for kind_of, sampled, scored in (("sampled", 6.0, 4.0), ("greedy", 4.0, 1.0)):
            write_json(
                own / f"heldout_{kind_of}.generated.manifest.json",
                {"complete": True, "counts": {"engine_seconds": sampled}},
            )
            write_json(
                own / f"heldout_{kind_of}.rewarded.manifest.json",
                {"complete": True, "counts": {"scoring_seconds": scored}},
            )
        stages.append(
            {"iteration": i, "stage": "evaluate", "seconds": 30, "finished": f"2026-01-01T00:0{i}:30+0000"}
        )
    write(folder / "stages.jsonl", stages)
    return folder


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
