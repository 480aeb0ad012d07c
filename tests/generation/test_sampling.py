"""Prompts on their way to an engine or a server: streamed, in stretches that share beginnings, nothing lost
on a second start.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.cli import UserError, parse, parse_jobs
from common.manifest import Output, beside
from evaluation import divergence
from generation import gen_hf, get_hf2, sampling

ROOT = Path(__file__).resolve().parents[2]


class Tokenizer:
    """A stand-in: a token a character, the last user's text as template."""

    chat_template, name_or_path, all_special_tokens = "x", "stand-in", ["<s>"]

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def prompts(tmp_path):
    """Makes the `Prompts` of a file with these texts, and the output that they go to."""

    def make(texts, index=0, world=1, **more):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        args = sampling.SamplingArguments(dataset_name_or_path=str(path), output_dir="", **more)
        output = Output(tmp_path / f"out{index}.jsonl", "test", {}, {})
        return sampling.Prompts(
            args, Tokenizer(), output, None, sampling.load_prompts(args), index, world
        ), output

    return make


def test_what_is_done_is_not_tokenised_again_and_the_order_stays(prompts, tmp_path, capsys):
    texts = ["b", "a" * 9, "c", "b", "<s>"]
    found, output = prompts(texts, max_input_length=5)
    items = found.items
    assert [item.record["prompt"][-1]["content"] for item in items] == ["b", "c", "b", "<s>"]
    output.append(sampling.answered(items[2], ["x"], ["stop"], [[1]]))
    del output, found
    found, output = prompts(texts, max_input_length=5)
    left = found.items
    assert [item.record["id"] for item in left] == [
        items[k].record["id"] for k in (0, 1, 3)
    ] and output.skipped == 1
    for item in reversed(left):
        output.append(sampling.answered(item, ["y"], ["stop"], [[1]]))
    found.finish(1.0)
    rows = [json.loads(line) for line in (tmp_path / "out0.jsonl").read_text().splitlines()]
    assert [(row["prompt"][-1]["content"], row["responses"]) for row in rows] == [
        ("b", ["y"]),
        ("c", ["y"]),
        ("b", ["x"]),
        ("<s>", ["y"]),
    ]
    assert len({row["id"] for row in rows}) == 4  # the second "b" is a prompt of its own
    assert beside(tmp_path / "out0.jsonl", ".skipped.jsonl").read_text().count("9 tokens, more than 5") == 1
    assert "1 prompt holds the text of a special token" in capsys.readouterr().out


def test_a_bad_prompt_costs_that_prompt(prompts, tmp_path, monkeypatch, capsys):
    """The template refuses record 3; record 5 holds no prompt.

    Both are named before anything is answered, and listed.
    """
    render = Tokenizer.apply_chat_template
    monkeypatch.setattr(
        Tokenizer,
        "apply_chat_template",
        lambda self, m, **k: render(self, m) if m[-1]["content"] != "c" else 1 / 0,
    )
    texts = ["a", "b", "c", "d", 5, "f"]
    found, output = prompts(texts)
    assert (
        "2 of 6 prompts" in (told := capsys.readouterr().out)
        and "p.jsonl record 3: the chat template" in told
        and "record 5: a prompt is" in told
    )
    for item in found.items:
        output.append(sampling.answered(item, ["x"], ["stop"], [[1]]))
    found.finish(1.0)
    rows, skipped = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out0.jsonl", "out0.skipped.jsonl")
    )
    assert [row["prompt"][-1]["content"] for row in rows] == ["a", "b", "d", "f"]
    assert [entry["reason"].split(":")[0].rsplit("/", 1)[-1] for entry in skipped] == [
        "p.jsonl record 3",
        "p.jsonl record 5",
    ]
    assert "longer" not in (told := capsys.readouterr().out) and "2 prompts cannot be used" in told


def test_a_bad_prompt_ends_the_run_where_that_is_asked_for(prompts, monkeypatch):
    monkeypatch.setattr(
        Tokenizer,
        "apply_chat_template",
        lambda self, m, **k: m[-1]["content"] if m[-1]["content"] != "c" else 1 / 0,
    )
    with pytest.raises(
        UserError, match="record 2: .* refuses the turns .* 1 more prompts .*--bad_prompts skip"
    ):
        prompts(["a", "c", "c"], bad_prompts="refuse")
    with pytest.raises(UserError, match="record 2: a prompt is .*--bad_prompts skip"):
        prompts(["a", 7], bad_prompts="refuse")


