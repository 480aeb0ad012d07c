"""Build everything that the CPU default runs on, from nothing and without a network.

In:  a seed.
Out: a folder with `policy/` (the SFT model), `reward_model/` (Bradley-Terry), both with
     their tokenizer, `prompts/iter1.jsonl` … `prompts/heldout.jsonl`, one
     {"context_messages": [{"role": "user", "content": …}]} a line, and `preferences.jsonl`,
     in which others answered the prompts of all iterations, for offline DPO.

Run it:  python tiny/build.py --output_dir tiny/built --seed 0
         python tiny/build.py --output_dir tiny/built --seed 0 --weak_reward_model true

1. Write demonstrations of mixed quality and train the tokenizer on them.
2. SFT: a Llama of half a million parameters imitates them.
3. Reward model: Bradley-Terry on pairs ranked by the gold score (TRL's RewardTrainer),
   of the policy's own samples, demonstrations, twins that differ in correctness only,
   and answers spoiled as over-optimised policies spoil theirs.
4. With --weak_reward_model, another one in `weak_reward_model/`: of the same shape, from
   other weights, on few pairs of samples and demonstrations of its own, without spoiled
   answers. Policies learn to please it and not gold (configs/loop_tiny_overoptimised.yaml).

What is built for the same seed and code is left as it is. The stamp is written last,
into a folder that is renamed when whole, so an interrupted build is built again.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

import demonstrations
import task

from common import locks
from common.models import quiet_libraries

ITERATIONS = 3
PROMPTS_PER_ITERATION = 225
HELDOUT_PROMPTS = 300
VOCAB_SIZE = 1024
HIDDEN, LAYERS = 128, 2
DEMONSTRATIONS, SFT_BATCH, SFT_LR = 20_000, 32, 6e-3
DEMO_GOOD, DEMO_CORRECT = 0.4, 0.75
REWARD_PROMPTS, REWARD_PAIRS, REWARD_BATCH, REWARD_LR = 1_200, 12_800, 32, 1e-3
WEAK_PROMPTS, WEAK_PAIRS = 400, 1_600
PREFERENCE_ANSWERS = 8
MAX_NEW_TOKENS = 32
STAMP = "build.json"


def parse_arguments() -> argparse.Namespace:
    class OneLineParser(argparse.ArgumentParser):
        def error(self, message: str):
            refuse(message)

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to make, for example tiny/built"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides prompts, weights and samples (0 or more)"
    )
    parser.add_argument(
        "--weak_reward_model",
        choices=("true", "false"),
        default="false",
        help="also train weak_reward_model/",
    )
    args = parser.parse_args()
    if args.seed < 0:
        refuse(f"--seed {args.seed} is negative; give 0 or more")
    return args


def refuse(reason: str):
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[tiny {time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


def code_version() -> str:
    """Changes with any line of tiny/*.py, where every setting of the build stands."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_stamp(folder: Path) -> dict | None:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; a killed process leaves one of them whole."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def evenly(rng: random.Random, prompts: list[str], n: int) -> list[str]:
    """`n` prompts drawn with replacement, every family equally often."""
    by_family = [[p for p in prompts if task.QUESTIONS[p].family == family] for family in task.WORDINGS]
    return [rng.choice(by_family[i % len(by_family)]) for i in range(n)]


def write_demonstrations(rng: random.Random, prompts: list[str]) -> list[tuple[str, str]]:
    """(prompt, response) pairs for SFT."""
    chosen = evenly(rng, prompts, DEMONSTRATIONS)
    return [(p, demonstrations.write_answer(rng, task.QUESTIONS[p], DEMO_GOOD, DEMO_CORRECT)) for p in chosen]


def scored(prompt: str, responses: list[str]) -> list[float]:
    return [task.gold_score([{"role": "user", "content": prompt}], response) for response in responses]


def response_pairs(rng: random.Random, prompt: str, sampled: list[str]) -> list[tuple[str, str]]:
    """Three pairs that the reward model should tell apart, unranked.

    Two samples of the policy; twins that differ in correctness only, or the small model
    would learn style alone; and a demonstration against one spoiled, sampled or written.
    """
    question, style = task.QUESTIONS[prompt], rng.random()
    good, other = rng.uniform(0.2, 1.0), rng.uniform(0.2, 1.0)
    right, wrong = (
        demonstrations.write_answer(random.Random(style), question, good, correct) for correct in (1.0, 0.0)
    )
    written = demonstrations.write_answer(rng, question, other, DEMO_CORRECT)
    rival = rng.choice([right, wrong, written, rng.choice(sampled)])
    if rng.random() < 0.7:
        rival = demonstrations.spoil(rng, rival) if rival.strip() else rival
    return [tuple(rng.sample(sampled, 2)), (right, wrong), (written, rival)]


def ranked_pairs(rng: random.Random, asked: list[str], sampled: dict[str, list[str]], n: int) -> list[tuple]:
    """`n` of (prompt, better, worse) by gold score, prompts in turns; ties teach nothing and are left out."""
    pairs = []
    while len(pairs) < n:
        for prompt in asked:
            for first, second in response_pairs(rng, prompt, sampled[prompt]):
                one, two = scored(prompt, [first, second])
                if one != two:
                    pairs.append((prompt, first, second) if one > two else (prompt, second, first))
    return rng.sample(pairs[: n + n // 8], n)


def write_prompts(folder: Path, sets: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True)
    for name, prompts in sets.items():
        if name == "train":
            continue
        rows = [json.dumps({"context_messages": [{"role": "user", "content": prompt}]}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def write_preferences(path: Path, seed: int, prompts: list[str]) -> None:
    """Answers of writers of mixed quality to each prompt, ranked by the gold score, in Nectar's layout.

    As in a preference set of the hub no answer is the policy's. Equal scores share a rank.
    """
    rng, rows = random.Random(f"preferences {seed}"), []
    for prompt in prompts:
        answers = [
            demonstrations.write_answer(rng, task.QUESTIONS[prompt], rng.uniform(0.2, 1.0), DEMO_CORRECT)
            for _ in range(PREFERENCE_ANSWERS)
        ]
        gold = scored(prompt, answers)
        ranks = [1 + sorted(set(gold), reverse=True).index(score) for score in gold]
        ranked = [{"answer": answer, "rank": rank} for answer, rank in zip(answers, ranks)]
        rows.append(json.dumps({"prompt": prompt, "answers": ranked}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def build(folder: Path, seed: int) -> None:
    say("loading libraries")
    import models  # heavy: only when there is something to build

    rng = random.Random(f"build {seed}")
    sets = task.make_prompts(seed, ITERATIONS, PROMPTS_PER_ITERATION, HELDOUT_PROMPTS)
    write_prompts(folder / "prompts", sets)
    asked = [prompt for i in range(ITERATIONS) for prompt in sets[f"iter{i + 1}"]]
    write_preferences(folder / "preferences.jsonl", seed, asked)

    demos = write_demonstrations(rng, sets["train"])
    tokenizer = models.train_tokenizer([text for pair in demos for text in pair], VOCAB_SIZE)
    policy = models.new_policy(tokenizer, HIDDEN, LAYERS, seed)
    say(
        f"tokenizer of {len(tokenizer)} tokens; SFT of {policy.num_parameters():,} parameters on "
        f"{len(demos):,} answers"
    )
    models.train_sft(policy, tokenizer, demos, SFT_BATCH, SFT_LR, seed, say)

    asked = evenly(rng, sets["train"], REWARD_PROMPTS)
    say(f"sampling {4 * len(asked):,} answers to {len(set(asked)):,} prompts")
    sampled = {prompt: [] for prompt in asked}
    for prompt, answer in zip(
        asked * 4, models.sample(policy, tokenizer, asked * 4, 1.0, MAX_NEW_TOKENS, seed)
    ):
        sampled[prompt].append(answer)
    pairs = ranked_pairs(rng, asked, sampled, REWARD_PAIRS)
    say(f"reward model on {len(pairs):,} ranked pairs")
    reward_model = models.new_reward_model(policy, seed)
    models.train_reward_model(reward_model, tokenizer, pairs, REWARD_BATCH, REWARD_LR, seed, say)

    heldout = sets["heldout"] * 2
    answers = models.sample(policy, tokenizer, heldout, 1.0, MAX_NEW_TOKENS, seed + 1)
    gold = [scored(prompt, [answer])[0] for prompt, answer in zip(heldout, answers, strict=True)]
    reward = models.score(reward_model, tokenizer, list(zip(heldout, answers, strict=True)))
    half = len(heldout) // 2
    unequal = [i for i in range(half) if gold[i] != gold[i + half]]
    right = sum((gold[i] > gold[i + half]) == (reward[i] > reward[i + half]) for i in unequal)
    say(
        f"held-out samples: gold {sum(gold) / len(gold):.3f}, reward {sum(reward) / len(reward):.2f}; "
        f"the reward model ranks {right / len(unequal):.0%} of {len(unequal)} pairs as gold does"
    )

    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def build_weak(folder: Path, seed: int) -> None:
    """Train `folder`/weak_reward_model, for the policy that is there."""
    say("loading libraries")
    import models

    rng = random.Random(f"weak {seed}")
    train = task.make_prompts(seed, ITERATIONS, PROMPTS_PER_ITERATION, HELDOUT_PROMPTS)["train"]
    policy, tokenizer = models.load_policy(folder / "policy")
    asked = evenly(rng, train, WEAK_PROMPTS)
    say(f"sampling {2 * len(asked):,} answers")
    answers = models.sample(policy, tokenizer, asked * 2, 1.0, MAX_NEW_TOKENS, seed + 1_000_003)
    pairs = []
    while len(pairs) < WEAK_PAIRS:
        for prompt, one, two in zip(asked, answers, answers[len(asked) :]):
            written = demonstrations.write_answer(
                rng, task.QUESTIONS[prompt], rng.uniform(0.2, 1.0), DEMO_CORRECT
            )
            for first, second in ((one, two), (written, rng.choice([one, two]))):
                gold = scored(prompt, [first, second])
                if gold[0] != gold[1]:
                    pairs.append((prompt, first, second) if gold[0] > gold[1] else (prompt, second, first))
    pairs = rng.sample(pairs, WEAK_PAIRS)
    say(f"weak reward model on {len(pairs):,} ranked pairs")
    model = models.new_reward_model(policy, seed + 1_000_003)
    models.train_reward_model(model, tokenizer, pairs, REWARD_BATCH, REWARD_LR, seed + 1_000_003, say)
    partial = folder / ".weak_reward_model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder / "weak_reward_model")


def main() -> None:
    args = parse_arguments()
    target = args.output_dir
    wanted = {"seed": args.seed, "code": code_version()}
    missing = [] if args.weak_reward_model == "false" else [target / "weak_reward_model"]
    if read_stamp(target) == wanted and all(path.is_dir() for path in missing):
        print(f"{target} is built already (seed {args.seed})")
        return
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        refuse(f"{target} is not a folder; name a folder or remove it")
    if target.is_dir() and any(target.iterdir()) and read_stamp(target) is None:
        refuse(f"{target} holds something that was not built here; name another --output_dir or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.hold(target.with_name(f".{target.name}.lock"), f"building {target}", wait=True)
    except OSError as problem:
        refuse(f"cannot write beside {target}: {problem.strerror}; name another --output_dir")
    with lock:
        if read_stamp(target) == wanted and all(path.is_dir() for path in missing):
            print(f"{target} was built meanwhile (seed {args.seed})")
            return
        quiet_libraries()
        if read_stamp(target) != wanted:
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial, args.seed)
            (partial / STAMP).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
            replace_folder(partial, target)
        if missing:
            build_weak(target, args.seed)
        say(f"{target} is ready")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A second thread costs models this small more than it gives, several times so on a busy machine.
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
