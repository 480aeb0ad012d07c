"""The commands that judge answers with the benchmarks' own packages, and the settings files they read.

The judge is the benchmark's own, hosted and paid by the token, or a stand-in: a model that vLLM serves here.
A stand-in's figures compare with no published ones, only with those that it gave the starting policy.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from common import manifest
from common.cli import UserError, read_yaml

# The judge of the published figures, as its package calls it.
HOSTED = {
    "alpaca_eval": "weighted_alpaca_eval_gpt4_turbo",
    "arena-hard-v0.1": "gpt-4-1106-preview",
    "arena-hard-v2.0": "gpt-4.1",
    "mt_bench": "gpt-4",
}
GAMES = {"alpaca_eval": 1, "arena-hard-v0.1": 2, "arena-hard-v2.0": 2, "mt_bench": 2}  # calls for a question
CATEGORY = {"arena-hard-v0.1": "arena-hard-v0.1", "arena-hard-v2.0": "hard_prompt"}
# AlpacaEval writes one token, m or M, and reads its probability; num_procs requests are under way at once.
ALPACA_EVAL = {
    "fn_completions": "openai_completions",
    "fn_completion_parser": "logprob_parser",
    "completion_parser_kwargs": {
        "numerator_token": "m",
        "denominator_tokens": ["m", "M"],
        "is_binarize": False,
    },
    "completion_key": "completions_all",
    "batch_size": 1,
}
ALPACA_PROMPT = (
    "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"  # that of the published judge, in the package
)


@dataclass
class Judging:
    """What is judged, and by whom.

    Attributes:
        bench: a key of HOSTED. generator: the model's name. answers: its exported file.
        model, url: of a stand-in; None: the benchmark's own judge.
        clone: folder of arena-hard-auto or of FastChat's llm_judge; None: where it is, is not known.
        before_2025: the answers are as arena-hard-auto read them before April 2025.
    """

    bench: str
    generator: str
    answers: Path
    model: str | None = None
    url: str = ""
    clone: Path | None = None
    before_2025: bool = False

    @property
    def judge(self) -> str:
        return self.model.strip("/").replace("/", "_") if self.model else HOSTED[self.bench]

    @property
    def folder(self) -> Path:
        """Where settings are written and results are kept."""
        return self.answers.parent.resolve()


def check_generator(name: str) -> None:
    """Refuse a name that the packages could not make a file of."""
    if not name.strip() or "/" in name:
        raise UserError(f"--generator {name!r}: a name without a slash was expected")


def quoted(*words: object) -> str:
    return shlex.join(map(str, words))


def write_settings(job: Judging) -> None:
    """The settings files that `commands` names, for what has any.

    Raises:
        UserError: the clone is not one of arena-hard-auto.
    """
    if job.bench == "alpaca_eval" and job.model:
        completions = {"model_name": job.model, "max_tokens": 1, "temperature": 1, "requires_chatml": True}
        completions |= {"logprobs": True, "top_logprobs": 5, "num_procs": 32}
        own = ALPACA_EVAL | {"prompt_template": "judge/prompt.txt", "completions_kwargs": completions}
        (job.folder / "judge").mkdir(parents=True, exist_ok=True)
        manifest.write_yaml(job.folder / "judge/configs.yaml", {job.judge: own})
        manifest.write_yaml(
            job.folder / "client.yaml", {"default": [{"base_url": job.url, "api_key": "EMPTY"}]}
        )
    if job.bench in CATEGORY and job.clone and not job.before_2025:
        theirs = job.clone / f"config/{job.bench}.yaml"
        settings = read_yaml(theirs, "settings of arena-hard-auto")
        manifest.write_yaml(
            job.folder / "judge.yaml", settings | {"judge_model": job.judge, "model_list": [job.generator]}
        )
        if job.model:
            endpoint = {"model": job.model, "api_type": "openai", "parallel": 32}
            endpoint["endpoints"] = [{"api_base": job.url, "api_key": "EMPTY"}]
            manifest.write_yaml(job.folder / "endpoints.yaml", {job.judge: endpoint})


def alpaca_eval_commands(job: Judging) -> list[str]:
    target = quoted(job.answers.resolve())
    found = ["pip install alpaca-eval==0.6.6   # in an environment of its own"]
    if not job.model:
        judged = f"alpaca_eval --model_outputs {target} --output_path {quoted(job.folder)}"
        return [*found, "export OPENAI_API_KEY=…", f"{judged}   # AlpacaEval's prompts, against GPT-4 Turbo"]
    package = '"$(python -c "import alpaca_eval; print(alpaca_eval.__path__[0])")"'
    judge, results = job.folder / "judge", job.folder / job.judge
    return [
        *found,
        f"cp {package}/evaluators_configs/{ALPACA_PROMPT} {quoted(judge / 'prompt.txt')}",
        f"OPENAI_CLIENT_CONFIG_PATH={quoted(job.folder / 'client.yaml')} alpaca_eval --model_outputs "
        f"{target} --annotators_config {quoted(judge)} --output_path {quoted(results)}",
        "# against answers of yours, without the hub: --reference_outputs START.json --fn_metric get_winrate "
        "--sort_by win_rate",
    ]


def arena_hard_commands(job: Judging) -> list[str]:
    clone, judgments = job.clone or Path("arena-hard-auto"), f"data/{job.bench}/model_judgment/{job.judge}"
    settings, endpoints = f"config/{job.bench}.yaml", "config/api_config.yaml"
    found = []
    if job.clone:
        settings = job.folder / "judge.yaml"
        endpoints = job.folder / "endpoints.yaml" if job.model else endpoints
    else:
        found = [
            "git clone https://github.com/lmarena/arena-hard-auto   # and fetch its data, as its README says",
            f"# add {job.generator} to model_list of {settings}, and the judge to {endpoints}",
        ]
    return [
        *found,
        f"cd {quoted(clone)}",
        quoted("cp", job.answers.resolve(), f"data/{job.bench}/model_answer/{job.generator}.jsonl"),
        *([] if job.model else ["export OPENAI_API_KEY=…"]),
        f"python gen_judgment.py --setting-file {quoted(settings)} --endpoint-file {quoted(endpoints)}",
        f"python show_result.py --benchmark {job.bench} --judge-names {quoted(job.judge)} "
        f"--category {CATEGORY[job.bench]}",
        kept(job, f"{judgments}/{job.generator}.jsonl"),
    ]


def old_arena_hard_commands(job: Judging) -> list[str]:
    """Of the version that read FastChat's format."""
    answers = f"arena-hard-auto/data/{job.bench}/model_answer/{job.generator}.jsonl"
    return [
        "git clone https://github.com/lmarena/arena-hard-auto && git -C arena-hard-auto checkout 8f2f44d",
        "# fetch its data, as its README says",
        quoted("cp", job.answers.resolve(), answers),
        f"# add {job.generator} to model_list of its config/judge_config.yaml",
        "export OPENAI_API_KEY=…; cd arena-hard-auto && python gen_judgment.py && python show_result.py",
    ]