def test_a_file_without_any_good_prompt_is_an_error_and_a_shard_without_one_is_not(prompts, monkeypatch):
    monkeypatch.setattr(
        Tokenizer,
        "apply_chat_template",
        lambda self, m, **k: m[-1]["content"] if m[-1]["content"] != "c" else 1 / 0,
    )
    with pytest.raises(
        UserError, match="holds no prompt that can be used; the first: .*record 1: the chat template"
    ):
        prompts(["c"] * 4)
    with pytest.raises(UserError, match="holds no prompt that can be used; the first of 2: .*record 1: "):
        prompts([1, 2])
    for texts, index in ((["c", "c", "a", "a"], 0), (["a", "a", "c", "c"], 1)):
        found, output = prompts(texts, index, 2)
        assert found.items == [] and output.skipped == 2


def test_tools_that_the_template_leaves_out_are_told(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "tools": [{"type": "function"}]}\n')
    args = sampling.SamplingArguments(dataset_name_or_path=str(path), output_dir="")
    output = Output(tmp_path / "out.jsonl", "test", {}, {})
    sampling.Prompts(args, Tokenizer(), output, None, sampling.load_prompts(args))
    assert "leaves out the tools of 1 prompts" in (told := capsys.readouterr().out) and "record 2" in told


def test_shards_share_out_every_prompt(prompts):
    texts = [f"text {i % 7}" for i in range(23)]
    seen = [item.record["id"] for k in range(4) for item in prompts(texts, k, 4)[0].items]
    assert seen == [item.record["id"] for item in prompts(texts)[0].items] and len(set(seen)) == 23


def test_what_shapes_answers():
    """Both ways of generating have the same settings, but for the dtype, which servers do not tell."""
    given = {"dataset_name_or_path": "p", "chat_template": "t", "K": 3}
    engine, inputs = get_hf2.shaping(get_hf2.Arguments(model_name_or_path="m", **given))
    assert inputs == {"dataset_name_or_path": "p", "model_name_or_path": "m", "chat_template": "t"}
    client, theirs = sampling.shaping(gen_hf.Arguments(tokenizer="m", **given), "tokenizer")
    assert theirs == {"dataset_name_or_path": "p", "tokenizer": "m", "chat_template": "t"}
    assert engine == client | {"dtype": "auto"} and engine["K"] == 3
    elsewhere = {"output_dir": "o", "tensor_parallel_size": 2, "kv_cache_gib": 1.0, "overwrite": True}
    assert get_hf2.shaping(get_hf2.Arguments(model_name_or_path="m", **given, **elsewhere))[0] == engine


def test_a_complete_section_serves_all_who_read_it(tmp_path):
    section = dataclasses.asdict(get_hf2.Arguments(model_name_or_path="m", temperature=0.5, dtype="float32"))
    del section["model_name_or_path"]
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"heldout": section, "generation": section}))
    where = f"{tmp_path / 'loop.yaml'}:heldout"
    names = ["--dataset_name_or_path", "p", "--output_dir"]
    client = parse(gen_hf.Arguments, "", [where, "--tokenizer", "m", *names, "o"])
    models = ["--model_name_or_path", "m", "--ref_model_name_or_path", "r"]
    measured = parse(divergence.Arguments, "", [where, *models, *names, "o.jsonl"])
    assert client.temperature == measured.temperature == 0.5 and measured.dtype == "float32"
    one, two = parse_jobs(
        get_hf2.Arguments,
        "",
        [f"{where},generation", *models[:2], *names, "a", "b", "--temperature", "1", "0"],
    )
    assert (one.temperature, two.temperature, two.output_dir, two.dtype) == (1.0, 0.0, "b", "float32")


@pytest.mark.parametrize("script", ["get_hf2.py", "gen_hf.py"])
def test_a_bad_record_is_refused_before_anything_is_loaded_or_written(tmp_path, script):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 5}\n')
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    options = ["--model_name_or_path"] if script == "get_hf2.py" else ["--tokenizer"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "generation" / script), *options, str(model)]
    command += [
        "--dataset_name_or_path",
        str(tmp_path / "p.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
        "--bad_prompts",
        "refuse",
    ]
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 2 and "record 2: a prompt is a string or a list of messages" in end.stderr
    assert "transformers" not in end.stderr and sorted(p.name for p in tmp_path.iterdir()) == [
        "model",
        "p.jsonl",
    ]


def test_the_wrong_environment_is_named(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from common.cli import run\ndef main():\n import "
        "{0}\nrun(main)"
    )
    bare = [
        sys.executable,
        "-S",
        "-c",
        code.format("vllm"),
        str(ROOT),
    ]  # -S: without the packages of this environment
    end = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (
        end.returncode == 2
        and end.stderr.startswith("error: ")
        and "no package vllm" in end.stderr
        and "use_env" in end.stderr
    )
    other = subprocess.run(
        [*bare[:3], code.format("common.nowhere"), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1 and "Traceback" in other.stderr  # a bug stays a bug
