"""Offline generation with a real engine on micro models: nothing lost, nothing doubled, the same text however
it is run.

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

import micro
import pytest
from engine import arguments, engine_vocabulary, get_hf2_main, policy, records, shared_engine, write

from common import chat
from common.cli import UserError
from common.manifest import Output, beside, read_manifest
from generation import get_hf2, sampling

pytestmark = pytest.mark.env("vllm")

ROOT = Path(__file__).resolve().parents[2]
MERGE = ROOT / "generation" / "merge_data.py"


def test_a_prompt_that_the_template_refuses_is_met_before_the_engine_starts(
    starts, tmp_path, monkeypatch, capsys
):
    refusing = (
        "{% for m in messages if m.content == 'bad' %}{{ raise_exception('not this') }}{% endfor %}"
        + micro.TEMPLATES["llama3"]
    )
    (tmp_path / "t.jinja").write_text(refusing)
    source = write(tmp_path / "p.jsonl", "a", "b", "bad", "c")
    argv = arguments(source, tmp_path / "out", chat_template=tmp_path / "t.jinja")
    with pytest.raises(UserError, match="p.jsonl record 3: the chat template .* not this"):
        get_hf2_main(monkeypatch, *argv, "--bad_prompts", "refuse")
    assert starts == []
    gc.collect()  # the output's lock, which ends with its process elsewhere
    get_hf2_main(monkeypatch, *argv)
    assert len(starts) == 1 and [r["prompt"][-1]["content"] for r in records(tmp_path / "out0.jsonl")] == [
        "a",
        "b",
        "c",
    ]
    [skipped] = records(beside(tmp_path / "out0.jsonl", ".skipped.jsonl"))
    assert (
        "p.jsonl record 3" in skipped["reason"]
        and read_manifest(tmp_path / "out0.jsonl")["counts"]["skipped"] == 1
    )
    assert "warning: 1 of 4 prompts cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 7, 103])
def test_every_prompt_once_whatever_the_number_of_shards(tmp_path, monkeypatch, starts, count):
    rows = micro.write_prompts(tmp_path / "p.jsonl", count)
    merged = {}
    for world in (1, 2, 8):
        before = len(starts)
        for i in range(world):
            output = tmp_path / f"w{world}_"
            get_hf2_main(
                monkeypatch, *arguments(tmp_path / "p.jsonl", output, local_index=i, my_world_size=world)
            )
        assert len(starts) - before == min(count, world)  # a shard without prompts starts no engine
        command = [
            sys.executable,
            MERGE,
            "--base_path",
            tmp_path / f"w{world}_",
            "--output_dir",
            tmp_path / f"{world}.jsonl",
        ]
        subprocess.run([*command, "--num_datasets", str(world)], check=True, capture_output=True)
        merged[world] = (tmp_path / f"{world}.jsonl").read_bytes()
        seconds = [
            read_manifest(tmp_path / f"w{world}_{i}.jsonl")["counts"]["engine_seconds"] for i in range(world)
        ]
        counts = read_manifest(tmp_path / f"{world}.jsonl")["counts"]
        assert counts["engine_seconds"] == max(seconds)
        assert counts["engine_seconds_sum"] == pytest.approx(sum(seconds))
    assert merged[1] == merged[2] == merged[8]
    got = records(tmp_path / "1.jsonl")
    assert [(r["number"], r["prompt"]) for r in got] == [(r["number"], r["context_messages"]) for r in rows]
    assert len({r["id"] for r in got}) == count
    for record in got:
        assert len(record["responses"]) == len(record["finish_reasons"]) == len(record["num_tokens"]) == 2
        assert all(1 <= n <= 8 for n in record["num_tokens"]) and set(record["finish_reasons"]) <= {
            "stop",
            "length",
        }
    if count == 103:
        assert len({text for r in got for text in r["responses"]}) > 190  # prompts do not share their seeds


def test_greedy_is_what_transformers_generates(tmp_path, monkeypatch, starts):
    """Token by token; the text may lack half a character at its end, which vLLM keeps back and transformers
    shows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    micro.write_prompts(tmp_path / "p.jsonl", 12)
    engine, sampled = shared_engine().llm_engine, {}
    step = engine.step

    def spy():
        results = step()
        sampled.update(
            {tuple(r.prompt_token_ids): list(r.outputs[0].token_ids) for r in results if r.finished}
        )
        return results

    monkeypatch.setattr(engine, "step", spy)
    get_hf2_main(
        monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / "g", K=1, temperature=0, max_new_tokens=24)
    )
    tokenizer = engine_vocabulary()
    model = AutoModelForCausalLM.from_pretrained(policy(), dtype=torch.float32).eval()
    for record in records(tmp_path / "g0.jsonl"):
        prompt = torch.tensor([chat.encode(tokenizer, record["prompt"], True)])
        with torch.no_grad():
            whole = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
            )
        wanted = whole[0, prompt.shape[1] :].tolist()
        assert sampled[tuple(prompt[0].tolist())] == wanted and record["num_tokens"] == [len(wanted)]
        assert record["responses"][0].rstrip("\ufffd") == tokenizer.decode(
            wanted, skip_special_tokens=True
        ).rstrip("\ufffd")