def mt_bench_commands(job: Judging) -> list[str]:
    clone = job.clone or Path("FastChat/fastchat/llm_judge")
    return [
        *([] if job.clone else ["git clone https://github.com/lm-sys/FastChat"]),
        f"cd {quoted(clone)}",
        "pip install 'fschat[model_worker,llm_judge]==0.2.36' pandas   # in an environment of its own",
        f"mkdir -p data/mt_bench/model_answer && cp {quoted(job.answers.resolve())} "
        f"{quoted(f'data/mt_bench/model_answer/{job.generator}.jsonl')}",
        "export OPENAI_API_KEY=…   # FastChat knows hosted judges only",
        f"python gen_judgment.py --model-list {quoted(job.generator)} --parallel 4",
        f"python show_result.py --model-list {quoted(job.generator)}",
        kept(job, "data/mt_bench/model_judgment/gpt-4_single.jsonl"),
    ]


def kept(job: Judging, path: str) -> str:
    """The command that keeps judgments where evaluation/compare_published.py looks for them."""
    target = judgments_of(job.folder, job.judge)
    return f"mkdir -p {quoted(target.parent)} && cp {quoted(path, target)}"


def judgments_of(folder: Path, judge: str) -> Path:
    return folder / f"judgments/{judge}.jsonl"


def commands(job: Judging) -> list[str]:
    """Lines to paste: they judge the answers and keep the result beside them."""
    if job.bench == "mt_bench" and job.model:
        raise UserError("MT-Bench's FastChat knows hosted judges only: leave --local_judge out for it")
    if job.before_2025:
        return old_arena_hard_commands(job)
    makers = {"alpaca_eval": alpaca_eval_commands, "mt_bench": mt_bench_commands}
    return makers.get(job.bench, arena_hard_commands)(job)
