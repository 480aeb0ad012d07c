r"""Generate K responses per prompt with a vLLM engine in this process: one process per GPU or group of GPUs.

In:  prompts (hub name, a data set's folder, .jsonl, .json, .parquet, .csv) and a policy.
Out: `--output_dir` is a prefix: shard i writes `PREFIXi.jsonl`, with `id`, `prompt`, `responses`,
     `finish_reasons`, `num_tokens`, the token ids that the engine read and sampled, and the prompt's other
     fields. `merge_data.py` puts the shards together.

    CUDA_VISIBLE_DEVICES=0 python generation/get_hf2.py --model_name_or_path RLHFlow/LLaMA3-SFT \
        --dataset_name_or_path RLHFlow/test_generation_2k --output_dir ./data/gen_data \
        --K 4 --temperature 1.0 --local_index 0 --my_world_size 8

Several data sets can be answered in one engine start, each with its own K and temperature:

    python generation/get_hf2.py loop.yaml:heldout,heldout,generation --model_name_or_path … \
        --dataset_name_or_path heldout.jsonl heldout.jsonl prompts.jsonl \
        --output_dir sampled greedy generated --K 4 1 8 --temperature 1 0 1

takes one section of the YAML file for each job (or one for all of them) and one value for all jobs or one per
job of --dataset_name_or_path, --dataset_key, --output_dir, --K, --temperature and --iteration. `--temperature
1.0,0.7`, one word, is one job's mixture: half of K at each. Answers are saved as they finish; a stopped run
continues with the same command.
"""

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import engine, models
from common.chat import ChatTemplate
from common.cli import UserError, arg, count, parse_jobs, run
from common.devices import check_torch, prepare_threads, visible_gpus
from common.manifest import Output, with_date
from common.progress import Progress, duration
from generation import sampling
from generation.other_shards import take_over

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclasses.dataclass(kw_only=True)
class Arguments(sampling.SamplingArguments):
    model_name_or_path: str = arg(help="policy: hub name or folder")
    local_index: int = arg(0, "this process's shard, from 0; it also names the output", shapes=False)
    my_world_size: int = arg(1, "number of shards", shapes=False)
    tensor_parallel_size: int = arg(1, "GPUs that hold one copy of the model together", shapes=False)
    dtype: str = arg(
        "auto", "of the weights in the engine", choices=["auto", "bfloat16", "float16", "float32"]
    )
    gpu_memory_utilization: float = arg(0.9, "share of a GPU's memory that the engine may take", shapes=False)
    kv_cache_gib: float | None = arg(None, "GiB of KV cache; None: what a GPU has left, else 1", shapes=False)
    max_num_seqs: int | None = arg(None, "responses decoded at once; None: the engine's choice", shapes=False)
    engine_args: dict | None = arg(
        None,
        'more arguments of vLLM\'s engine, JSON: \'{"quantization": "fp8"}\'; --engine_args.quantization fp8',
    )

    # See cli.parse_jobs.
    per_job = ("dataset_name_or_path", "dataset_key", "output_dir", "K", "temperature", "iteration")


IN_ENGINE = 4  # sequences that the engine holds, decoding or waiting, per slot, so that no slot waits for us
# One for all jobs: what the engine is, and which shard this process does.
ONE_FOR_ALL = (*Arguments.__annotations__, "revision", "trust_remote_code")


def shaping(job: Arguments) -> tuple[dict, dict]:
    """(settings, inputs) of a job that shape its answers, the shard apart; what a manifest holds."""
    return sampling.shaping(job, "model_name_or_path")


