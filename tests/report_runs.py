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
    noise = 0.05 if reward_of_length else 1
    for n in range(prompts):
        hard, texts, rewards, sizes, reasons = random.Random(f"{tag} {n}").gauss(0, 1), [], [], [], []
        for _ in range(K):
            size = max(8, round(rng.gauss(words, words / 5)))
            text = answer(rng, size, gold + hard / 10 + rng.gauss(0, 0.1))
            if trouble.get("loops"):
                text = "so " * size + "gold=0.5 end"
            texts.append(texts[0] if trouble.get("same") and texts else text)
            reward = hard + shift + reward_of_length * (size - 30) + rng.gauss(0, noise)
            if trouble.get("ties"):
                reward = float(round(reward / 10) * 10)
            if trouble.get("saturated"):
                reward = float(rng.random() < 0.9)
            rewards.append(round(reward, 6))
            sizes.append(size + 2)
            reasons.append("length" if rng.random() < trouble.get("cut", 0) else "stop")
        row = {"id": f"{tag}{n:04d}", "prompt": [{"role": "user", "content": f"question {n} of {tag}"}]}
        row |= {"responses": texts, "rewards": rewards, "num_tokens": sizes, "finish_reasons": reasons}
        rows.append(row)
    write(path, rows)
    return rows


def history(steps=20, accuracy=0.8):
    entries = []
    for s in range(1, steps + 1):
        entries.append(
            {"step": s, "loss": 0.69 - s / 100, "grad_norm": 1.0, "learning_rate": 1e-4 * (1 - s / steps)}
        )
        entries[-1] |= {"rewards/accuracies": 0.5 + s / 50, "rewards/margins": s / 40}
    held = {"loss": 0.6, "rewards/accuracies": accuracy, "rewards/margins": 0.4}
    return [*entries, {"step": steps} | {f"eval_{key}": value for key, value in held.items()}]


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
    evaluated=True,
):
    """A run's folder.

    Args:
        upto: the last policy there is; None: all. plan: function i → arguments of `rewarded` of policy i's
            held-out answers (None: a healthy run). training: function i → those of the responses of policy i.
        settings: of loop.yaml, in place of the run's own. judge: function i → the second judge's shift.
        kl: function i → nats per response. evaluated: whether there are held-out answers.
    """
    folder, upto = Path(folder), iterations if upto is None else upto
    plan = plan or (lambda i: {"shift": 0.6 * i, "gold": 0.4 + 0.08 * i})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gold.py").write_text(GOLD)
    values = settings_of(folder, iterations, kind) | ({} if evaluated else {"heldout_prompts": None})
    (folder / "loop.yaml").write_text(json.dumps(values | (settings or {})))
    for i in range(upto + 1):
        (folder / f"iter{i}" / "logs").mkdir(parents=True, exist_ok=True)
        if i and kind == "dpo":
            dpo_iteration(folder, i, (training or plan)(i - 1), prompts, accuracy)
        elif i:
            ppo_iteration(folder, i)
        if evaluated:
            heldout(folder, i, plan(i), prompts, judge, values["gold_function"])
        if kl:
            estimates = {"kl": kl(i), "kl_se": 0.1, "kl_per_token": kl(i) / 32, "estimator": "k1"}
            write_json(folder / f"iter{i}/divergence.json", estimates)
    steps = [(i, step) for i in range(upto + 1) for step in steps_of(i, upto, kind, evaluated)]
    finished = [f"2026-01-01T00:{n:02}:00+0000" for n in range(len(steps))]
    lines = [
        {"policy": i, "step": step, "seconds": SECONDS[step], "finished": time}
        for (i, step), time in zip(steps, finished, strict=True)
    ]
    write(folder / "stages.jsonl", lines)
    return folder


SECONDS = {"sample": 20, "annotate": 8, "measure": 2, "train": 12}  # of each policy


def steps_of(i, upto, kind, evaluated):
    """Steps of policy i in a run whose last policy is `upto`."""
    sampled = evaluated or (kind == "dpo" and i < upto)
    wanted = {"sample": sampled, "annotate": sampled, "measure": evaluated, "train": i < upto}
    return [step for step in SECONDS if wanted[step]]


