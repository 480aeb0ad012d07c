r"""Measure sequences per second of ways to score responses with a reward model: same records, one run.

In:  nothing: a Llama of 27 million random weights and synthetic records are made on the spot. Or a reward
     model (one label) and a generated JSON Lines file (`prompt`, `responses`).
Out: a table, and with --output_dir a JSON file of the numbers, the versions and the cores.

    python benchmarks/annotation.py --records 24 --K 8 --dtype float32 --output_dir runs/annotation.json

pipeline  the original way: transformers' text-classification pipeline, one sequence at a time
padded    batches of sequences of like length, padded, by a token budget
vllm      vLLM's classify with prefix caching, whose cache is emptied before each time
shared    ours: the scorer of get_rewards.py, which computes each prompt once (common/shared_prompts.py)

The clock runs from records to rewards; loading and a warm-up are left out. The ways take turns, in an order
that rotates, and the median counts. `differs` is from one sequence at a time in float32. All use all cores,
or the GPU.
"""

import gc
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.reward_models import BradleyTerry
from benchmarks.random_models import make_model
from common import chat, cli, devices, engine, models, records
from common.cli import UserError, arg
from common.manifest import versions, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAYS = ("pipeline", "padded", "vllm", "shared")
WARM_UP = 2  # records


@dataclass
class Arguments:
    reward_name_or_path: str | None = arg(None, help="reward model, folder or hub name; None: random weights")
    dataset_name_or_path: str | None = arg(None, help="generated JSON Lines file; None: synthetic records")
    records: int = arg(24, help="records to score, at most")
    K: int = arg(8, help="responses of a synthetic record")
    ways: list[str] = arg(list(WAYS), help="which to measure", choices=None)
    repeats: int = arg(3, help="times each way is measured")
    dtype: str = arg("auto", "auto is bfloat16 on a GPU, float32 without", ("auto", "float32", "bfloat16"))
    batch_tokens: int | None = arg(None, help="tokens of a padded batch; None: 16384 on a GPU, 4096 without")
    shared_tokens: int | None = arg(
        None, help="tokens of a row of shared prompts; None: 16384 on a GPU, 2048 without"
    )
    gpu_memory_utilization: float = arg(0.4, help="vLLM's share of a GPU; the other ways need the rest")
    seed: int = arg(0, help="of random weights and synthetic records")
    output_dir: str | None = arg(None, help="JSON file to write (a file name)")


def make_records(count: int, K: int, seed: int) -> list[dict]:
    """Prompts of 100 to 400 and responses of 20 to 300 characters, which are tokens of the tokenizer
    above.
    """
    rng = random.Random(seed)

    def text(shortest: int, longest: int) -> str:
        return "".join(rng.choices("etaoin shrdlu", k=rng.randint(shortest, longest)))

    prompts = ([{"role": "user", "content": text(100, 400)}] for _ in range(count))
    return [{"prompt": prompt, "responses": [text(20, 300) for _ in range(K)]} for prompt in prompts]


def read_records(path: str | Path, count: int) -> list[dict]:
    """The first `count` records of a generated file, as messages and responses."""
    return list(itertools.islice(records.read_generated(path), count))


def templated(tokenizer: "PreTrainedTokenizerBase", record: dict) -> list[str]:
    """The text of each of a record's sequences, as the template writes it."""
    turns = (
        [*record["prompt"], {"role": "assistant", "content": response}] for response in record["responses"]
    )
    template = chat.ChatTemplate(tokenizer)
    return [template.render(turn, False) for turn in turns]


