"""Mixtures of sampling settings, and what is passed through to vLLM: with a real engine on a micro model.

The oracle of a mixture is its parts, each sampled alone.
"""

import functools
import json
from types import SimpleNamespace

import micro
import pytest
from engine import arguments, engine_vocabulary, get_hf2_main, policy, records, shared_engine
from mock_server import Mock

from common import engine
from common.chat import ChatTemplate
from common.cli import UserError, parse, parse_jobs
from common.manifest import read_manifest
from common.records import read_rewarded, sample_seed
from common.tokens import Encoder, answers_of
from dpo_iteration.pairs import make_pairs
from dpo_iteration.rows import PairTokenizer
from generation import gen_hf, get_hf2, join_parts, merge_data, mixture, sampling
from generation.get_hf2 import start_engine  # itself, where a fixture puts another in its place

pytestmark = pytest.mark.env("vllm")
HALVES = "1.0,0.7"
COOL = {"temperature": 0.7}


def of(**given):
    return sampling.SamplingArguments(**given)


@pytest.fixture
def generate(monkeypatch, tmp_path, starts):
    """Runs the script in this process on 12 prompts; returns the records of its shards."""
    micro.write_prompts(tmp_path / "p.jsonl", 12)

    def run(name, *argv, shards=1, **more):
        made = []
        for i in range(shards):
            more |= {"local_index": i, "my_world_size": shards}
            get_hf2_main(monkeypatch, *arguments(tmp_path / "p.jsonl", tmp_path / name, **more), *argv)
            made += records(tmp_path / f"{name}{i}.jsonl")
        return made

    return run


def merge(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["merge_data.py", *map(str, words)])
    merge_data.main()


def join(monkeypatch, output, *files):
    words = ["--parts", *map(str, files), "--output_dir", str(output)]
    monkeypatch.setattr("sys.argv", ["join_parts.py", *words])
    join_parts.main()
    return records(output)


# Which parts


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"K": 8}, [(8, 1.0)]),
        ({"K": 8, "temperature": [1.0, 0.7]}, [(4, 1.0), (4, 0.7)]),
        ({"K": 8, "temperature": [0.7, 1.0, 0.7, 0.7]}, [(6, 0.7), (2, 1.0)]),
        ({"K": 8, "mixture": [{"K": 6}, {"temperature": 0.5}]}, [(6, 1.0), (2, 0.5)]),
        ({"K": 4, "temperature": 0.3, "mixture": [{}, {"K": 1, "temperature": 0}]}, [(3, 0.3), (1, 0.0)]),
    ],
)
def test_the_parts_share_out_K(given, wanted):
    assert [(part.K, part.temperature) for part in mixture.parts_of(of(**given))] == wanted


def test_parts_that_the_same_model_would_give_twice_are_one():
    parts = [{"K": 2}, {"K": 3, "model": "start"}, {"K": 1, "temperature": 0.5, "model": "previous"}]
    parts += [{"K": 2, "model": "previous"}]

    def found(*names, parts_of=mixture.own_parts):
        args = of(K=8, mixture=parts, parts_of=list(names) or None)
        return [(part.K, part.temperature, part.model) for part in parts_of(args)]

    assert found() == found("policy") == [(2, 1.0, "policy")]
    assert found("previous") == [(1, 0.5, "previous"), (2, 1.0, "previous")]
    assert found("previous", "start") == [(5, 1.0, "previous"), (1, 0.5, "previous")]
    everything = found("policy", "previous", "start")
    assert everything == found(parts_of=lambda args: mixture.parts_of(args, [mixture.MODELS]))
    assert everything == [(7, 1.0, "policy"), (1, 0.5, "policy")]
    assert mixture.sources(of(K=8, mixture=parts)) == [{"temperature": 1.0, "model": "policy"}] * 2
    assert mixture.models_of(of(K=8, mixture=parts)) == ["policy", "previous", "start"]
    assert mixture.models_of(of(K=8, temperature=[1.0, 0.7], parts_of=["start"])) == ["policy"]