def settings_of(folder, iterations, kind):
    """What loop.yaml holds: every setting, resolved; with a part of the sections' keys."""
    generation = {"K": 4, "temperature": 1.0, "tensor_parallel_size": 1}
    values = {
        "run_dir": str(folder),
        "seed": 0,
        "model_name_or_path": "tiny",
        "reward_name_or_path": ["judge"],
    }
    values |= {"heldout_prompts": "heldout.jsonl", "prompts": ["a.jsonl"], "eval_reward_model": None}
    values |= {"gold_function": f"{folder}/gold.py:gold_score", "generation": generation}
    values |= {"heldout": generation, "annotation": {"batch_tokens": None}, "eval_annotation": {}}
    if kind == "ppo":
        ppo = {
            "kl_coef": 0.05,
            "advantage_estimator": "gae",
            "learning_rate": 1e-5,
            "samples_per_prompt": 2,
            "num_episodes": 1,
        }
        return values | {"backend": "small", "ppo": ppo}
    training = {"beta": 0.1, "learning_rate": 3e-4, "loss_type": ["sigmoid"], "choose_type": "max_min"}
    return values | {"iterations": iterations, "training_args": training | {"num_train_epochs": 2.0}}


def dpo_iteration(folder, i, plan, prompts, accuracy):
    """Responses of policy i-1, pairs, and the training of policy i."""
    own = folder / f"iter{i}"
    rows, pairs = rewarded(own / "rewarded.jsonl", f"t{i}", prompts=prompts, **plan), []
    for row in rows:
        best, worst = (row["rewards"].index(f(row["rewards"])) for f in (max, min))
        if best != worst:
            pair = {"id": row["id"], "chosen_index": best, "rejected_index": worst, "split": "train"}
            pair |= {"chosen_num_tokens": row["num_tokens"][best], "source": str(own / "rewarded.jsonl")}
            pair |= {"rejected_num_tokens": row["num_tokens"][worst]}
            pairs.append(pair | {"margin": row["rewards"][best] - row["rewards"][worst]})
    write(own / "pairs.jsonl", pairs)
    write_json(own / "model.trainer_state.json", {"log_history": history(accuracy=accuracy)})
    manifest(own / "generated", counts={"engine_seconds": 5.0}, merged={"num_datasets": 1})
    manifest(own / "rewarded", counts={"scoring_seconds": 3.0, "processes": 1})
    metrics = {"train_runtime": 6.0, "num_tokens": 6000, "loss": 0.5, "rewards/accuracies": 0.9}
    metrics["eval_rewards/accuracies"] = accuracy
    counts = {"train_pairs": 50, "eval_pairs": 10}
    manifest(own / "model", num_processes=1, metrics=metrics, counts=counts)


def ppo_iteration(folder, i):
    """The training of policy i by PPO."""
    entries = []
    for s in range(1, 21):
        entry = {"step": s, "reward": s / 10, "kl": s / 5, "entropy": 1.0 - s / 40, "kl_coef": 0.05}
        entry |= {"response_length": 30.0 + s / 10, "truncated_fraction": 0.0, "clip_fraction": 0.1}
        entry |= {"policy_loss": -0.01, "value_loss": 1 / s, "explained_variance": 0.5}
        entries.append(entry | {"tokens_per_second": 900.0, "seconds": {"all": 0.5, "learn": 0.2}})
    write(folder / f"iter{i}/model.log.jsonl", entries)
    manifest(folder / f"iter{i}/model", num_processes=1, counts={"prompts": 640})


def heldout(folder, i, plan, prompts, judge, gold_function):
    """Held-out answers of policy i, scored, and its metrics, of which only the files are read here."""
    own, files = folder / f"iter{i}", {}
    for kind, K, sampled, scored in (("sampled", 4, 6.0, 3.5), ("greedy", 1, 4.0, 1.0)):
        files[kind] = f"heldout_{kind}.rewarded.jsonl"
        rows = rewarded(own / files[kind], "h", prompts=prompts, K=K, **plan)
        manifest(own / f"heldout_{kind}.generated", counts={"engine_seconds": sampled})
        manifest(own / f"heldout_{kind}.rewarded", counts={"scoring_seconds": scored})
        if judge:
            rng = random.Random(f"judge {i} {kind}")
            for row in rows:
                mean = random.Random(row["id"]).gauss(0, 1) + judge(i)
                row["rewards"] = [mean + rng.gauss(0, 1) for _ in row["rewards"]]
            write(own / f"heldout_{kind}.judged.jsonl", rows)
    write_json(own / "metrics.json", {"gold_function": gold_function, "files": files})


def manifest(path, **more):
    """A complete manifest beside an output."""
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu"}
    held = {"complete": True, "settings": {}, "inputs": {}, "versions": versions} | more
    write_json(path.with_name(f"{path.name}.manifest.json"), held)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