class Way:
    """A way to score: `score(rows)` takes records and gives the rewards of each, in their order."""

    def __init__(self, args, folder, model, tokenizer):
        self.args, self.model, self.tokenizer = args, model, tokenizer

    def ready(self):
        """Before each time, off the clock."""
        devices.keep_memory(False)
        self.model.set_attn_implementation(self.args.attention)

    def texts(self, rows: list[dict]) -> list[list[str]]:
        return [templated(self.tokenizer, row) for row in rows]

    def ids(self, texts: list[list[str]]) -> list[list[list[int]]]:
        return [[chat.encode_for_classifier(self.tokenizer, text) for text in group] for group in texts]

    def rewards(self, states: "torch.Tensor") -> list[float]:
        """Raw logits of last hidden states, the head in float32."""
        return (states.float() @ self.model.score.weight.float().T)[:, 0].tolist()


def regroup(flat: Iterable[float], texts: list[list[str]]) -> list[list[float]]:
    flat = iter(flat)
    return [[next(flat) for _ in group] for group in texts]


class Pipeline(Way):
    def __init__(self, *given):
        super().__init__(*given)
        from transformers import pipeline

        self.pipe = pipeline(
            "text-classification", model=self.model, tokenizer=self.tokenizer, device=self.model.device
        )

    def score(self, rows: list[dict]) -> list[list[float]]:
        texts = self.texts(rows)
        # It adds a BOS where its tokenizer does, so the literal one goes.
        bos = self.tokenizer.bos_token if chat.added_specials(self.tokenizer)[0] else None
        found = self.pipe(
            [text.removeprefix(bos or "") for group in texts for text in group],
            function_to_apply="none",
            batch_size=1,
        )
        return regroup((entry["score"] for entry in found), texts)