def test_samples_follow_the_model_s_distribution(tmp_path, monkeypatch, starts):
    """First tokens of 4,092 samples against transformers' probabilities, by a chi-square test of the
    likeliest ones.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = engine_vocabulary()
    write(tmp_path / "p.jsonl", *["same"] * 4)  # four twins, so that seeds of twins are tried too
    get_hf2_main(
        monkeypatch,
        *arguments(tmp_path / "p.jsonl", tmp_path / "s", K=1023, temperature=0.05, max_new_tokens=1),
    )
    got = records(tmp_path / "s0.jsonl")
    assert len({tuple(r["responses"]) for r in got}) == 4
    model = AutoModelForCausalLM.from_pretrained(policy(), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([chat.encode(tokenizer, got[0]["prompt"], True)])).logits[0, -1]
    expected = torch.softmax(logits / 0.05, -1)
    texts = [text for r in got for text in r["responses"]]
    chi, cells, rest, seen = 0.0, 0, 1.0, 0
    for token in expected.argsort(descending=True).tolist():
        text = tokenizer.decode([token])
        wanted = expected[token].item() * len(texts)
        if wanted < 40:
            break
        if "\ufffd" in text or not tokenizer.decode([token], skip_special_tokens=True):
            continue  # half a character: several tokens look alike
        found = texts.count(text)
        chi, cells, rest, seen = (
            chi + (found - wanted) ** 2 / wanted,
            cells + 1,
            rest - expected[token].item(),
            seen + found,
        )
    chi += (len(texts) - seen - rest * len(texts)) ** 2 / (rest * len(texts))
    assert cells >= 3
    assert chi < cells + 5 * (2 * cells) ** 0.5  # five standard deviations of a chi-square of that many cells


def test_one_bos_and_literal_special_tokens(tmp_path, monkeypatch, starts, capsys):
    path = write(tmp_path / "p.jsonl", "plain", "say <|eot_id|> and <|begin_of_text|>")
    seen, enqueue = [], shared_engine().enqueue
    monkeypatch.setattr(
        shared_engine(), "enqueue", lambda prompts, *a, **k: seen.extend(prompts) or enqueue(prompts, *a, **k)
    )
    get_hf2_main(monkeypatch, *arguments(path, tmp_path / "g"))
    tokenizer, bos = engine_vocabulary(), engine_vocabulary().bos_token_id
    ids = [prompt["prompt_token_ids"] for prompt in seen]
    assert ids[0].count(bos) == 1 and ids[0][0] == bos
    assert tokenizer.decode(ids[0]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nplain<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert "note: 1 prompt holds the text of a special token" in capsys.readouterr().out


def test_too_long_prompts_are_listed_not_lost(tmp_path, monkeypatch, starts):
    path = write(tmp_path / "p.jsonl", "short", "x" * 300, "y" * 2000, "short too")
    get_hf2_main(monkeypatch, *arguments(path, tmp_path / "g", max_input_length=100))
    get_hf2_main(
        monkeypatch, *arguments(path, tmp_path / "h", max_input_length=9999)
    )  # the model has 512 positions
    for name, left_out in (("g0", 2), ("h0", 1)):
        kept, skipped = records(tmp_path / f"{name}.jsonl"), records(tmp_path / f"{name}.skipped.jsonl")
        assert (len(kept), len(skipped)) == (4 - left_out, left_out)
        assert len({r["id"] for r in kept + skipped}) == 4 and all(
            "tokens, more than" in r["reason"] for r in skipped
        )
        assert read_manifest(tmp_path / f"{name}.jsonl")["counts"]["skipped"] == left_out
    near = write(tmp_path / "near.jsonl", "z" * 480)  # room for less than max_new_tokens
    get_hf2_main(monkeypatch, *arguments(near, tmp_path / "n", max_input_length=9999, max_new_tokens=64))
    [record] = records(tmp_path / "n0.jsonl")
    tokens = len(chat.encode(engine_vocabulary(), record["prompt"], True))
    assert 500 < tokens < 512 and max(record["num_tokens"]) <= 512 - tokens


def test_stop_token_ids_end_a_response(tmp_path, monkeypatch, starts):
    path = write(tmp_path / "p.jsonl", *map(str, range(10)))
    get_hf2_main(monkeypatch, *arguments(path, tmp_path / "a", max_new_tokens=40))
    tokenizer = engine_vocabulary()
    free = records(tmp_path / "a0.jsonl")
    letter = max(
        "abcdefghijklmnopqrstuvwxyz",
        key=lambda c: sum(c in text[1:] for r in free for text in r["responses"]),
    )
    [extra] = tokenizer.encode(letter, add_special_tokens=False)
    get_hf2_main(monkeypatch, *arguments(path, tmp_path / "b", max_new_tokens=40, eos_ids=extra))
    cut = 0
    for before, after in zip(free, records(tmp_path / "b0.jsonl")):
        for old, new, reason in zip(before["responses"], after["responses"], after["finish_reasons"]):
            assert letter not in new and old.startswith(new.rstrip("\ufffd"))
            cut += letter in old and reason == "stop"
    assert cut >= 2
    args = sampling.SamplingArguments(eos_ids=[7])
    stops = sampling.stop_ids(str(policy()), tokenizer, args)
    wanted = {7, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    assert set(stops) == wanted


def test_greedy_and_sampled_jobs_share_one_start(tmp_path, monkeypatch, starts):
    micro.write_prompts(tmp_path / "p.jsonl", 9)
    write(tmp_path / "held_out.jsonl", "one", "two")
    config = tmp_path / "c.yaml"
    shared = f"model_name_or_path: {policy()}, dtype: float32, max_new_tokens: 8, K: 4"
    config.write_text(f"generation: {{{shared}}}\nheldout: {{{shared}, temperature: 0.5}}\n")
    command = [f"{config}:generation,heldout", "--K", 4, 1, "--temperature", 1, 0]
    command += ["--dataset_name_or_path", tmp_path / "p.jsonl", tmp_path / "held_out.jsonl"]
    command += ["--output_dir", tmp_path / "sampled", tmp_path / "greedy"]
    get_hf2_main(monkeypatch, *command)
    assert len(starts) == 1
    assert [len(r["responses"]) for r in records(tmp_path / "sampled0.jsonl")] == [4] * 9
    assert [len(r["responses"]) for r in records(tmp_path / "greedy0.jsonl")] == [1] * 2
    get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / "alone", K=4))
    assert (tmp_path / "alone0.jsonl").read_bytes() == (tmp_path / "sampled0.jsonl").read_bytes()
    spent = [
        read_manifest(tmp_path / f"{name}0.jsonl")["counts"]["engine_seconds"]
        for name in ("sampled", "greedy")
    ]
    assert spent[0] >= spent[1] and spent[0] > 0  # one engine's seconds, shared out by tokens
    settings = read_manifest(tmp_path / "greedy0.jsonl")["settings"]
    assert settings["temperature"] == 0 and settings["K"] == 1 and "local_index" in settings
    get_hf2_main(monkeypatch, *command)
    assert len(starts) == 2  # the lone run's; a complete one needs no engine
    for key, told in (("revision: x", "revision None and 'x'"), ("tensor_parallel_size: 2", "1 and 2")):
        config.write_text(f"generation: {{{shared}}}\nheldout: {{{shared}, {key}}}\n")
        with pytest.raises(UserError, match=f"the jobs have .*{told}: one engine answers all of them"):
            get_hf2_main(monkeypatch, *command)


def test_a_stopped_and_a_killed_run_continue_to_the_same_file(tmp_path, monkeypatch, starts):
    micro.write_prompts(tmp_path / "p.jsonl", 40)
    command = arguments(tmp_path / "p.jsonl", tmp_path / "killed", K=2, max_new_tokens=64)
    script = [
        sys.executable,
        str(ROOT / "generation" / "get_hf2.py"),
        *command,
        "--kv_cache_gib",
        "0.25",
        "--max_num_seqs",
        "2",
    ]
    partial = tmp_path / "killed0.jsonl.partial"

    def stop(number, more):
        """Start it, send a signal when it has saved `more` records, and return what it said."""
        before = partial.read_bytes().count(b"\n") if partial.exists() else 0
        process = subprocess.Popen(
            script,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        until = time.monotonic() + 300
        while not partial.exists() or partial.read_bytes().count(b"\n") < before + more:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, number)
        said = process.communicate()[1].decode()
        assert (
            before + more <= partial.read_bytes().count(b"\n") < 40
            and not (tmp_path / "killed0.jsonl").exists()
        )
        return process.returncode, said

    status, said = stop(signal.SIGINT, 3)
    assert (
        status == 130
        and said.strip().endswith("stopped; start the same command again to continue")
        and "Traceback" not in said
    )
    assert stop(signal.SIGKILL, 3)[0] == -signal.SIGKILL
    with pytest.raises(UserError, match="K was 2 and is now 3"):
        get_hf2_main(monkeypatch, *command, "--K", "3")
    get_hf2_main(monkeypatch, *command)
    whole = arguments(tmp_path / "p.jsonl", tmp_path / "whole", K=2, max_new_tokens=64)
    get_hf2_main(monkeypatch, *whole)
    assert (tmp_path / "killed0.jsonl").read_bytes() == (tmp_path / "whole0.jsonl").read_bytes()
    assert not partial.exists()


def refused(*argv):
    """What get_hf2 itself says; it must not come to start an engine."""
    script = [sys.executable, str(ROOT / "generation" / "get_hf2.py"), *map(str, argv)]
    end = subprocess.run(script, capture_output=True, text=True)
    assert end.returncode == 2 and "Traceback" not in end.stderr, end.stderr
    return end.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("family", ["chatml", "gemma", "mistral", "phi"])
def test_other_templates(tmp_path, family):
    tokenizer = micro.make_tokenizer(family)
    args = sampling.SamplingArguments(
        dataset_name_or_path=str(write(tmp_path / "p.jsonl", "hello")), output_dir=""
    )
    output = Output(tmp_path / "o.jsonl", "test", {}, {})
    records = sampling.load_prompts(args)
    [item] = sampling.Prompts(args, tokenizer, output, 512, records).items
    text = tokenizer.decode(item.token_ids)
    bos = tokenizer.bos_token
    assert len(records) == 1 and (bos is None or (text.startswith(bos) and text.count(bos) == 1))
    assert "hello" in text and item.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi": "<|end|>"}
    assert tokenizer.convert_tokens_to_ids(ends[family]) in chat.stop_token_ids(tokenizer)
    if family == "chatml":
        args.template_kwargs = {"enable_thinking": False}
        [item] = sampling.Prompts(args, tokenizer, output, 512, records).items
        assert tokenizer.decode(item.token_ids) == text + "<think>\n\n</think>\n\n"


def test_a_template_that_refuses_is_one_line(tmp_path):
    model = micro.make_policy(tmp_path / "gemma", "gemma")
    path = write(tmp_path / "p.jsonl", "hello")
    command = [
        "--model_name_or_path",
        model,
        "--dataset_name_or_path",
        path,
        "--output_dir",
        tmp_path / "g",
        "--system_prompt",
        "be kind",
    ]
    message = refused(*command)
    assert (
        message.startswith(
            f"error: {path} holds no prompt that can be used; the first: {path} record 1: the chat template "
            "of"
        )
        and "system, user" in message
        and "System role not supported" in message
    )


@pytest.mark.parametrize(
    "more, words",
    [
        (["--temperature", "0"], "give --K 1"),
        (["--K", "0"], "--K 0"),
        (["--my_world_size", "2", "--local_index", "2"], "--local_index 2"),
        (["--model_name_or_path", "./nowhere"], "./nowhere: no such folder"),
        (["--dataset_name_or_path", "./no.jsonl"], "no such"),
        (["--top_p", "0"], "--top_p"),
        (["--dtype", "fp32"], "bfloat16"),
        (["--max_new_token", "3"], "--max_new_tokens"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path, monkeypatch, more, words):
    micro.write_prompts(tmp_path / "p.jsonl", 1)
    monkeypatch.setattr(get_hf2, "start_engine", None)
    with pytest.raises(UserError, match=words):
        get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / "g"), *more)
    assert (
        not (tmp_path / "g0.jsonl").exists() and not beside(tmp_path / "g0.jsonl", ".skipped.jsonl").exists()
    )


def test_a_record_holds_the_tokens_that_were_read_and_sampled(tmp_path, monkeypatch, starts):
    micro.write_prompts(tmp_path / "prompts.jsonl", 12)
    get_hf2_main(
        monkeypatch,
        *arguments(tmp_path / "prompts.jsonl", tmp_path / "g", K=4, max_new_tokens=200),
        "--eos_ids",
        *map(str, range(60)),
    )
    tokenizer = sampling.load_tokenizer(str(policy()), get_hf2.Arguments(model_name_or_path=""))
    stops, reasons = (
        set(
            sampling.stop_ids(
                str(policy()), tokenizer, get_hf2.Arguments(model_name_or_path="", eos_ids=list(range(60)))
            )
        ),
        [],
    )
    for record in records(tmp_path / "g0.jsonl"):
        assert record["prompt_token_ids"] == chat.encode(tokenizer, record["prompt"], True)
        assert record["num_tokens"] == [len(ids) for ids in record["response_token_ids"]]
        for text, ids, reason in zip(
            record["responses"], record["response_token_ids"], record["finish_reasons"], strict=True
        ):
            reasons.append(reason)
            if reason == "stop":  # the token that ended the answer is the last one, and only that
                assert ids[-1] in stops and not stops & set(ids[:-1])
                ids = ids[:-1]
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert decoded.replace("\ufffd", "") == text.replace("\ufffd", "")
    assert "stop" in reasons


def test_a_run_that_is_continued_on_another_day_writes_the_day_of_its_start(tmp_path, monkeypatch, starts):
    micro.write_prompts(tmp_path / "prompts.jsonl", 3)
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + micro.TEMPLATES["llama3"])
    args = arguments(tmp_path / "prompts.jsonl", tmp_path / "g", chat_template=tmp_path / "dated.jinja")
    get_hf2_main(monkeypatch, *args, "--date", "2024-02-29")
    first = records(tmp_path / "g0.jsonl")
    tokenizer = sampling.load_tokenizer(str(policy()), get_hf2.Arguments(model_name_or_path=""))
    assert all(
        record["prompt_date"] == "2024-02-29"
        and "29 Feb 2024" in tokenizer.decode(record["prompt_token_ids"])
        for record in first
    )
    lines = (tmp_path / "g0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "g0.jsonl").unlink()
    (tmp_path / "g0.jsonl.partial").write_text(lines[0])  # as if it had been killed then
    manifest = read_manifest(tmp_path / "g0.jsonl") | {"complete": False}
    beside(tmp_path / "g0.jsonl", ".manifest.json").write_text(json.dumps(manifest))
    get_hf2_main(monkeypatch, *args)
    assert records(tmp_path / "g0.jsonl") == first
    get_hf2_main(monkeypatch, *args)
    assert len(starts) == 2  # today's date is no reason to begin anew


def test_the_head_sizes_are_those_of_the_cpu_build():
    """The kernels' own answer; the backend's list of sizes lacks 48, which works."""
    import torch
    import vllm._custom_ops as ops

    def has_kernel(size):
        try:
            ops.cpu_attn_get_scheduler_metadata(
                num_reqs=1,
                num_heads=2,
                num_kv_heads=1,
                head_dim=size,
                seq_lens=torch.tensor([4], dtype=torch.int32),
                dtype=torch.float32,
                query_start_loc=torch.tensor([0, 4], dtype=torch.int32),
                causal=True,
                sliding_window_size=-1,
                isa="vec16",
                enable_kv_split=True,
            )
        except RuntimeError as error:
            assert "Unsupported CPU attention configuration" in str(error)
            return False
        return True

    assert tuple(size for size in range(1, 577) if has_kernel(size)) == get_hf2.CPU_HEAD_SIZES


@pytest.mark.long
@pytest.mark.parametrize("size, works", [(16, False), (48, True)])
def test_a_head_size_that_is_refused_does_not_work(tmp_path, size, works):
    """The engine itself, started in a process of its own, with the refusal and without."""
    model, prompts, output = (
        micro.make_policy(tmp_path / "model", head_dim=size),
        tmp_path / "prompts.jsonl",
        tmp_path / "out",
    )
    micro.write_prompts(prompts, 2)
    given = [
        "--model_name_or_path",
        model,
        "--dataset_name_or_path",
        prompts,
        "--output_dir",
        output,
        "--K",
        1,
        "--max_new_tokens",
        4,
        "--kv_cache_gib",
        0.25,
    ]
    for program in ("", "get_hf2.check_head_size = lambda name: None; "):
        command = (
            f"import sys; sys.path.insert(0, '{ROOT}'); from generation import get_hf2; from "
            f"common.cli import run; {program}run(get_hf2.main)"
        )
        done = subprocess.run(
            [sys.executable, "-c", command, *map(str, given)], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == works, done.stderr[-2000:]
        if not works:
            assert (
                "Unsupported CPU attention" if program else f"attention heads of size {size}"
            ) in done.stderr
