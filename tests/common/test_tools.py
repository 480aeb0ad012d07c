"""Tool calls, their results and the definitions of tools: each stage writes them as the policy's or the
scorer's template does.
"""

import json

import micro
import pytest

from annotate_data import get_rewards
from annotate_data.backbone import Backbone
from annotate_data.generated import read_generated, survey
from annotate_data.preference import context_of
from common import models, tokens
from common.chat import ChatTemplate
from common.cli import UserError
from common.jsonl import jsonl_records
from common.manifest import Output, write_jsonl
from dpo_iteration.pairs import select_pairs
from dpo_iteration.rows import PairTokenizer
from generation import sampling
from ppo import inputs
from report import samples

# Written for these tests in the shape of Qwen2.5's and its kin: definitions in front, calls and results in
# turns of their own.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% "
    "endif %}"
    "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}user\n<tool_response>{{ m.content "
    "}}</tool_response>"
    "{% else %}{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function "
    "| tojson }}</tool_call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
TALK = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
RESPONSES = ["Cold.", "Mild."]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = micro.make_reward_model(
        tmp_path_factory.mktemp("model") / "m", "chatml"
    )  # its tokenizer is a policy's too
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def tokenizer(policy):
    return models.load_tokenizer(str(policy))


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"messages": TALK, "tools": json.dumps(TOOLS), "gold": 4}])
    return str(tmp_path / "p.jsonl")