class Padded(Way):
    def score(self, rows: list[dict]) -> list[list[float]]:
        import torch

        texts = self.texts(rows)
        rows = [ids for group in self.ids(texts) for ids in group]
        order, flat = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [0.0] * len(rows)
        while order:
            batch = order[: max(1, self.args.batch_tokens // len(rows[order[0]]))]
            del order[: len(batch)]
            lengths = torch.tensor([len(rows[i]) for i in batch])
            mask = torch.arange(int(lengths[0]))[None] < lengths[:, None]
            ids = torch.zeros(mask.shape, dtype=torch.long)
            ids[mask] = torch.tensor([token for i in batch for token in rows[i]])
            ids, mask = ids.to(self.model.device), mask.long().to(self.model.device)
            hidden = self.model.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            for i, reward in zip(batch, self.rewards(hidden[torch.arange(len(batch)), lengths - 1])):
                flat[i] = reward
        return regroup(flat, texts)


class Shared(Way):
    """Ours: the scorer of annotate_data/reward_models.py, with its own copy of the weights."""

    def __init__(self, args, folder, model, tokenizer):
        super().__init__(args, folder, model, tokenizer)
        self.scorer = BradleyTerry(
            str(folder), dtype=args.dtype, batch_tokens=args.shared_tokens, max_length=args.longest
        )
        self.scorer.load()
        self.model = self.scorer.model

    def ready(self):
        devices.keep_memory()

    def score(self, rows: list[dict]) -> list[list[float]]:
        found = dict(self.scorer.score(rows))
        return [found[i]["rewards"] for i in range(len(rows))]


class Vllm(Way):
    def __init__(self, args, folder, model, tokenizer):
        super().__init__(args, folder, model, tokenizer)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = {"gpu_memory_utilization": args.gpu_memory_utilization}
        if not args.gpu:
            os.environ |= engine.variables(on_gpus=False)
            options = {
                "enforce_eager": True,
                "kv_cache_memory_bytes": 2**30,
                "gpu_memory_utilization": 0.5,
                "block_size": 32,
            }  # the smallest there
        from vllm import LLM, PoolingParams

        self.params = PoolingParams(use_activation=False)
        self.engine = LLM(
            model=str(folder),
            runner="pooling",
            dtype=args.dtype,
            max_model_len=args.longest,
            enable_prefix_caching=True,
            max_num_batched_tokens=max(16384 if args.gpu else 4096, args.longest),
            seed=0,
            **options,
        )
        engine.end_at_exit(self.engine)

    def ready(self):
        super().ready()
        if not self.engine.reset_prefix_cache():
            raise UserError(
                "vLLM did not empty its prefix cache, so its time would be that of prompts it has seen"
            )

    def score(self, rows: list[dict]) -> list[list[float]]:
        texts = self.texts(rows)
        prompts = [{"prompt_token_ids": ids} for group in self.ids(texts) for ids in group]
        outputs = self.engine.classify(prompts, pooling_params=self.params, use_tqdm=False)
        return regroup((output.outputs.probs[0] for output in outputs), texts)


def one_at_a_time(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: list[list[str]]
) -> list[list[float]]:
    """What all ways are held against: `model` in float32, one sequence, the state of its very last token."""
    import torch

    def reward(text: str) -> float:
        ids = torch.tensor([chat.encode_for_classifier(tokenizer, text)], device=model.device)
        return model.score(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]).item()

    return [[reward(text) for text in group] for group in texts]


def measure(
    ways: dict[str, Way], rows: list[dict], repeats: int, cores: int
) -> dict[str, tuple[list, list, list]]:
    """{way: ([seconds], [CPU seconds], rewards)}; a way that has a rest while others run is not favoured by
    its place.
    """
    import torch

    taken = {name: ([], [], []) for name in ways}
    for repeat in range(repeats):
        names = list(ways)[repeat % len(ways) :] + list(ways)[: repeat % len(ways)]
        for name in names:
            torch.set_num_threads(cores)
            ways[name].ready()
            ways[name].score(rows[:WARM_UP])
            ways[name].ready()
            gc.collect()
            started, worked = time.perf_counter(), time.process_time()
            rewards = ways[name].score(rows)
            taken[name][0].append(time.perf_counter() - started)
            taken[name][1].append(time.process_time() - worked)
            taken[name][2][:] = rewards
            print(f"  {repeat + 1} of {repeats}: {name} {taken[name][0][-1]:.1f} s", flush=True)
    return taken


def results(
    taken: dict[str, tuple[list, list, list]], reference: list[list[float]]
) -> tuple[dict[str, dict], float | None]:
    """Numbers of each way, and how ours compares with the best of the others."""
    count = sum(map(len, reference))
    rate = {name: count / statistics.median(seconds) for name, (seconds, _, _) in taken.items()}
    others = [rate[name] for name in rate if name not in ("pipeline", "shared")]
    found = {}
    for name, (seconds, worked, rewards) in taken.items():
        pairs = [pair for group in zip(rewards, reference, strict=True) for pair in zip(*group, strict=True)]
        found[name] = {
            "sequences_per_second": round(rate[name], 2),
            "times_pipeline": round(rate[name] / rate["pipeline"], 2) if "pipeline" in rate else None,
            "largest_difference": max(abs(a - b) for a, b in pairs),
            "seconds": [round(x, 3) for x in seconds],
            "cpu_seconds": [round(x, 3) for x in worked],
        }
    best = max(others, default=None)
    return found, round(rate["shared"] / best, 2) if best and "shared" in rate else None


def settle(args: Arguments) -> int:
    """Check the arguments and put in what depends on the machine; returns its cores."""
    if not args.ways or set(args.ways) - set(WAYS):
        raise UserError(f"--ways takes some of {' '.join(WAYS)}")
    if min(args.records, args.K, args.repeats) < 1:
        raise UserError("--records, --K and --repeats must be at least 1")
    if args.reward_name_or_path:
        models.check_model(args.reward_name_or_path, "--reward_name_or_path")
    devices.prepare_threads()
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(cores)
    import torch

    args.gpu = torch.cuda.is_available()
    args.dtype = {"auto": "bfloat16" if args.gpu else "float32"}.get(args.dtype, args.dtype)
    args.batch_tokens = args.batch_tokens or (16384 if args.gpu else 4096)
    args.shared_tokens = args.shared_tokens or (16384 if args.gpu else 2048)
    return cores


def measure_all(args: Arguments, rows: list[dict], made: str, cores: int) -> tuple[dict, list, dict]:
    """(what `measure` gives, the reference's rewards, facts about what was measured).

    `made`: an empty folder, for a model of random weights.
    """
    import torch
    import transformers

    if not args.reward_name_or_path:
        kind = "AutoModelForSequenceClassification"
        make_model(made, kind, seed=args.seed, num_labels=1, initializer_range=0.04)
    folder = args.reward_name_or_path or made
    tokenizer = models.load_tokenizer(folder)
    texts = [templated(tokenizer, record) for record in rows]
    lengths = [len(chat.encode_for_classifier(tokenizer, text)) for group in texts for text in group]
    args.longest = max(lengths)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval().to("cuda" if args.gpu else "cpu")
    torch.set_num_threads(cores)
    reference = one_at_a_time(model, tokenizer, texts)
    model.to(getattr(torch, args.dtype))
    flash = args.gpu and args.dtype != "float32"
    args.attention = models.choose_attention(model.config, type(model), flash) or "sdpa"
    kinds = dict(zip(WAYS, (Pipeline, Padded, Vllm, Shared)))
    ways = {name: kinds[name](args, folder, model, tokenizer) for name in WAYS if name in args.ways}
    parameters = sum(weight.numel() for weight in model.parameters())
    where = f"{torch.cuda.get_device_name()}" if args.gpu else f"{cores} cores"
    print(
        f"{len(lengths)} sequences of {min(lengths)} to {args.longest} tokens, {parameters / 1e6:.1f}M "
        f"weights, {args.dtype}, {where}"
    )
    facts = {"device": where, "parameters": parameters, "sequences": len(lengths)}
    return measure(ways, rows, args.repeats, cores), reference, facts


def tell(found: dict[str, dict], ratio: float | None, spread: float):
    """Print the table of what `results` gives."""
    print(
        "\nrewards have a standard deviation of "
        f"{spread:.2f}\n{'':10}{'sequences/s':>12}{'× pipeline':>12}{'differs':>12}{'CPU s':>9}"
    )
    for name, numbers in found.items():
        times = "" if numbers["times_pipeline"] is None else f"{numbers['times_pipeline']:.2f}"
        print(
            f"{name:10}{numbers['sequences_per_second']:12.1f}{times:>12}{numbers['largest_difference']:12.1e}"
            f"{statistics.median(numbers['cpu_seconds']):9.1f}"
        )
    if ratio:
        print(
            f"shared prompts are {ratio:.2f} times as fast as the best of "
            f"{' and '.join(n for n in found if n not in ('pipeline', 'shared'))}"
        )


def write(args: Arguments, facts: dict):
    """Write `facts`, the versions and the settings as JSON."""
    names = ("dtype", "batch_tokens", "shared_tokens", "repeats", "seed", "attention")
    settings = {name: getattr(args, name) for name in names}
    Path(args.output_dir).parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir, facts | settings | {"versions": versions(), "load_average": os.getloadavg()})


def main():
    args = cli.parse(Arguments, __doc__)
    cores = settle(args)
    models.quiet_libraries()
    import torch

    rows = (
        read_records(args.dataset_name_or_path, args.records)
        if args.dataset_name_or_path
        else make_records(args.records, args.K, args.seed)
    )
    with tempfile.TemporaryDirectory() as made, torch.inference_mode():
        taken, reference, facts = measure_all(args, rows, made, cores)
    found, ratio = results(taken, reference)
    spread = statistics.pstdev([reward for group in reference for reward in group])
    tell(found, ratio, spread)
    if args.output_dir:
        facts |= {"ways": found, "shared_over_best_other": ratio, "cores": cores, "records": len(rows)}
        write(args, facts | {"reward_deviation": round(spread, 4)})


if __name__ == "__main__":
    cli.run(main)
