"""evaluation/evaluate_judged.py: its commands by the parsers of the scripts that they start, and a real run
with vLLM on a tiny model, whose MT-Bench answers are held together turn by turn.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import micro
import pytest
import yaml

from common import cli
from common.cli import UserError
from evaluation import evaluate_judged, export_answers, mt_bench
from generation import get_hf2, sampling

pytestmark = pytest.mark.env("vllm")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evaluation/evaluate_judged.py"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Arguments that name the question files of the three benchmarks, in clones where they have one."""
    folder = tmp_path_factory.mktemp("clones")
    arena, fastchat = folder / "arena-hard-auto", folder / "FastChat/fastchat/llm_judge"
    files = {
        folder / "alpaca_eval.json": [{"instruction": f"Say {i}.", "dataset": "d"} for i in range(3)],
        arena / "data/arena-hard-v0.1/question.jsonl": [
            {"uid": f"u{i}", "category": "arena-hard-v0.1", "prompt": f"Tell {i}."} for i in range(2)
        ],
        fastchat / "data/mt_bench/question.jsonl": [
            {"question_id": 81, "category": "writing", "turns": ["W1", "W2"]},
            {"question_id": 82, "category": "coding", "turns": ["C1", "C2"]},
        ],
    }
    for path, rows in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    (arena / "config").mkdir()
    theirs = {"judge_model": "gpt-4-1106-preview", "bench_name": "arena-hard-v0.1", "max_tokens": 4096}
    (arena / "config/arena-hard-v0.1.yaml").write_text(yaml.safe_dump(theirs | {"model_list": ["x"]}))
    names = ("--alpaca_eval", "--arena_hard", "--mt_bench")
    return [word for pair in zip(names, map(str, files), strict=True) for word in pair]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return micro.make_policy(tmp_path_factory.mktemp("model") / "policy")


@pytest.fixture
def planned(monkeypatch, capsys):
    """(name of the script, its arguments) of each command of a dry run."""

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate_judged.py", *map(str, words), "--dry_run"])
        capsys.readouterr()
        evaluate_judged.main()
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        return [(Path(words[1]).name, words[2:]) for words in lines if words[0] == sys.executable]

    return start


def test_the_commands_of_an_iterate(planned, questions, tmp_path):
    run = tmp_path / "mine"
    micro.make_policy(run / "iter2/model")
    mixture = [{"K": 4}, {"K": 4, "temperature": 0.7}]
    generation = {"system_prompt": "Short.", "temperature": 0.9, "top_p": 0.8, "top_k": 50, "K": 8}
    settings = {"generation": generation | {"mixture": mixture}}
    (run / "loop.yaml").write_text(yaml.safe_dump({"model_name_or_path": "a/b"} | settings))
    commands = planned("--run", run, "--iterate", 2, *questions, "--generation.seed", 7)
    names = [name for name, _ in commands]
    assert names == ["mt_bench.py", "get_hf2.py", "mt_bench.py", "get_hf2.py", *["export_answers.py"] * 3]
    jobs = cli.parse_jobs(get_hf2.Arguments, "", commands[1][1])
    folder = run / "iter2/benchmarks"
    assert [(job.output_dir, job.dataset_key, job.temperature) for job in jobs] == [
        (f"{folder}/alpaca_eval/answers", "instruction", 0),
        (f"{folder}/arena-hard-v0.1/answers", None, 0),
        (f"{folder}/mt_bench/first_0.0_answers", None, 0),
        (f"{folder}/mt_bench/first_0.7_answers", None, 0.7),
    ]
    for job in jobs + cli.parse_jobs(get_hf2.Arguments, "", commands[3][1]):
        assert (job.K, job.top_p, job.top_k, job.max_new_tokens, job.seed) == (1, 1, -1, 2048, 7)
        sampling.check_sampling(job)
        assert job.system_prompt == "Short." and job.model_name_or_path == f"{run}/iter2/model"
    for name, module in (("mt_bench.py", mt_bench), ("export_answers.py", export_answers)):
        for own, words in commands:
            if own == name:
                parsed = cli.parse(module.Arguments, "", words)
                assert name == "mt_bench.py" or parsed.generator == "mine-iter2"
    clones = [dict(zip(words, words[1:])).get("--clone") for _, words in commands[-3:]]
    assert [Path(clone).name if clone else None for clone in clones] == [None, "arena-hard-auto", "llm_judge"]
    judge = ("--local_judge", "q/j")
    [*_, alpaca, arena, mt] = planned("--run", run, "--iterate", 0, *questions, *judge)
    assert "--local_judge" in alpaca[1] and "--local_judge" in arena[1] and "--local_judge" not in mt[1]


