"""evaluation/evaluate_benchmarks.py against lm-evaluation-harness itself: its parser takes our commands, and
it runs a small task of ours.

Needs environment lm_eval (bash -c "source envs.sh; make_envs lm_eval"); skipped where it is not made. The
published benchmarks' data come from the hub, which the tests do not use.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import micro
import pytest
import yaml
from transformers import AutoTokenizer

from common.cli import UserError
from evaluation import evaluate_benchmarks

pytestmark = pytest.mark.env("vllm")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evaluation/evaluate_benchmarks.py"
CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def harness():
    """The interpreter of environment lm_eval."""
    command = ["bash", "-c", "source ./envs.sh; env_prefix lm_eval"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if not found or not Path(found, ".rlhf-stamp").is_file():
        pytest.skip("environment lm_eval is not made: source envs.sh; make_envs lm_eval")
    return f"{found}/bin/python"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return micro.make_policy(tmp_path_factory.mktemp("model") / "policy")


def script(*arguments, python, status=0):
    process = subprocess.run(
        [python, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == status, process.stdout + process.stderr
    return process


@pytest.fixture
def planned(monkeypatch, capsys):
    """The commands of a dry run, as lists of words, and the notes."""

    def start(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evaluate_benchmarks.py", *map(str, arguments), "--dry_run"])
        evaluate_benchmarks.main()
        out = capsys.readouterr().out
        notes = [line for line in out.splitlines() if line.startswith("note:")]
        words, commands = shlex.split("\n".join(line for line in out.splitlines() if line not in notes)), []
        for word in words:  # a command on the CPU takes several lines
            if word.startswith(("VLLM_", "OMP_")):  # what the environment of the test may have already
                continue
            first = word == sys.executable and (not commands or len(commands[-1]) > 1)
            if word.startswith("HF_ALLOW") or first:
                commands.append([])
            commands[-1].append(word)
        return commands, notes

    return start


def test_tasks_of_one_number_of_examples_share_a_command(planned, model, tmp_path):
    given = ("--model_name_or_path", model, "--output_dir", tmp_path)
    commands, notes = planned(*given)
    tasks = [words[words.index("--tasks") + 1 : words.index("--batch_size")] for words in commands]
    assert tasks == [["gsm8k"], ["mmlu"], ["arc_challenge"], ["truthfulqa_mc2"]]
    assert "humaneval, mbpp left out" in notes[0]
    shots = [dict(zip(words, words[1:])).get("--num_fewshot") for words in commands]
    assert shots == ["8", "5", "25", "0"]
    commands, notes = planned(*given, "--run_code", "true", "--tasks", "humaneval")
    assert commands[0][0] == "HF_ALLOW_CODE_EVAL=1" and "--confirm_run_unsafe_code" in commands[0]
    assert not notes


def test_a_runs_iterate_and_its_start(planned, tmp_path):
    run = tmp_path / "run"
    micro.make_policy(run / "iter2/model")
    (run / "loop.yaml").write_text("model_name_or_path: RLHFlow/LLaMA3-SFT\n")
    [words], _ = planned("--run", run, "--iterate", 2, "--tasks", "gsm8k")
    assert f"pretrained={run}/iter2/model" in words
    assert words[words.index("--output_path") + 1] == f"{run}/iter2/benchmarks/default"
    [words], _ = planned("--run", run, "--iterate", 0, "--tasks", "gsm8k")
    assert "pretrained=RLHFlow/LLaMA3-SFT" in words
    model = "--model_name_or_path", "a/b", "--output_dir", "o", "--tasks"
    for more, named in (
        (("--run", run, "--iterate", 3), "iter3/model is not there"),
        (("--run", run), "--iterate is missing"),
        ((), "give --run FOLDER"),
        ((*model, "x:y"), "NAME:EXAMPLES"),
        ((*model, "x:²"), "NAME:EXAMPLES"),
        ((*model, "humaneval"), "no task is left"),
    ):
        with pytest.raises(UserError, match=named):
            planned(*more)


ALL = """--run_code true --apply_chat_template true --limit 3 --max_model_len 256 --include_path .
    --trust_remote_code true --model_args.enable_thinking false --system_instruction Short.
    --fewshot_as_multiturn false"""


@pytest.mark.parametrize("more", ["", "--backend hf", ALL])
def test_the_harness_takes_the_commands(harness, planned, model, tmp_path, more):
    commands, _ = planned("--model_name_or_path", model, "--output_dir", tmp_path, *more.split())
    parse = (
        "import json, sys; from lm_eval._cli.harness import HarnessCLI; "
        "print(json.dumps(vars(HarnessCLI()._parser.parse_args(sys.argv[1:])), default=str))"
    )
    for words in commands:
        asked = [harness, "-c", parse, *words[words.index("run") :]]
        parsed = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
        assert parsed.returncode == 0, parsed.stderr
        found = json.loads(parsed.stdout.splitlines()[-1])
        assert found["model_args"]["pretrained"] == str(model)
        assert found["model"] == ("hf" if "hf" in more else "vllm")
        assert found["tasks"] and found["output_path"].startswith(str(tmp_path))
        if more == ALL:
            given = found["model_args"]
            assert given["enable_thinking"] is False and given["max_model_len"] == 256
            assert found["limit"] == 3 and found["system_instruction"] == "Short."
            assert found["fewshot_as_multiturn"] is False and found["apply_chat_template"] is True


def test_the_harness_has_the_published_benchmarks(harness):
    held = yaml.safe_load((ROOT / "evaluation/published.yaml").read_text())["benchmarks"]
    named = {task for benchmark in held.values() for task in benchmark.get("tasks", ())}
    named |= {task.partition(":")[0] for task in evaluate_benchmarks.Arguments().tasks}
    ask = (
        "import sys; from lm_eval.tasks import TaskManager as M; print(set(sys.argv[1:]) - {*M().all_tasks})"
    )
    asked = [harness, "-c", ask, *named]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=120).stdout
    assert told.splitlines()[-1] == "set()"


def test_a_task_runs_on_vllm_and_is_not_run_again(harness, model, tmp_path):
    rows = [{"question": f"Is {i} odd?", "choices": ["yes", "no"], "answer": 1 - i % 2} for i in range(6)]
    data = tmp_path / "tasks" / "data.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("tiny_choice", CHOICE), ("tiny_write", WRITE)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    arguments = ["--model_name_or_path", model, "--output_dir", tmp_path / "out"]
    tasks = ["--tasks", "tiny_choice:0", "tiny_write:0", "--include_path", tmp_path / "tasks"]
    tasks += ["--dtype", "float32", "--max_model_len", "256"]
    told = script(*arguments, *tasks, python=harness)
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    assert set(found) == {"tiny_choice", "tiny_write"} and "tiny_choice" in told.stdout
    assert 0 <= found["tiny_choice"]["acc,none"] <= 1
    assert found["tiny_write"]["exact_match,none"] == 0.0 and found["tiny_write"]["examples"] == 0
    assert "done already" in script(*arguments, *tasks, python=harness).stdout
    tasks[1:3] = ["tiny_choice:1"]  # another number of examples: what is asked alike is kept
    rows_before = found["tiny_write"]
    script(*arguments, *tasks, python=harness)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["tasks"]["tiny_choice"]["examples"] == 1 and found["tasks"]["tiny_write"] == rows_before
    assert found["chat_template"] is None and found["system_instruction"] is None
    asked = ["--apply_chat_template", "true", "--system_instruction", "Short."]
    script(*arguments, *tasks, *asked, python=harness)
    found = json.loads((tmp_path / "out/results.json").read_text())
    template = AutoTokenizer.from_pretrained(model).chat_template
    assert found["chat_template"] == template and found["system_instruction"] == "Short."
    assert list(found["tasks"]) == ["tiny_choice"]
    failed = script(*arguments, "--tasks", "no_such_task", python=harness, status=2)
    assert "lm_eval ended with status" in failed.stderr and failed.stderr.count("\n") == 1
