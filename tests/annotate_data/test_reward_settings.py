"""Settings of get_rewards.py, as the loop and its check before the run see them; no model, no torch."""

import json
from pathlib import Path

import pytest
import yaml

from annotate_data import get_rewards
from common.cli import UserError, build, parse
from common.models import check_model
from loop import check
from loop.plan import Plan
from loop.settings import LoopSettings

ROOT = Path(__file__).resolve().parents[2]
PAIRS = "pair-preference-model-1B"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Makes the settings of a tiny run whose models are folders with a config and a template only."""
    monkeypatch.chdir(ROOT)
    kinds = {"bt": "LlamaForSequenceClassification", "armo": "LlamaForRewardModelWithGating"}
    kinds |= {"odd": "InternLM2ForRewardModel"} | dict.fromkeys(("policy", PAIRS), "LlamaForCausalLM")
    for name, architecture in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        (tmp_path / name / "chat_template.jinja").write_text("x")
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    (tmp_path / "f.py").write_text("def f(messages, response):\n    return 0\n")

    def make(*models, **annotation):
        base = yaml.safe_load((ROOT / "configs" / "loop_tiny.yaml").read_text())
        changed = {
            "run_dir": str(tmp_path / "run"),
            "model_name_or_path": str(tmp_path / "policy"),
            "gold_function": None,
            "prompts": [str(tmp_path / "train.jsonl")],
            "heldout_prompts": str(tmp_path / "heldout.jsonl"),
            "reward_name_or_path": [str(tmp_path / name) for name in models] or None,
            "annotation": annotation,
        }
        return Plan(build(LoopSettings, base | changed))

    return make


GIVEN = {"dataset_name_or_path": ["a"], "output_dir": ["b"]}


def told(run, capsys):
    """What the check refuses, all of it; empty where it accepts."""
    try:
        check.check(run, left=True)
    except UserError as error:
        return capsys.readouterr().err + str(error)
    return ""


def test_every_kind_passes_the_check_before_the_run(settings, tmp_path, capsys):
    function = f"{tmp_path / 'f.py'}:f"
    for run in (
        settings("bt"),
        settings("armo"),
        settings(PAIRS, ranking="tournament"),
        settings("policy", reward_type="pair_preference"),
        settings(reward_function=function),
        settings("bt", "armo", reward_weights=[0.7, 0.3]),
        settings("bt", reward_function=function, reward_weights=[1, 2]),
    ):
        assert told(run, capsys) == ""
        given = GIVEN | {"reward_name_or_path": run.settings.reward_name_or_path}
        build(get_rewards.Arguments, run.resolved()["annotation"] | given)


def test_prompts_that_the_template_refuses_are_told_by_the_check(settings, tmp_path, capsys):
    one = "{{ raise_exception('not this') if m.content == 'bad' else bos_token + m.content }}"
    (tmp_path / "policy" / "chat_template.jinja").write_text(f"{{% for m in messages %}}{one}{{% endfor %}}")
    config = {"bos_token": {"content": "<s>"}, "chat_template": "another"}
    (tmp_path / "policy" / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [json.dumps({"prompt": text}) + "\n" for text in ("good", "bad", 5, "fine")]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    run = settings("bt")
    check.check(run, left=True)
    noted = capsys.readouterr().err
    for part in ("2 prompts of", "train.jsonl record 2: the chat template of", "not this"):
        assert part in noted
    run.settings.generation["bad_prompts"] = "refuse"
    refused = told(run, capsys)
    assert "train.jsonl record 2: the chat template" in refused and "1 more prompts" in refused
    run.settings.generation["bad_prompts"] = "skip"
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "bad"}) + "\n")
    assert "heldout.jsonl record 1: the chat template" in told(run, capsys)


@pytest.mark.parametrize("models, annotation, named", [
    (("policy",), {}, "is a LlamaForCausalLM, as a policy is"),
    (("odd",), {}, "InternLM2ForRewardModel; known are"),
    (("bt",), {"reward_type": "armorm"}, "which is bradley_terry, not --reward_type armorm"),
    (("bt", "armo"), {}, "need --reward_weights"),
    (("bt",), {"max_length": 0}, "--max_length must be at least 1"),
    (("bt",), {"chunk_records": 0}, "--chunk_records must be at least 1"),
    (("bt",), {"ranking": "tournament"}, "--ranking is for pair_preference reward models"),
    (("bt",), {"rewards_weights": [1]}, "did you mean 'reward_weights'"),
    (("bt",), {"reward_function": "nowhere.py:f", "reward_weights": [1, 1]}, "no such reward function file"),
    (("nowhere",), {}, "nowhere: no such folder"),
    ((), {}, "names no reward model"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_the_run(models, annotation, named, settings, capsys):
    assert named in told(settings(*models, **annotation), capsys)


def test_names_that_only_look_like_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model("models/rm", "--reward_name_or_path")  # no such folder: the hub's
    (tmp_path / "models" / "rm2").mkdir(parents=True)
    with pytest.raises(UserError, match="models/rm: no such folder in models/; there is rm2"):
        check_model("models/rm", "--reward_name_or_path")


def test_none_on_the_command_line_leaves_a_function_alone(tmp_path):
    (tmp_path / "run.yaml").write_text("reward_name_or_path: my/model\n")
    arguments = [str(tmp_path / "run.yaml"), "--dataset_name_or_path", "a", "--output_dir", "b"]
    arguments += ["--reward_function", "f.py:f"]
    assert parse(get_rewards.Arguments, "", arguments).reward_name_or_path == ["my/model"]
    args = parse(get_rewards.Arguments, "", [*arguments, "--reward_name_or_path", "none"])
    assert args.reward_name_or_path is None and get_rewards.names(args) == []


def test_what_shapes_a_reward():
    def shaping(**more):
        return get_rewards.shaping(build(get_rewards.Arguments, GIVEN | more), "a")

    settings, inputs = shaping()
    model = {"reward_name_or_path": "sfairXC/FsfairX-LLaMA3-RM-v0.1"}
    assert inputs == {"dataset_name_or_path": "a", "chat_template": None} | model
    for key in ("K", "batch_tokens", "chunk_records"):
        assert shaping(**{key: 5}) == (settings, inputs)
    more = {"ranking": "tournament", "max_length": 7}
    assert shaping(**more)[0] == settings | more