def check(jobs: list[Arguments]) -> None:
    """Refuse what cannot work before the engine is imported."""
    args = jobs[0]
    for job in jobs:
        try:
            sampling.check_sampling(job)
        except UserError as error:
            raise UserError(f"{error} (job {job.output_dir})" if len(jobs) > 1 else str(error)) from None
        for name in ONE_FOR_ALL:
            one, other = getattr(args, name), getattr(job, name)
            if one != other:
                raise UserError(f"the jobs have {name} {one!r} and {other!r}: one engine answers all of them")
    if len({os.path.abspath(job.output_dir) for job in jobs}) < len(jobs):
        raise UserError("two jobs have the same output_dir")
    for name in ("tensor_parallel_size", "max_num_seqs", "my_world_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if not 0 <= args.local_index < args.my_world_size:
        last = args.my_world_size - 1
        raise UserError(f"--local_index {args.local_index} must be from 0 to --my_world_size - 1 = {last}")
    models.check_policy(args.model_name_or_path)
    gpus = visible_gpus()
    engine.check_engine_args(args.engine_args, bool(gpus))
    if not gpus:
        engine.check_head_size(args.model_name_or_path)
    if gpus and args.tensor_parallel_size > len(gpus):
        raise UserError(
            f"--tensor_parallel_size {args.tensor_parallel_size}, but this process sees {len(gpus)} GPUs; "
            "see CUDA_VISIBLE_DEVICES"
        )


def start_engine(args: Arguments, limit: int | None, needed: int) -> "LLM":
    """The vLLM engine, with room for `needed` tokens of prompt and response."""
    check_torch()
    on_cpu, length = not visible_gpus(), min(needed, limit or needed)
    environment = engine.variables(not on_cpu) | {"VLLM_LOGGING_LEVEL": "WARNING"}
    options = {"gpu_memory_utilization": args.gpu_memory_utilization, "enable_prefix_caching": True}
    if on_cpu:
        environment["VLLM_LOGGING_LEVEL"] = "ERROR"  # it warns for a page
        here = max(1, args.my_world_size // int(os.environ.get("RLHF_MACHINES", "1")))
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // here))
        # A seeded request must not be split over two steps there, hence whole prompts in one step.
        options = {"enforce_eager": True, "enable_chunked_prefill": False, "enable_prefix_caching": True}
        options["max_num_batched_tokens"] = max(length, 4096)
    for key, value in environment.items():
        os.environ.setdefault(key, value)
    engine.tie_engine()
    from vllm import LLM

    if args.max_num_seqs is not None:
        options["max_num_seqs"] = args.max_num_seqs
    cache = args.kv_cache_gib or (1.0 if on_cpu else None)
    try:
        llm = LLM(
            model=args.model_name_or_path,
            revision=args.revision,
            tokenizer_revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            tensor_parallel_size=args.tensor_parallel_size,
            dtype=args.dtype,
            **engine.FORMATS,
            max_model_len=length,
            generation_config="vllm",
            kv_cache_memory_bytes=int(cache * 2**30) if cache else None,
            **options | (args.engine_args or {}),
        )
    except Exception as error:
        said = " ".join(str(error).split())[:400]
        raise UserError(f"vLLM cannot start with {args.model_name_or_path}: {said}") from error
    engine.end_at_exit(llm)
    return llm


class Waiting:
    """A prompt in the engine: where its record goes, and what is there of its samples, by part."""

    def __init__(self, job, output, item, parts):
        self.job, self.output, self.item, self.samples = job, output, item, [None] * parts

    def add(self, part: int, result: "RequestOutput") -> bool:
        """Take a part's samples; whether all are there. A UserError where the engine gave up on it."""
        outputs = sorted(result.outputs, key=lambda sample: sample.index)
        reasons = [sample.finish_reason for sample in outputs]
        if not set(reasons) <= {"stop", "length"}:
            what = f"the engine gave up on prompt {self.item.record['id']} ({reasons})"
            raise UserError(f"{what}; start the same command again")
        self.samples[part] = [
            sampling.Sample(
                sample.text,
                sample.finish_reason,
                list(sample.token_ids),
                sample.stop_reason if isinstance(sample.stop_reason, str) else None,
            )
            for sample in outputs
        ]
        return None not in self.samples

    def save(self) -> int:
        """Write the record; the number of tokens sampled for it."""
        record = sampling.answered(self.job, self.item, [s for part in self.samples for s in part])
        self.output.append(record)
        return sum(record["num_tokens"])


def enqueue(llm: "LLM", request: sampling.Request) -> str:
    """Give the engine one request; the name under which its answer comes."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    try:
        prompt, params = {"prompt_token_ids": request.prompt_ids}, SamplingParams(**request.fields)
        [name] = llm.enqueue([prompt], params, use_tqdm=False)
    except (TypeError, ValueError, VLLMClientError) as error:
        raise UserError(
            f"vLLM refuses the sampling settings: {' '.join(str(error).split())[:400]}"
        ) from error
    return name.split("-")[0]


def answer(llm: "LLM", prompts: Iterable, window: int, progress: Progress) -> Counter:
    """Run the engine's own step loop and save each prompt's record when its last response is finished.

    Args:
        llm: vLLM engine.
        prompts: iterable of (job, output, item, its requests).
        window: sequences in the engine at once, decoding or waiting; more are not even read yet.
        progress: Progress.

    Returns:
        Counter: output → number of tokens sampled for it.
    """
    prompts, waiting, held, tokens = iter(prompts), {}, 0, Counter()
    while True:
        while held < window and (found := next(prompts, None)):
            *whose, requests = found
            one = Waiting(*whose, len(requests))
            waiting |= {enqueue(llm, request): (one, part) for part, request in enumerate(requests)}
            held += sum(request.fields["n"] for request in requests)
        if not waiting:
            return tokens
        progress.tick()
        for result in llm.llm_engine.step():
            if not result.finished:
                continue
            one, part = waiting.pop(result.request_id.split("-")[0])
            held -= len(result.outputs)
            if one.add(part, result):
                tokens[one.output] += one.save()
                rate = tokens.total() / max(time.monotonic() - progress.start, 1e-9)
                progress.update(1, f"{rate:.0f} tokens/s")


def open_output(job: Arguments) -> tuple | None:
    """(job with its date, its output, its prompts), or None where nothing is left to do."""
    path = f"{job.output_dir}{job.local_index}.jsonl"
    job = with_date(job, path)
    settings, inputs = shaping(job)
    settings |= {"local_index": job.local_index, "my_world_size": job.my_world_size}
    there = Path(path).exists() and not job.overwrite
    records = [] if there else sampling.load_prompts(job)  # bad ones are refused before anything is written
    output = Output(path, "generation/get_hf2.py", settings, inputs, job.overwrite)
    if output.complete:
        print(f"{path} is complete, nothing to do")
        return None
    if taken := take_over(job, output, records, settings, inputs):
        print(f"taken over from another number of shards: {count(taken, 'record')}")
    return job, output, records


def prepare(todo: list[tuple], limit: int | None) -> list[tuple]:
    """(job, its Prompts, its stop ids) for each of `open_output`'s."""
    tokenizers, work = {}, []
    for job, output, records in todo:
        name, source = job.model_name_or_path, (job.revision, job.trust_remote_code)
        if job.chat_template not in tokenizers:
            tokenizers[job.chat_template] = models.load_tokenizer(name, *source)
        template = ChatTemplate(tokenizers[job.chat_template], job)
        shard = job.local_index, job.my_world_size
        prompts = sampling.Prompts(job, template, output, limit, records, *shard)
        work.append((job, prompts, sampling.stop_ids(name, template, job)))
    return work


def main():
    jobs = parse_jobs(Arguments, __doc__)
    check(jobs)
    args = jobs[0]
    todo = [found for job in jobs if (found := open_output(job)) is not None]
    if not todo:
        return
    prepare_threads()
    limit = sampling.context_length(args.model_name_or_path, args)
    work = prepare(todo, limit)
    del todo  # prompts of other shards
    left = sum(len(prompts.items) for _, prompts, _ in work)
    if saved := sum(len(prompts.output.done) for _, prompts, _ in work):
        print(f"continuing: {count(saved, 'record is', 'records are')} there, {left} to do")
    # Sorted, prompts with a common beginning meet in the prefix cache.
    to_answer = (
        (job, prompts.output, item, sampling.requests_of(job, item, stops, limit))
        for job, prompts, stops in work
        for item in sorted(prompts.items, key=lambda item: item.packed)
    )
    tokens, seconds = Counter(), 0.0
    if left:
        llm = start_engine(args, limit, max(job.max_input_length + job.max_new_tokens for job, _, _ in work))
        progress = Progress(left, "generate", "prompts")
        slots = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        tokens = answer(llm, to_answer, IN_ENGINE * slots, progress)
        seconds = progress.close()
    total = tokens.total()
    for _, prompts, _ in work:
        prompts.finish(seconds * tokens[prompts.output] / max(total, 1))
    if total:
        print(f"sampled {total} tokens in {duration(seconds)}, {total / seconds:.0f} tokens/s")


if __name__ == "__mp_main__":  # the engine's process, where vLLM does not fork it
    engine.end_as_engine()
if __name__ == "__main__":
    run(main)
