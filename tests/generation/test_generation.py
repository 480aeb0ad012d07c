"""Offline generation with a real engine on micro models: nothing lost, nothing doubled, always the same text.

One engine serves all tests of this folder (tests/engine.py); a second one is started in a process that is
killed.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import micro
import pytest
from engine import arguments, engine_vocabulary, get_hf2_main, policy, records, write

from common import engine
from common.chat import ChatTemplate
from common.cli import UserError
from common.manifest import Output, beside, read_manifest
from generation import get_hf2, merge_data, sampling

pytestmark = pytest.mark.env("vllm")

SCRIPT = Path(__file__).resolve().parents[2] / "generation" / "get_hf2.py"


@pytest.fixture
def prompts(tmp_path):
    """Makes p.jsonl of so many prompts."""

    def make(count):
        micro.write_prompts(tmp_path / "p.jsonl", count)
        return tmp_path / "p.jsonl"

    return make


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """Runs the script in this process; returns the records of the output with this prefix."""

    def run(source, name, *argv, **more):
        get_hf2_main(monkeypatch, *arguments(source, tmp_path / name, **more), *argv)
        return records(tmp_path / f"{name}{more.get('local_index', 0)}.jsonl")

    return run


def counts(path):
    return read_manifest(path)["counts"]


def test_a_prompt_that_the_template_refuses_is_met_before_the_engine_starts(
    starts, generate, tmp_path, capsys
):
    refusing = "{% for m in messages if m.content == 'bad' %}{{ raise_exception('not this') }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(refusing + micro.TEMPLATES["llama3"])
    source, template = write(tmp_path / "p.jsonl", "a", "b", "bad", "c"), tmp_path / "t.jinja"
    with pytest.raises(UserError, match="p.jsonl record 3: the chat template .* not this"):
        generate(source, "out", chat_template=template, bad_prompts="refuse")
    assert starts == []
    gc.collect()  # the output's lock, which ends with its process elsewhere
    made = generate(source, "out", chat_template=template)
    assert len(starts) == 1 and [r["prompt"][-1]["content"] for r in made] == ["a", "b", "c"]
    [skipped] = records(tmp_path / "out0.skipped.jsonl")
    assert "p.jsonl record 3" in skipped["reason"] and counts(tmp_path / "out0.jsonl")["skipped"] == 1
    assert "warning: 1 of 4 prompts cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 7, 103])
def test_every_prompt_once_whatever_the_number_of_shards(generate, tmp_path, monkeypatch, starts, count):
    rows, merged = micro.write_prompts(tmp_path / "p.jsonl", count), {}
    for world in (1, 2, 8):
        before, whole = len(starts), tmp_path / f"{world}.jsonl"
        for i in range(world):
            generate(tmp_path / "p.jsonl", f"w{world}_", local_index=i, my_world_size=world)
        assert len(starts) - before == min(count, world)  # a shard without prompts starts no engine
        argv = ["--base_path", tmp_path / f"w{world}_", "--output_dir", whole, "--num_datasets", world]
        monkeypatch.setattr(sys, "argv", ["merge_data.py", *map(str, argv)])
        merge_data.main()
        merged[world] = whole.read_bytes()
        seconds = [counts(tmp_path / f"w{world}_{i}.jsonl")["engine_seconds"] for i in range(world)]
        assert counts(whole)["engine_seconds"] == max(seconds)
        assert counts(whole)["engine_seconds_sum"] == pytest.approx(sum(seconds))
    assert merged[1] == merged[2] == merged[8]
    got = records(tmp_path / "1.jsonl")
    assert [(r["number"], r["prompt"]) for r in got] == [(r["number"], r["context_messages"]) for r in rows]
    assert len({r["id"] for r in got}) == count
    for record in got:
        assert len(record["responses"]) == len(record["finish_reasons"]) == len(record["num_tokens"]) == 2
        assert all(1 <= n <= 8 for n in record["num_tokens"])
        assert set(record["finish_reasons"]) <= {"stop", "length"}
    if count == 103:
        assert len({text for r in got for text in r["responses"]}) > 190  # prompts do not share their seeds


def test_greedy_is_what_transformers_generates(prompts, generate, starts):
    """Token by token; the text may lack half a character at its end, which vLLM keeps back."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = engine_vocabulary()
    model = AutoModelForCausalLM.from_pretrained(policy(), dtype=torch.float32).eval()
    for record in generate(prompts(12), "g", K=1, temperature=0, max_new_tokens=24):
        prompt = torch.tensor([ChatTemplate(tokenizer).encode(record["prompt"], True)])
        more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
        with torch.no_grad():
            wanted = model.generate(prompt, **more)[0, prompt.shape[1] :].tolist()
        assert record["prompt_token_ids"] == prompt[0].tolist()
        assert record["response_token_ids"] == [wanted] and record["num_tokens"] == [len(wanted)]
        text = tokenizer.decode(wanted, skip_special_tokens=True)
        assert record["responses"][0].rstrip("\ufffd") == text.rstrip("\ufffd")


