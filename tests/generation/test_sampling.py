"""Prompts on their way to an engine or a server: nothing is lost, bad ones are listed or refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.chat import ChatTemplate
from common.cli import UserError, parse, parse_jobs
from common.manifest import Output
from common.records import read_generated
from evaluation import divergence
from generation import gen_hf, get_hf2, sampling

ROOT = Path(__file__).resolve().parents[2]


class Tokenizer:
    """A stand-in: a token a character, the last user's text as template, which refuses "refused"."""

    chat_template, name_or_path, all_special_tokens = "x", "stand-in", ["<s>"]

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"] if messages[-1]["content"] != "refused" else 1 / 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def prompts(tmp_path):
    """Makes the `Prompts` of a file with these texts or records, and the output that they go to."""

    def make(texts, index=0, world=1, **more):
        path = tmp_path / "p.jsonl"
        rows = [text if isinstance(text, dict) else {"prompt": text} for text in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = sampling.SamplingArguments(dataset_name_or_path=str(path), output_dir="", **more)
        output, found = Output(tmp_path / f"out{index}.jsonl", "test", {}, {}), sampling.load_prompts(args)
        return sampling.Prompts(
            args, ChatTemplate(Tokenizer(), args), output, None, found, index, world
        ), output

    return make


def answer(output, items, text="x"):
    for item in items:
        sample = sampling.Sample(text, "stop", [1])
        output.append(sampling.answered(sampling.SamplingArguments(K=1), item, [sample]))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(records):
    return [record["prompt"][-1]["content"] for record in records]


def test_what_is_done_is_not_tokenised_again_and_the_order_stays(prompts, tmp_path, capsys):
    texts = ["b", "a" * 9, "c", "b", "<s>"]
    found, output = prompts(texts, max_input_length=5)
    items = found.items
    assert texts_of(item.record for item in items) == ["b", "c", "b", "<s>"]
    answer(output, [items[2]])
    del output, found
    found, output = prompts(texts, max_input_length=5)
    assert [item.record["id"] for item in found.items] == [items[k].record["id"] for k in (0, 1, 3)]
    assert output.skipped == 1
    answer(output, reversed(found.items), "y")
    found.finish(1.0)
    rows = lines(tmp_path / "out0.jsonl")
    assert texts_of(rows) == ["b", "c", "b", "<s>"] and [r["responses"] for r in rows] == [
        ["y"],
        ["y"],
        ["x"],
        ["y"],
    ]
    assert len({row["id"] for row in rows}) == 4  # the second "b" is a prompt of its own
    [skipped] = lines(tmp_path / "out0.skipped.jsonl")
    assert "9 tokens, more than 5" in skipped["reason"]
    assert "1 prompt holds the text of a special token" in capsys.readouterr().out


def test_prompts_of_an_answered_file_leave_their_earlier_answers_behind(prompts, tmp_path):
    """Sources and stop strings are of the earlier responses; a number of that name is a field of the file."""
    before = {"responses": ["a", "b"], "response_sources": [{"temperature": 1.0}, {"temperature": 0.7}]}
    before |= {"stop_strings": [None, "x"], "num_tokens": [1, 2]}
    rows = [{"prompt": "a", "topic": "sums", **before}, {"prompt": "b", "rewards": 3}]
    found, output = prompts(rows)
    answer(output, found.items)
    found.finish(1.0)
    first, second = read_generated(tmp_path / "out0.jsonl")
    assert not {"response_sources", "stop_strings"} & set(first)
    assert (first["topic"], first["responses"], first["num_tokens"]) == ("sums", ["x"], [1])
    assert second["rewards"] == 3


def test_a_bad_prompt_costs_that_prompt(prompts, tmp_path, capsys):
    """Bad ones are named before anything is answered, and listed."""
    found, output = prompts(["a", "b", "refused", "d", 5, "f"])
    told = capsys.readouterr().out
    for part in ("2 of 6 prompts", "p.jsonl record 3: the chat template", "record 5: a prompt is"):
        assert part in told
    answer(output, found.items)
    found.finish(1.0)
    assert texts_of(lines(tmp_path / "out0.jsonl")) == ["a", "b", "d", "f"]
    reasons = [entry["reason"] for entry in lines(tmp_path / "out0.skipped.jsonl")]
    assert [reason.split(":")[0][-8:] for reason in reasons] == ["record 3", "record 5"]
    assert "longer" not in (told := capsys.readouterr().out) and "2 prompts cannot be used" in told


def test_a_bad_prompt_ends_the_run_where_that_is_asked_for(prompts):
    told = "record 2: .* refuses the turns .* 1 more prompts .*--bad_prompts skip"
    with pytest.raises(UserError, match=told):
        prompts(["a", "refused", "refused"], bad_prompts="refuse")
    with pytest.raises(UserError, match="record 2: a prompt is .*--bad_prompts skip"):
        prompts(["a", 7], bad_prompts="refuse")


def test_a_file_without_any_good_prompt_is_an_error_and_a_shard_without_one_is_not(prompts):
    for texts, told in (
        (["refused"] * 4, "first: .*record 1: the chat"),
        ([1, 2], "first of 2: .*record 1: "),
    ):
        with pytest.raises(UserError, match=f"holds no prompt that can be used; the {told}"):
            prompts(texts)
    bad, good = ["refused", "refused"], ["a", "a"]
    for texts, index in ((bad + good, 0), (good + bad, 1)):
        found, output = prompts(texts, index, 2)
        assert found.items == [] and output.skipped == 2


def test_tools_that_the_template_leaves_out_are_told(prompts, capsys):
    prompts(["a", {"prompt": "b", "tools": [{"type": "function"}]}])
    assert "leaves out the tools of 1 prompts" in (told := capsys.readouterr().out) and "record 2" in told


def test_shards_share_out_every_prompt(prompts):
    texts = [f"text {i % 7}" for i in range(23)]
    seen = [item.record["id"] for k in range(4) for item in prompts(texts, k, 4)[0].items]
    assert seen == [item.record["id"] for item in prompts(texts)[0].items] and len(set(seen)) == 23


def test_what_shapes_answers():
    """Both ways of generating have the same settings, but for the engine's, which servers do not tell."""
    given = {"dataset_name_or_path": "p", "chat_template": "t", "K": 3}
    engine, inputs = get_hf2.shaping(get_hf2.Arguments(model_name_or_path="m", **given))
    assert inputs == {"dataset_name_or_path": "p", "model_name_or_path": "m", "chat_template": "t"}
    client, theirs = sampling.shaping(gen_hf.Arguments(tokenizer="m", **given), "tokenizer")
    assert theirs == {"dataset_name_or_path": "p", "tokenizer": "m", "chat_template": "t"}
    assert engine == client | {"dtype": "auto", "engine_args": None} and engine["K"] == 3
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


@pytest.mark.parametrize(
    "script, named", [("get_hf2.py", "--model_name_or_path"), ("gen_hf.py", "--tokenizer")]
)
def test_a_bad_record_is_refused_before_anything_is_loaded_or_written(tmp_path, script, named):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 5}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    settings = {named: "model", "--dataset_name_or_path": "p.jsonl", "--output_dir": "out"}
    command = [sys.executable, "-X", "importtime", ROOT / "generation" / script, "--bad_prompts", "refuse"]
    command += [part for setting in settings.items() for part in setting]
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert end.returncode == 2 and "record 2: a prompt is a string or a list of messages" in end.stderr
    assert "transformers" not in end.stderr and not list(tmp_path.glob("out*"))


def test_the_wrong_environment_is_named():
    def start(package):  # -S: without the packages of this environment
        code = f"from common.cli import run; run(lambda: __import__('{package}'))"
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    end = start("vllm")
    assert end.returncode == 2 and end.stderr.startswith("error: ")
    assert "no package vllm" in end.stderr and "use_env" in end.stderr
    other = start("common.nowhere")
    assert other.returncode == 1 and "Traceback" in other.stderr  # a bug stays a bug
