"""README.md, docs/ and RESULTS.md: the scripts accept every command, every path and link leads somewhere."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from common import cli
from dpo_iteration import online_arguments
from evaluation import compare_published
from generation import get_hf2
from loop.online_plan import OnlineSettings
from loop.settings import LoopSettings
from ppo.run import PPOSettings
from report import make_report, watch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
FILES = {*TRACKED.split(), *(str(page.relative_to(ROOT)) for page in PAGES)}
FOLDERS = {str(folder) for name in FILES for folder in Path(name).parents}
SUFFIXES = "md|py|sh|slurm|yaml|txt|toml|css|js|j2"
# Names of what a run writes, and of what is the reader's own.
NOT_OURS = ("tiny/built", "loop.yaml", "report/index", "my_", "mine/", "FILE.")
# Those of RUN/loop.yaml.
SECTIONS = ("generation", "heldout", "annotation", "eval_annotation", "training_args", "ppo", "online")

# Scripts whose arguments are the dataclass `Arguments` of the module of that name.
SCRIPTS = [
    *("generation/gen_hf.py", "generation/merge_data.py", "generation/join_parts.py"),
    "annotate_data/get_rewards.py",
    "annotate_data/make_dataset.py",
    *("evaluation/metrics.py", "evaluation/run_metrics.py", "evaluation/divergence.py"),
    *("evaluation/select_iterate.py", "evaluation/find_overlap.py"),
    *("evaluation/export_answers.py", "evaluation/mt_bench.py"),
    *("evaluation/evaluate_benchmarks.sh", "evaluation/evaluate_judged.sh"),
    *(
        "dpo_iteration/run_dpo.py",
        "dpo_iteration/run_online.py",
        "ppo/train_ppo.py",
        "ppo/openrlhf/run_openrlhf.py",
    ),
    *(
        f"benchmarks/{name}.py"
        for name in ("annotation", "baselines", "dpo", "generation", "memory", "online")
    ),
]


def arguments_of(name):
    if name == "dpo_iteration/run_online.py":
        return online_arguments.Arguments
    return importlib.import_module(name.partition(".")[0].replace("/", ".")).Arguments


def drive(kind, config, argv):
    """Read the arguments of run_loop.sh or run_ppo.sh, the flags of bash apart."""
    words = list(argv)
    for flag in ("--check", "--dry_run"):
        words = [word for word in words if word != flag]
    for flag in ("--stage", "--stop_stage"):
        if flag in words:
            place = words.index(flag)
            assert re.fullmatch(r"(\d+\.)?(generate|annotate|train|evaluate|[1-4])", words[place + 1]), words
            del words[place : place + 2]
    if not words or words[0].startswith("--"):
        words.insert(0, config)
    cli.refuse(cli.parse(kind, "", words).problems)


def run_tests(argv):
    for word in argv:
        assert not word.startswith("tests/") or (ROOT / word).exists(), word


def compare(argv):
    compare_published.published(cli.parse(compare_published.Arguments, "", argv).row)


def register(argv):
    assert argv[0] == "stop" or len(argv) == 1, argv


SLURM = "dpo_iteration/run_dpo.py"  # what configs/train_multinode.slurm starts
PARSERS = {
    **{name: lambda argv, name=name: cli.parse(arguments_of(name), "", argv) for name in SCRIPTS},
    "generation/get_hf2.py": lambda argv: cli.parse_jobs(get_hf2.Arguments, "", argv),
    "report/make_report.py": lambda argv: make_report.check(make_report.arguments(argv)),
    "report/watch.py": lambda argv: cli.parse(watch.Arguments, "", ["--run", *argv]),
    "evaluation/compare_published.py": lambda argv: compare(["--run", *argv]),
    "run_loop.sh": lambda argv: drive(LoopSettings, "configs/loop_llama3_8b.yaml", argv),
    "configs/loop.slurm": lambda argv: PARSERS["run_loop.sh"](argv),
    "run_ppo.sh": lambda argv: drive(PPOSettings, "configs/ppo_llama3_8b.yaml", argv),
    "run_online.sh": lambda argv: drive(OnlineSettings, "configs/online_llama3_8b.yaml", argv),
    "configs/ppo.slurm": lambda argv: PARSERS["run_ppo.sh"](argv),
    "configs/train_multinode.slurm": lambda argv: PARSERS[SLURM](argv or ["configs/training.yaml"]),
    "generation/register_server.sh": register,
    "tests/run.sh": run_tests,
}


def commands(page: Path) -> list[str]:
    """The command lines of a page: those of its `sh` blocks, and code in a line that starts one of our
    scripts.
    """
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    begins = re.compile(r"(\w+=\S* )*(bash|python|accelerate launch|sbatch) ")
    return lines + [span for span in spans if begins.match(span)]


def started(line: str, settings: Path) -> list[tuple[str, list[str], list[str]]]:
    """(script, its arguments, the words in front of it) of each of our scripts that a command line starts.

    Placeholders are filled in: CONFIG, RUN/loop.yaml (by `settings`), variables of bash, hub names.
    """
    words = [re.sub(r"\$\{?\w+\}?", "0", word) for word in shlex.split(line, comments=True)]
    words = [word.replace("RUN/loop.yaml", str(settings)) for word in words if word not in ("&", "…")]
    for flag in ("-c", "--wrap"):
        if flag in words[:-1]:
            return started(words[words.index(flag) + 1], settings)
    for k, word in enumerate(words):
        name = word.removeprefix("./")
        if re.fullmatch(r"[\w/.-]+\.(py|sh|slurm)", name) and name != "envs.sh":
            driver = "ppo" if name in ("run_ppo.sh", "configs/ppo.slurm") else "loop"
            driver = "online" if name == "run_online.sh" else driver
            rest = [f"configs/{driver}_tiny.yaml" if w == "CONFIG" else w for w in words[k + 1 :]]
            return [(name, rest, words[:k])]
    return []


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    """A loop.yaml with the sections that a run's has."""
    path = tmp_path_factory.mktemp("run") / "loop.yaml"
    path.write_text("".join(f"{name}: {{}}\n" for name in SECTIONS))
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_accepted(page, settings, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for line in commands(page):
        for name, argv, front in started(line, settings):
            assert name in FILES, line
            seen.add(name)
            try:
                if "accelerate" in front:
                    launch = launch_command_parser().parse_args([*front[front.index("launch") + 1 :], name])
                    assert launch.config_file is None or Path(launch.config_file).is_file(), line
                if "--help" not in argv:
                    PARSERS[name](argv)
            except cli.UserError as error:
                shortened = "…" in line and str(error).startswith("missing --")
                assert shortened, f"{line}\n{error}"
            for variable in [word.partition("=")[0] for word in front if re.match(r"[a-z]\w*=", word)]:
                text = (ROOT / name).read_text() + (ROOT / "envs.sh").read_text()
                assert re.search(rf"^{variable}=", text, re.MULTILINE), line
        for call in re.findall(r"\b(?:use|make)_env[s]? ([a-z_ ]+)", line):
            assert set(call.split()) <= {"vllm", "rlhflow", "ppo_train", "lm_eval"}, line
    if page.name == "README.md":
        assert seen >= {"run_loop.sh", "run_ppo.sh", "tests/run.sh"}


def test_every_script_is_shown_somewhere(settings):
    shown = {name for page in PAGES for line in commands(page) for name, _, _ in started(line, settings)}
    assert shown >= set(PARSERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_exists(page):
    top = "|".join(sorted(re.escape(name.split("/")[0]) for name in FOLDERS if name != "."))
    text = re.sub(r"\(https?://[^)]*\)", "", page.read_text(encoding="utf-8"))
    named = re.findall(rf"(?<![\w/.~-])(?:\./)?((?:{top})/[\w./-]*[\w/])(?!\S*[*])", text)
    named += re.findall(rf"(?<![\w/.~-])([\w.-]+\.(?:{SUFFIXES}))\b(?![/])", text)
    last = {Path(name).name for name in FILES}
    for name in named:
        if not name.startswith(NOT_OURS):
            assert name in FILES or name.rstrip("/") in FOLDERS or name in last, name


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and (not anchor or anchor in anchors(target)), link


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


def test_the_readme_shows_lines_of_run_loop():
    [excerpt] = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = [line.split("  #")[0].strip() for line in excerpt.splitlines() if line[:1] != "#"]
    there = [line.split("  #")[0].strip() for line in (ROOT / "run_loop.sh").read_text().splitlines()]
    assert [line for line in shown if line not in there] == []