def test_samples_follow_the_model_s_distribution(generate, tmp_path, starts):
    """First tokens of 4,092 samples against transformers' probabilities, by a chi-square test."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = engine_vocabulary()
    source = write(tmp_path / "p.jsonl", *["same"] * 4)  # four twins, so that seeds of twins are tried too
    got = generate(source, "s", K=1023, temperature=0.05, max_new_tokens=1)
    assert len({tuple(r["responses"]) for r in got}) == 4
    model = AutoModelForCausalLM.from_pretrained(policy(), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ChatTemplate(tokenizer).encode(got[0]["prompt"], True)])).logits[0, -1]
    expected = torch.softmax(logits / 0.05, -1)
    sampled = [ids[0] for r in got for ids in r["response_token_ids"]]
    likely = [t for t in expected.argsort(descending=True).tolist() if expected[t] * len(sampled) >= 40]
    cells = [(sampled.count(t), expected[t].item() * len(sampled)) for t in likely]
    rest = [len(sampled) - sum(column) for column in zip(*cells)]
    chi = sum((found - wanted) ** 2 / wanted for found, wanted in [*cells, rest])
    assert len(cells) >= 3
    assert chi < len(cells) + 5 * (2 * len(cells)) ** 0.5  # five standard deviations of that many cells


def test_one_bos_and_literal_special_tokens(generate, tmp_path, starts, capsys):
    source = write(tmp_path / "p.jsonl", "plain", "say <|eot_id|> and <|begin_of_text|>")
    ids = generate(source, "g")[0]["prompt_token_ids"]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = f"<|begin_of_text|>{header.format('user')}plain<|eot_id|>{header.format('assistant')}"
    assert engine_vocabulary().decode(ids) == text and ids.count(engine_vocabulary().bos_token_id) == 1
    assert "note: 1 prompt holds the text of a special token" in capsys.readouterr().out


def test_too_long_prompts_are_listed_not_lost(generate, tmp_path, starts):
    source = write(tmp_path / "p.jsonl", "short", "x" * 300, "y" * 2000, "short too")
    for longest, left_out in ((100, 2), (9999, 1)):  # the model has 512 positions
        name = f"g{longest}_"
        kept = generate(source, name, max_input_length=longest)
        skipped = records(tmp_path / f"{name}0.skipped.jsonl")
        assert (len(kept), len(skipped)) == (4 - left_out, left_out)
        assert len({r["id"] for r in kept + skipped}) == 4
        assert all("tokens, more than" in r["reason"] for r in skipped)
        assert counts(tmp_path / f"{name}0.jsonl")["skipped"] == left_out
    near = write(tmp_path / "near.jsonl", "z" * 480)  # room for less than max_new_tokens
    [record] = generate(near, "n", max_input_length=9999, max_new_tokens=64)
    tokens = len(record["prompt_token_ids"])
    assert 500 < tokens < 512 and max(record["num_tokens"]) <= 512 - tokens


def test_stop_token_ids_end_a_response(generate, tmp_path, starts):
    source = write(tmp_path / "p.jsonl", *map(str, range(10)))
    free = generate(source, "a", max_new_tokens=40)
    tokenizer, texts = engine_vocabulary(), [text for r in free for text in r["responses"]]
    letter = max("abcdefghijklmnopqrstuvwxyz", key=lambda c: sum(c in text[1:] for text in texts))
    [extra] = tokenizer.encode(letter, add_special_tokens=False)
    cut = 0
    for before, after in zip(free, generate(source, "b", max_new_tokens=40, eos_ids=extra)):
        for old, new, reason in zip(before["responses"], after["responses"], after["finish_reasons"]):
            assert letter not in new and old.startswith(new.rstrip("\ufffd"))
            cut += letter in old and reason == "stop"
    assert cut >= 2
    stops = sampling.stop_ids(str(policy()), ChatTemplate(tokenizer), sampling.SamplingArguments(eos_ids=[7]))
    assert set(stops) == {7, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")}


def test_greedy_and_sampled_jobs_share_one_start(prompts, generate, tmp_path, monkeypatch, starts):
    write(tmp_path / "held_out.jsonl", "one", "two")
    config = tmp_path / "c.yaml"
    shared = f"model_name_or_path: {policy()}, dtype: float32, max_new_tokens: 8, K: 4"
    config.write_text(f"generation: {{{shared}}}\nheldout: {{{shared}, temperature: 0.5}}\n")
    command = [f"{config}:generation,heldout", "--K", 4, 1, "--temperature", 1, 0]
    command += ["--dataset_name_or_path", prompts(9), tmp_path / "held_out.jsonl"]
    command += ["--output_dir", tmp_path / "sampled", tmp_path / "greedy"]
    get_hf2_main(monkeypatch, *command)
    assert len(starts) == 1
    sampled, greedy = (tmp_path / f"{name}0.jsonl" for name in ("sampled", "greedy"))
    assert [len(r["responses"]) for r in records(sampled)] == [4] * 9
    assert [len(r["responses"]) for r in records(greedy)] == [1] * 2
    assert generate(tmp_path / "p.jsonl", "alone", K=4) == records(sampled)
    spent = [counts(path)["engine_seconds"] for path in (sampled, greedy)]
    assert spent[0] >= spent[1] and spent[0] > 0  # one engine's seconds, shared out by tokens
    settings = read_manifest(greedy)["settings"]
    assert settings["temperature"] == 0 and settings["K"] == 1 and "local_index" in settings
    get_hf2_main(monkeypatch, *command)
    assert len(starts) == 2  # the lone run's; a complete one needs no engine
    for key, told in (("revision: x", "revision None and 'x'"), ("tensor_parallel_size: 2", "1 and 2")):
        config.write_text(f"generation: {{{shared}}}\nheldout: {{{shared}, {key}}}\n")
        with pytest.raises(UserError, match=f"the jobs have .*{told}: one engine answers all of them"):
            get_hf2_main(monkeypatch, *command)


def test_a_stopped_and_a_killed_run_continue_to_the_same_file(prompts, generate, tmp_path, starts):
    settings = {"K": 2, "max_new_tokens": 64}
    command = [sys.executable, str(SCRIPT), *arguments(prompts(40), tmp_path / "killed", **settings)]
    command += ["--kv_cache_gib", "0.25", "--max_num_seqs", "2"]
    partial = tmp_path / "killed0.jsonl.partial"

    def stop(number, more):
        """Start it, send a signal when it has saved `more` records, and return what it said."""
        before = partial.read_bytes().count(b"\n") if partial.exists() else 0
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, start_new_session=True)
        until = time.monotonic() + 300
        while not partial.exists() or partial.read_bytes().count(b"\n") < before + more:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, number)
        said = process.communicate()[1].decode()
        assert before + more <= partial.read_bytes().count(b"\n") < 40
        assert not (tmp_path / "killed0.jsonl").exists()
        return process.returncode, said

    status, said = stop(signal.SIGINT, 3)
    assert status == 130 and "Traceback" not in said
    assert said.strip().endswith("stopped; start the same command again to continue")
    assert stop(signal.SIGKILL, 3)[0] == -signal.SIGKILL
    with pytest.raises(UserError, match="K was 2 and is now 3"):
        generate(tmp_path / "p.jsonl", "killed", K=3, max_new_tokens=64)
    killed = generate(tmp_path / "p.jsonl", "killed", **settings)
    assert killed == generate(tmp_path / "p.jsonl", "whole", **settings) and not partial.exists()


def test_an_engine_in_a_process_of_its_own_answers_alike_and_ends_with_the_script(
    prompts, generate, tmp_path, starts
):
    """As vLLM has it on GPUs by default; there it forks the process, here it can only spawn one."""
    settings = {"K": 2, "max_new_tokens": 64}
    command = [sys.executable, SCRIPT, *arguments(prompts(80), tmp_path / "apart", **settings)]
    partial = tmp_path / "apart0.jsonl.partial"
    apart = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "MARK_OF_A_TEST": str(tmp_path)}

    def alive(what=""):
        mark = f"MARK_OF_A_TEST={tmp_path} "
        return faults.processes(lambda line, environment: mark in environment and what in line)

    with open(tmp_path / "log", "wb") as log:
        more = ("--kv_cache_gib", "0.25", "--max_num_seqs", "2")
        process = faults.begin([*command, *more], log, env=apart)
    try:
        faults.wait_for(lambda: process.poll() is not None or partial.exists() and len(records(partial)) > 3)
        assert len(alive("EngineCore")) == 1, (tmp_path / "log").read_text()
        assert faults.kill(process, whole=False)
        faults.wait_for(lambda: not alive(), 60)
    finally:
        for left in alive():
            os.kill(left, signal.SIGKILL)
    found = records(partial)
    whole = {record["id"]: record for record in generate(tmp_path / "p.jsonl", "within", **settings)}
    assert 3 < len(found) < len(whole) == 80
    assert found == [whole[record["id"]] for record in found]

    # and by itself, also where some package made a finalizer before multiprocessing was loaded
    (tmp_path / "sitecustomize.py").write_text("import weakref\nweakref.finalize(weakref.finalize, int)\n")
    command += ["--kv_cache_gib", "0.25"]
    apart["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, env=apart, capture_output=True, timeout=240)
    assert done.returncode == 0 and not alive(), done.stderr
    assert records(tmp_path / "apart0.jsonl") == list(whole.values())


@pytest.mark.parametrize("family", ["chatml", "gemma", "mistral", "phi"])
def test_other_templates(tmp_path, capsys, family):
    tokenizer, source = micro.make_tokenizer(family), str(write(tmp_path / "p.jsonl", "hello"))
    args = sampling.SamplingArguments(dataset_name_or_path=source, output_dir="")
    output, found = Output(tmp_path / "o.jsonl", "test", {}, {}), sampling.load_prompts(args)
    [item] = sampling.Prompts(args, ChatTemplate(tokenizer, args), output, 512, found).items
    text, bos = tokenizer.decode(item.token_ids), tokenizer.bos_token
    assert bos is None or (text.startswith(bos) and text.count(bos) == 1)
    assert "hello" in text and item.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi": "<|end|>"}
    assert tokenizer.convert_tokens_to_ids(ends[family]) in ChatTemplate(tokenizer).stop_token_ids()
    assert "add_generation_prompt" not in capsys.readouterr().out
    if family != "mistral":  # one whose next turn has no header
        tokenizer.chat_template = tokenizer.chat_template.replace("if add_generation_prompt", "if false")
        sampling.Prompts(args, ChatTemplate(tokenizer, args), output, 512, found)
        assert "ignores add_generation_prompt" in capsys.readouterr().out
        tokenizer.chat_template = tokenizer.chat_template.replace("if false", "if add_generation_prompt")
    if family == "chatml":
        args.template_kwargs = {"enable_thinking": False}
        [item] = sampling.Prompts(args, ChatTemplate(tokenizer, args), output, 512, found).items
        assert tokenizer.decode(item.token_ids) == text + "<think>\n\n</think>\n\n"


def test_a_template_that_refuses_is_one_line(generate, tmp_path):
    model, source = micro.make_policy(tmp_path / "gemma", "gemma"), write(tmp_path / "p.jsonl", "hello")
    with pytest.raises(UserError, match="holds no prompt that can be used; the first: .* record 1: ") as told:
        generate(source, "g", model_name_or_path=model, system_prompt="be kind")
    assert "system, user" in str(told.value) and "System role not supported" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("more, words", [
    ({"temperature": 0}, "give --K 1"),
    ({"K": 0}, "--K 0"),
    ({"my_world_size": 2, "local_index": 2}, "--local_index 2"),
    ({"model_name_or_path": "./nowhere"}, "./nowhere: no such folder"),
    ({"dataset_name_or_path": "./no.jsonl"}, "no such"),
    ({"top_p": 0}, "--top_p"),
    ({"dtype": "fp32"}, "bfloat16"),
    ({"max_new_token": 3}, "--max_new_tokens"),
])  # fmt: skip
def test_bad_arguments_are_refused_at_once(prompts, generate, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(get_hf2, "start_engine", None)
    with pytest.raises(UserError, match=words):
        generate(prompts(1), "g", **more)
    assert not list(tmp_path.glob("g0*jsonl"))


def test_a_record_holds_the_tokens_that_were_read_and_sampled(prompts, generate, starts):
    eos = list(map(str, range(60)))
    found = generate(prompts(12), "g", "--eos_ids", *eos, K=4, max_new_tokens=200)
    tokenizer, reasons = engine_vocabulary(), []
    stops = set(
        sampling.stop_ids(
            str(policy()), ChatTemplate(tokenizer), sampling.SamplingArguments(eos_ids=list(range(60)))
        )
    )
    for record in found:
        assert record["prompt_token_ids"] == ChatTemplate(tokenizer).encode(record["prompt"], True)
        assert record["num_tokens"] == [len(ids) for ids in record["response_token_ids"]]
        answers = (record[key] for key in ("responses", "response_token_ids", "finish_reasons"))
        for text, ids, reason in zip(*answers, strict=True):
            reasons.append(reason)
            if reason == "stop":  # the token that ended the answer is the last one, and only that
                assert ids[-1] in stops and not stops & set(ids[:-1])
                ids = ids[:-1]
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert decoded.replace("\ufffd", "") == text.replace("\ufffd", "")
    assert "stop" in reasons


def test_a_run_that_is_continued_on_another_day_writes_the_day_of_its_start(
    prompts, generate, tmp_path, starts
):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + micro.TEMPLATES["llama3"])
    template, path = tmp_path / "dated.jinja", tmp_path / "g0.jsonl"
    first = generate(prompts(3), "g", chat_template=template, date="2024-02-29")
    for record in first:
        assert record["prompt_date"] == "2024-02-29"
        assert "29 Feb 2024" in engine_vocabulary().decode(record["prompt_token_ids"])
    line = path.read_text().splitlines(keepends=True)[0]
    path.unlink()
    Path(f"{path}.partial").write_text(line)  # as if it had been killed then
    beside(path, ".manifest.json").write_text(json.dumps(read_manifest(path) | {"complete": False}))
    for _ in range(2):
        assert generate(tmp_path / "p.jsonl", "g", chat_template=template) == first
    assert len(starts) == 2  # today's date is no reason to begin anew


def test_the_head_sizes_are_those_of_the_cpu_build():
    """The kernels' own answer; the backend's list of sizes lacks 48, which works."""
    import torch
    import vllm._custom_ops as ops

    integers = {"dtype": torch.int32}
    given = {"num_reqs": 1, "num_heads": 2, "num_kv_heads": 1, "dtype": torch.float32, "causal": True}
    given |= {"seq_lens": torch.tensor([4], **integers), "query_start_loc": torch.tensor([0, 4], **integers)}
    given |= {"sliding_window_size": -1, "isa": "vec16", "enable_kv_split": True}

    def has_kernel(size):
        try:
            ops.cpu_attn_get_scheduler_metadata(head_dim=size, **given)
        except RuntimeError as error:
            assert "Unsupported CPU attention configuration" in str(error)
            return False
        return True

    assert tuple(size for size in range(1, 577) if has_kernel(size)) == engine.CPU_HEAD_SIZES


@pytest.mark.long
@pytest.mark.parametrize("size, works", [(16, False), (48, True)])
def test_a_head_size_that_is_refused_does_not_work(prompts, tmp_path, size, works):
    """The engine itself, started in a process of its own, with the refusal and without."""
    model = micro.make_policy(tmp_path / "model", head_dim=size)
    given = [
        "--model_name_or_path",
        model,
        "--dataset_name_or_path",
        prompts(2),
        "--output_dir",
        tmp_path / "out",
    ]
    given += ["--K", 1, "--max_new_tokens", 4, "--kv_cache_gib", 0.25]
    for program in ("", "get_hf2.engine.check_head_size = lambda name: None; "):
        code = f"import sys; sys.path.insert(0, '{SCRIPT.parents[1]}'); from generation import get_hf2; "
        code += f"from common.cli import run; {program}run(get_hf2.main)"
        command = [sys.executable, "-c", code, *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == works, done.stderr[-2000:]
        if not works:
            said = "Unsupported CPU attention" if program else f"attention heads of size {size}"
            assert said in done.stderr