@pytest.mark.parametrize(
    "words, named",
    [
        ("", "no questions were given"),
        ("--alpaca_eval nowhere.json", "nowhere.json"),
        ("--arena_hard {q}", "CLONE/data/arena-hard-v0.1/question.jsonl was expected"),
        ("--alpaca_eval {q} --generation.K 4", "--generation.K is decided here"),
        ("--alpaca_eval {q} --generation.Kk 4", "did you mean"),
        ("--alpaca_eval {q} --generation.mixture [{{}}]", "--generation.mixture is decided here"),
        ("--alpaca_eval {q} --generator a/b", "--generator 'a/b': a name without a slash"),
    ],
)
def test_refusals(planned, model, questions, tmp_path, words, named):
    given = ["--model_name_or_path", model, "--output_dir", tmp_path]
    with pytest.raises(UserError, match=named):
        planned(*given, *[word.format(q=questions[1]) for word in words.split()])


def test_answers_of_a_model(model, questions, tmp_path):
    given = ["--model_name_or_path", model, "--output_dir", tmp_path, "--generator", "tiny", *questions]
    given += ["--max_new_tokens", 8, "--max_input_length", 200, "--generation.dtype", "float32"]
    given += ["--local_judge", "q/j"]

    def start():
        words = [sys.executable, SCRIPT, *map(str, given)]
        end = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
        assert end.returncode == 0, end.stdout + end.stderr
        return end.stdout

    told = start()
    assert "3 calls of the judge" in told and told.count("4 calls of the judge") == 2
    assert "--annotators_config" in told and "--endpoint-file" in told and "register_server.sh q/j" in told
    listed = json.loads((tmp_path / "alpaca_eval/tiny.json").read_text())
    assert [(row["instruction"], row["dataset"]) for row in listed] == [(f"Say {i}.", "d") for i in range(3)]
    lines = (tmp_path / "mt_bench/tiny.jsonl").read_text().splitlines()
    turns = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, lines)}
    assert list(turns) == [81, 82]
    for question, temperature in ((81, 0.7), (82, 0.0)):
        answers = []
        for turn in ("first", "second"):
            path = tmp_path / f"mt_bench/{turn}_{temperature}_answers0.jsonl"
            [record] = [json.loads(line) for line in path.read_text().splitlines()]
            answers.append(record["responses"][0])
        assert turns[question] == answers
        assert [message["content"] for message in record["prompt"]][1] == answers[0]
    judge = yaml.safe_load((tmp_path / "arena-hard-v0.1/judge.yaml").read_text())
    assert judge["model_list"] == ["tiny"] and judge["judge_model"] == "q_j" and judge["max_tokens"] == 4096
    endpoint = yaml.safe_load((tmp_path / "arena-hard-v0.1/endpoints.yaml").read_text())["q_j"]
    assert endpoint["model"] == "q/j" and endpoint["endpoints"][0]["api_base"].endswith(":8000/v1")
    # alpaca_eval takes a config's folder, and its prompt's path from the folder above
    [(name, own)] = yaml.safe_load((tmp_path / "alpaca_eval/judge/configs.yaml").read_text()).items()
    assert 'cp "$(python' in told and f"{tmp_path}/alpaca_eval/{own['prompt_template']}" in told
    assert name == "q_j" and own["completions_kwargs"]["model_name"] == "q/j"
    client = yaml.safe_load((tmp_path / "alpaca_eval/client.yaml").read_text())
    assert client["default"][0]["base_url"] == "http://127.0.0.1:8000/v1"
    before = (tmp_path / "alpaca_eval/answers0.jsonl").stat().st_mtime_ns
    assert "is complete, nothing to do" in start()
    assert (tmp_path / "alpaca_eval/answers0.jsonl").stat().st_mtime_ns == before