@pytest.mark.parametrize(
    "given, told",
    [
        ({"K": 7, "temperature": [1.0, 0.7]}, "2 parts, over which --K 7 cannot be shared out evenly"),
        ({"K": 1, "temperature": [1.0, 0.7]}, "--K 1 cannot be shared out evenly"),
        ({"K": 7, "mixture": [{"K": 4}, {"K": 4}]}, "K 8 together and --K is 7: give --K 8"),
        ({"K": 8, "mixture": [{"K": 8}, {}]}, "leaves nothing of --K 8 for the 1 without a K"),
        ({"K": 8, "mixture": [{"K": 5}, {}, {}]}, "the 3 responses that the others leave of --K 8"),
        ({"K": 8, "mixture": [{"K": 0}, {}]}, "K below 1"),
        ({"mixture": [{"temprature": 1}]}, "part 1 of --mixture, did you mean 'temperature'"),
        ({"mixture": [{"temperature": "x"}]}, "temperature in part 1 of --mixture: 'x' is not a number"),
        ({"mixture": [{"model": "begin"}]}, "'begin' is not one of policy, previous, start"),
        (
            {"mixture": [{"model": "start"}]},
            "--mixture has no part of policy: give one of them without model",
        ),
        (
            {"mixture": [{}], "parts_of": ["previous"]},
            "--mixture has no part of previous: give --parts_of policy",
        ),
        ({"mixture": [{}], "parts_of": ["policy", "begin"]}, "--parts_of policy begin: some of policy, "),
        ({"mixture": [{"system_prompt": ""}]}, "empty system_prompt"),
        ({"mixture": [{}], "temperature": [1.0, 0.7]}, "several values of --temperature"),
        ({"temperature": [1.0, -1]}, "must not be negative"),
        ({"temperature": [1.0, 0.0]}, "0 is greedy, 4 equal responses: give it K 1"),
        ({"mixture": [{"top_p": 0}]}, "--top_p must be above 0"),
        ({"mixture": [{"top_k": -5}]}, "--top_k -5: a number of tokens was expected"),
        ({"sampling_args": {"min_pp": 0.1}}, "vLLM has no 'min_pp' that is passed on, did you mean 'min_p'"),
        ({"sampling_args": {"n": 2}}, "may not hold n"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(given, told):
    with pytest.raises(UserError) as caught:
        sampling.check_sampling(of(dataset_name_or_path="p", output_dir="o", **given))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_how_a_mixture_is_written(tmp_path):
    """One word of the command line is one job's; words are one a job, as before."""
    (tmp_path / "c.yaml").write_text("one: {temperature: [1.0, 0.7]}\ntwo: {mixture: [{K: 8, top_p: 0.9}]}\n")
    names = ["--model_name_or_path", "m", "--dataset_name_or_path", "p", "--output_dir", "a", "b"]
    read = functools.partial(parse_jobs, get_hf2.Arguments, "")
    for words, wanted in {
        ("0.5",): [0.5, 0.5],
        ("1", "0"): [1.0, 0.0],
        (HALVES,): [[1.0, 0.7], [1.0, 0.7]],
        (HALVES, "0"): [[1.0, 0.7], 0.0],
        ("[1.0, 0.7]", "1"): [[1.0, 0.7], 1.0],
    }.items():
        assert [job.temperature for job in read([*names, "--temperature", *words])] == wanted
    one, two = read([f"{tmp_path}/c.yaml:one,two", *names])
    assert one.temperature == [1.0, 0.7] and two.mixture == [{"K": 8, "top_p": 0.9}]
    told = ["--tokenizer", "m", "--temperature", HALVES, "--mixture", '[{"K": 1}, {"K": 2}]']
    client = parse(gen_hf.Arguments, "", told)
    assert client.temperature == [1.0, 0.7] and client.mixture == [{"K": 1}, {"K": 2}]
    for words in ("1.0,x", "1.0,"):
        with pytest.raises(UserError, match="--temperature: .* is not a number"):
            parse(gen_hf.Arguments, "", ["--tokenizer", "m", "--temperature", words])


# With an engine


def test_a_part_s_responses_are_those_of_its_setting_alone(generate, tmp_path):
    """Whatever the number of shards, and the order of the parts."""
    fields = ("responses", "response_token_ids", "finish_reasons", "num_tokens")
    hot, cool = (generate(f"t{t}_", K=4, temperature=t) for t in (1.0, 0.7))
    mixed = generate("mixed", K=8, temperature=HALVES)
    assert mixed == generate("shards", K=8, temperature=HALVES, shards=2)
    turned = generate("turned", K=8, temperature="0.7,1.0")
    for one, two, both, other in zip(hot, cool, mixed, turned, strict=True):
        assert "response_sources" not in one
        for field in fields:
            assert both[field] == one[field] + two[field] and other[field] == two[field] + one[field]
        assert [entry["temperature"] for entry in both["response_sources"]] == [1.0] * 4 + [0.7] * 4
        assert both["prompt_token_ids"] == one["prompt_token_ids"] and both["id"] == one["id"]
    same = generate("same", K=4, temperature="1.0,1.0")
    assert [row["responses"] for row in same] == [row["responses"] for row in hot]
    with pytest.raises(UserError, match="temperature was .1.0, 0.7. and is now"):
        generate("mixed", K=8, temperature="0.7,1.0")


def test_parts_of_two_models_are_those_of_each_alone(generate, tmp_path, monkeypatch, capsys):
    """Text for text, whatever the shards, and in the order of the parts; the previous model has an engine of
    its own.
    """
    other = micro.make_policy(tmp_path / "other", seed=5, initializer_range=0.5)
    args = get_hf2.Arguments(model_name_or_path=str(other), dtype="float32", kv_cache_gib=0.25)
    mixed = {"K": 6, "mixture": json.dumps([{"K": 1, "model": "previous"}, {"K": 2}, {"K": 3} | COOL])}
    hot, cool = generate("hot", K=2), generate("cool", K=3, temperature=0.7)
    generate("policy", shards=2, **mixed)
    assert "parts of previous are not sampled here; see --parts_of" in capsys.readouterr().out
    path = str(tmp_path / "policy.jsonl")
    merge(monkeypatch, "--base_path", tmp_path / "policy", "--num_datasets", 2, "--output_dir", path)
    own = start_engine(args, 512, 512)
    monkeypatch.setattr(get_hf2, "start_engine", lambda *_: own)
    before = generate("before", K=1, model_name_or_path=other)
    generate("previous", "--parts_of", "previous", model_name_or_path=other, **mixed)
    files = [tmp_path / "previous0.jsonl", path]
    whole = join(monkeypatch, tmp_path / "whole.jsonl", *files)
    for row, *alone in zip(whole, before, hot, cool, strict=True):
        for field in ("responses", "response_token_ids", "finish_reasons", "num_tokens"):
            assert row[field] == [value for one in alone for value in one[field]]
        told = [(entry["model"], entry["temperature"]) for entry in row["response_sources"]]
        assert told == [("previous", 1.0)] + [("policy", 1.0)] * 2 + [("policy", 0.7)] * 3
        assert {key: row[key] for key in ("id", "prompt")} == {key: alone[1][key] for key in ("id", "prompt")}
    first = [(one["response_token_ids"][0], two["response_token_ids"][0]) for one, two in zip(before, hot)]
    assert sum(one != two for one, two in first) > 6, first  # else they would tell nothing
    made = read_manifest(tmp_path / "whole.jsonl")
    named = {key: mark["path"] for key, mark in made["inputs"].items() if key.startswith("model_name")}
    assert named == {
        "model_name_or_path": str(policy()),
        "model_name_or_path of previous": str(other),
    }
    assert made["counts"]["records"] == made["counts"]["prompts"] == 12
    with pytest.raises(UserError, match="parts_of was .'previous'. and is now None"):
        generate("previous", model_name_or_path=other, **mixed)


def test_a_part_with_a_system_prompt_of_its_own(generate, tmp_path):
    """Its prompt is another one; the record keeps that of the prompt itself, which training continues."""
    from vllm import SamplingParams

    parts = [{"K": 2}, {"K": 2, "temperature": 0.5, "top_p": 0.9, "system_prompt": "be odd"}]
    tokenizer, template = engine_vocabulary(), ChatTemplate(engine_vocabulary())
    for row in generate("system", K=4, mixture=json.dumps(parts)):
        assert row["prompt_token_ids"] == template.encode(row["prompt"], True)
        assert row["response_sources"][0] == {"temperature": 1.0, "top_p": 1.0, "system_prompt": None}
        assert row["response_sources"][3] == {"temperature": 0.5, "top_p": 0.9, "system_prompt": "be odd"}
        told = template.encode([{"role": "system", "content": "be odd"}, *row["prompt"]], True)
        params = SamplingParams(
            n=2, temperature=0.5, top_p=0.9, seed=sample_seed(42, 0, row["id"]), max_tokens=8,
            stop_token_ids=sampling.stop_ids(str(policy()), ChatTemplate(tokenizer), of()),
        )  # fmt: skip
        [found] = shared_engine().generate([{"prompt_token_ids": told}], params, use_tqdm=False)
        assert [list(sample.token_ids) for sample in found.outputs] == row["response_token_ids"][2:]


def test_a_system_prompt_that_the_template_leaves_out_is_no_part(generate, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    parts = json.dumps([{"K": 1}, {"K": 1, "system_prompt": "be odd"}])
    with pytest.raises(UserError, match="leaves out the system prompt of a part of --mixture"):
        generate("out", mixture=parts, chat_template=tmp_path / "t.jinja")


def test_a_prompt_whose_own_system_turn_is_that_of_a_part(tmp_path):
    """It is answered; where that would give the same responses twice it is left out, with that reason."""
    path, system = tmp_path / "p.jsonl", {"role": "system", "content": "be odd"}
    path.write_text(json.dumps({"prompt": [system, {"role": "user", "content": "Hi"}]}) + "\n")

    def read(*parts):
        args = of(dataset_name_or_path=str(path), output_dir="o", K=2, mixture=list(parts))
        output = SimpleNamespace(done=set(), skip=lambda *_: None)
        return sampling.Prompts(
            args, ChatTemplate(engine_vocabulary()), output, None, sampling.load_prompts(args)
        )

    [item] = read({"system_prompt": "be odd"}, {"temperature": 0.5}).items
    assert item.others["be odd"] == item.packed
    with pytest.raises(UserError, match="its own system turn is that of a part of --mixture"):
        read({"system_prompt": "be odd"}, {})


def test_a_stop_string_ends_the_text_and_its_tokens_stay(generate, tmp_path):
    """Training sees what was sampled, the stop string too; an edited text is not taken for it."""
    plain = generate("plain", K=4, max_new_tokens=40)
    encoder, stop = Encoder(ChatTemplate(engine_vocabulary())), ["e", "Q", "5", " "]
    made = generate("stopped", K=4, max_new_tokens=40, sampling_args=json.dumps({"stop": stop}))
    assert read_manifest(tmp_path / "stopped0.jsonl")["settings"]["sampling_args"] == {"stop": stop}
    ended = 0
    for row, before in zip(made, plain, strict=True):
        assert encoder.are_sampled(row, answers_of(row))
        for k, by in enumerate(row.get("stop_strings") or []):
            ids, text = row["response_token_ids"][k], row["responses"][k]
            assert ids == before["response_token_ids"][k][: len(ids)] and not any(s in text for s in stop)
            if by is not None:
                ended += 1
                assert row["finish_reasons"][k] == "stop"
                decoded = engine_vocabulary().decode(ids, skip_special_tokens=True)
                assert decoded.replace("\ufffd", "").endswith(by)
                edited = row | {"responses": [*row["responses"][:k], f"{text}!", *row["responses"][k + 1 :]]}
                assert not encoder.are_sampled(edited, answers_of(edited))
    assert ended > 10
    rewarded = tmp_path / "rewarded.jsonl"
    rewarded.write_text("".join(json.dumps(row | {"rewards": [0.0, 1, 2, 3]}) + "\n" for row in made))
    to_row = PairTokenizer(ChatTemplate(engine_vocabulary()), 512, 256)
    for row in read_rewarded(rewarded):
        [pair] = make_pairs(row)[0]
        trained, _ = to_row(pair)
        assert trained["chosen_ids"] == row["response_token_ids"][pair["chosen_index"]]
    assert to_row.counts["as_sampled"] == 24 and not to_row.counts["other_ids"]


def test_a_token_that_goes_beyond_the_stop_string_is_no_other_text():
    tokenizer = engine_vocabulary()
    encoder = Encoder(ChatTemplate(tokenizer))
    ids = tokenizer("no more\nUser: and", add_special_tokens=False)["input_ids"]
    row = {"responses": ["no more"], "prompt_token_ids": [1], "response_token_ids": [ids]}
    row |= {"finish_reasons": ["stop"], "num_tokens": [len(ids)]}
    assert encoder.are_sampled(
        row | {"stop_strings": ["\nUser:"]}, answers_of(row | {"stop_strings": ["\nUser:"]})
    )
    for other in ({}, {"stop_strings": ["User:"]}, {"stop_strings": ["\nUser;"]}):
        assert encoder.are_sampled(row, answers_of(row | other)) == (other.get("stop_strings") == ["User:"])


def test_sampling_args_reach_the_engine_and_wrong_values_are_one_line(generate):
    plain, given = generate("a", K=3), generate("b", K=3, sampling_args='{"min_tokens": 8, "min_p": 0.5}')
    assert all(n == 8 for row in given for n in row["num_tokens"]) and given != plain
    with pytest.raises(UserError, match="vLLM refuses the sampling settings: .*min_p"):
        generate("c", K=3, sampling_args='{"min_p": 5}')


# vLLM's own classes


def test_fields_are_those_of_vllm_s_classes():
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    def public(names):
        return {name for name in names if not name.startswith("_")}

    found = engine.fields_of("engine/arg_utils.py", "EngineArgs")
    assert found == public(EngineArgs.__dataclass_fields__) and engine.ENGINE_REFUSED.keys() <= found
    params = engine.fields_of("sampling_params.py", "SamplingParams")
    assert params == public(SamplingParams.__struct_fields__) and engine.SAMPLING_REFUSED.keys() <= params
    asked = engine.fields_of("entrypoints/openai/completion/protocol.py", "CompletionRequest")
    assert asked == public(CompletionRequest.model_fields)


def test_arguments_of_the_engine_start_it_or_are_refused(monkeypatch, tmp_path):
    """STAND-IN: `LLM`, which only takes note."""
    import vllm

    given = {}
    monkeypatch.setattr(vllm, "LLM", lambda **options: given.update(options) or 1 / 0)
    args = get_hf2.Arguments(
        model_name_or_path=str(policy()), engine_args={"quantization": "fp8", "block_size": 32}
    )
    with pytest.raises(UserError, match="vLLM cannot start"):
        get_hf2.start_engine(args, 512, 512)
    assert given["quantization"] == "fp8" and given["block_size"] == 32 and given["max_model_len"] == 512
    with pytest.raises(UserError, match="no 'quantisation' that is passed on, did you mean 'quantization'"):
        words = arguments(
            micro.write_prompts(tmp_path / "p.jsonl", 1) and tmp_path / "p.jsonl", tmp_path / "o"
        )
        get_hf2_main(monkeypatch, *words, "--engine_args.quantisation", "fp8")


# Servers


def ask(monkeypatch, tmp_path, server, **more):
    settings = {"tokenizer": policy(), "dataset_name_or_path": tmp_path / "p.jsonl", "ports": server.port}
    settings |= {"output_dir": tmp_path / "out.jsonl", "K": 6, "temperature": HALVES} | more
    words = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    monkeypatch.setattr("sys.argv", ["gen_hf.py", *words])
    gen_hf.main()


def test_a_client_asks_for_all_parts_and_saves_a_prompt_as_one(monkeypatch, tmp_path, capsys):
    micro.write_prompts(tmp_path / "p.jsonl", 10)
    with Mock(pause=0.02) as server:
        ask(monkeypatch, tmp_path, server, sampling_args='{"min_p": 0.1}', concurrency=2)
        assert server.most <= 4 and len(server.bodies) == 20
    assert sorted((body["temperature"], body["n"], body["min_p"]) for body in server.bodies) == [
        *[(0.7, 3, 0.1)] * 10,
        *[(1.0, 3, 0.1)] * 10,
    ]
    made = records(tmp_path / "out.jsonl")
    assert len(made) == 10 and "wrote 10 records" in capsys.readouterr().out
    for row in made:
        seed = row["responses"][0].split("/")[0]
        assert row["responses"] == [f"{seed}/{i}" for i in (0, 1, 2)] * 2  # a mock answers by seed alone
        assert [entry["temperature"] for entry in row["response_sources"]] == [1.0] * 3 + [0.7] * 3


def test_a_client_asks_for_the_parts_of_its_model_alone(monkeypatch, tmp_path):
    micro.write_prompts(tmp_path / "p.jsonl", 3)
    parts = json.dumps([{"K": 2}, {"K": 3, "model": "start"} | COOL, {"K": 1, "model": "previous"}])
    with Mock() as server:
        ask(monkeypatch, tmp_path, server, mixture=parts, temperature=1.0, parts_of="start")
    assert [(body["temperature"], body["n"]) for body in server.bodies] == [(0.7, 3)] * 3
    for row in records(tmp_path / "out.jsonl"):
        assert row["response_sources"] == [{"temperature": 0.7, "model": "start"}] * 3
    assert read_manifest(tmp_path / "out.jsonl")["settings"]["parts_of"] == ["start"]


def test_a_part_that_fails_fails_its_prompt_once(monkeypatch, tmp_path):
    micro.write_prompts(tmp_path / "p.jsonl", 6)
    bad = []

    def behave(count, body):
        bad[:] = bad or [body["seed"]]
        return 500 if body["seed"] == bad[0] and body["temperature"] == 0.7 else None

    with (
        Mock(behave) as server,
        pytest.raises(UserError, match="failed 4 times.*HTTP 500.*5 records are kept"),
    ):
        ask(monkeypatch, tmp_path, server, retries=3, concurrency=1)
    assert sum(body["seed"] == bad[0] and body["temperature"] == 0.7 for body in server.bodies) == 4
    assert len(records(tmp_path / "out.jsonl.partial")) == 5