def test_every_stage_renders_the_same_prompt(policy, tokenizer, prompts, tmp_path):
    wanted = tokenizer.apply_chat_template(TALK, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert '"Oslo"' in wanted and "4 degrees" in wanted and '"properties"' in wanted
    ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    # generation: what the engine is given
    args = sampling.SamplingArguments(dataset_name_or_path=prompts, output_dir="", K=2)
    output = Output(tmp_path / "gen.jsonl", "test", {}, {})
    found = sampling.Prompts(args, ChatTemplate(tokenizer), output, None, sampling.load_prompts(args))
    [item] = found.items
    assert item.token_ids == ids
    output.append(
        sampling.answered(
            args,
            item,
            [
                sampling.Sample(text, "stop", tokenizer(f"{text}<|im_end|>")["input_ids"])
                for text in RESPONSES
            ],
        )
    )
    found.finish(1.0)
    # annotation: what a reward model reads
    [record] = read_generated(tmp_path / "gen.jsonl")
    assert record["prompt"] == TALK and record["tools"] == TOOLS and record["gold"] == 4
    scorer = Backbone(str(policy))
    [group], _ = scorer.encode_all([record])
    turns = [[*TALK, {"role": "assistant", "content": response}] for response in RESPONSES]
    whole = [tokenizer.apply_chat_template(turn, tools=TOOLS, tokenize=False) for turn in turns]
    assert [tokenizer.decode(list(row)) for row in group] == whole
    assert scorer.left_out(TALK, TOOLS) == []
    # training: what the loss sees
    write_jsonl(tmp_path / "rewarded.jsonl", [record | {"rewards": [0.0, 1.0]}])
    [pair] = select_pairs([tmp_path / "rewarded.jsonl"]).pairs
    write_jsonl(tmp_path / "pairs.jsonl", [pair])
    [pair] = jsonl_records(tmp_path / "pairs.jsonl")
    for given in (
        pair,
        {key: value for key, value in pair.items() if not key.endswith("token_ids")},
    ):  # as sampled, and from text
        row, _ = PairTokenizer(ChatTemplate(tokenizer), 2000, 2000)(given)
        written = [
            tokenizer.decode(row["prompt_ids"] + row[f"{side}_ids"]) for side in ("rejected", "chosen")
        ]
        assert row["prompt_ids"] == ids and written == [text.removesuffix("\n") for text in whole]
    # divergence, PPO and the page
    assert tokens.Encoder(ChatTemplate(tokenizer))(record, tokens.answers_of(record))[0] == ids
    args = sampling.SamplingArguments(dataset_name_or_path=[prompts], max_input_length=2000)
    [(found, text, _)] = inputs.rendered_prompts(args, ChatTemplate(tokenizer), [])
    assert text == wanted and found["prompt"] == TALK and found["tools"] == TOOLS
    assert samples.turns(TALK)[1] == ["assistant", json.dumps(CALL)]
    assert '"Oslo"' in context_of(TALK) and "None" not in context_of(TALK)


def test_what_a_template_leaves_out_is_named(tokenizer):
    left_out = lambda messages, tools=None: ChatTemplate(tokenizer).left_out(messages, True, tools)  # noqa: E731
    assert left_out(TALK, TOOLS) == [] and left_out(TALK[:1]) == []
    tokenizer.chat_template = micro.TEMPLATES["chatml"]
    assert left_out(TALK, TOOLS) == ["tools", "tool_calls"] and left_out(TALK[:1], TOOLS) == ["tools"]
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert left_out(TALK) == ["tool_calls", "tool turns"]


def test_a_record_that_a_reward_model_refuses_costs_that_record(tmp_path, monkeypatch, capsys):
    """The reward model takes no system turn.

    Such a record has rewards of null, and the others have theirs.
    """
    folder = micro.make_reward_model(tmp_path / "m", "mistral", "mistral")
    user = [{"role": "user", "content": "a"}]
    rows = [
        {"id": "a", "prompt": user},
        {"id": "b", "prompt": [{"role": "system", "content": "s"}, *user]},
        {"id": "c", "prompt": user},
    ]
    write_jsonl(tmp_path / "gen.jsonl", [row | {"responses": ["x", "yy"]} for row in rows])
    argv = [
        "x",
        "--dataset_name_or_path",
        str(tmp_path / "gen.jsonl"),
        "--output_dir",
        str(tmp_path / "out.jsonl"),
        "--reward_name_or_path",
        str(folder),
    ]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    get_rewards.main()
    told = capsys.readouterr().out
    assert "gen.jsonl record 2: the chat template" in told and "1 records have rewards of null" in told
    found = {record["id"]: record["rewards"] for record in jsonl_records(tmp_path / "out.jsonl")}
    assert found["b"] == [None, None] and None not in found["a"] + found["c"]
    write_jsonl(tmp_path / "gen.jsonl", [rows[1] | {"responses": ["x", "yy"]}])
    with pytest.raises(
        UserError, match="gen.jsonl record 1: the chat template"
    ):  # one that takes none is the wrong model, or template
        get_rewards.check_turns(
            [Backbone(str(folder))],
            [get_rewards.Job(tmp_path / "gen.jsonl", None, *survey(tmp_path / "gen.jsonl"))],
        )


def test_ppo_leaves_out_what_it_cannot_use(tokenizer, tmp_path, capsys):
    talks = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}, {"role": "robot", "content": "c"}],
        TALK,
    ]
    write_jsonl(tmp_path / "p.jsonl", [{"messages": talk} for talk in talks])
    args, bad = (
        sampling.SamplingArguments(dataset_name_or_path=[str(tmp_path / "p.jsonl")], bad_prompts="skip"),
        [],
    )
    args.rollout_batch_size = 1
    kept = [record for record, *_ in inputs.rendered_prompts(args, ChatTemplate(tokenizer), bad)]
    assert [record["prompt"] for record in kept] == [talks[0], TALK] and "record 2: the last turn" in bad[0][
        "reason"
    ]
    assert "warning: 1 prompt skipped" in capsys.readouterr().err

    class NoTools:
        name = "stand-in"

        def check(self, messages, tools=None):
            if messages[-1]["role"] == "tool":
                raise UserError("it refuses the turns")

        def left_out(self, messages, tools=None):
            return []

    kept, bad = inputs.scorable_prompts(args, [NoTools()], kept)
    assert [record["prompt"] for record in kept] == talks[:1] and bad[0]["reason"] == "it refuses the turns"
    args.bad_prompts = "refuse"
    with pytest.raises(UserError, match="record 2: the last turn .*bad_prompts skip"):
        list(inputs.rendered_prompts(args, ChatTemplate(tokenizer), []))
