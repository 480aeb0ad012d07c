"""What the settings of a run come to: values for the driver, sections for the scripts, and what is
refused.
"""

import re
from pathlib import Path

import pytest
import yaml

from common.cli import UserError, build
from loop import changes, check
from loop.plan import Plan, with_config
from loop.settings import LoopSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A plan of the tiny configuration with some settings changed; nothing of it is there yet."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("loop.machines.visible_gpus", lambda: [])
    settings = yaml.safe_load((ROOT / "configs/loop_tiny.yaml").read_text())
    settings |= {"run_dir": str(tmp_path / "run"), "model_name_or_path": str(tmp_path / "start")}
    return lambda **more: Plan(build(LoopSettings, settings | more))


def values(plan):
    found = {}
    for key, value in plan.values(plan.stages(None, None)):
        if key.endswith("[]"):
            found.setdefault(key, []).append(value)
        else:
            found[key] = value
    return found


def test_the_second_judge_has_its_own_models_and_arguments(make):
    plan = make(
        eval_reward_model=["a/one", "b/two"],
        eval_annotation={"reward_weights": [1, 0.5]},
        annotation={"max_length": 99},
    )
    assert values(plan)["judges[]"] == ["a/one", "b/two"] and "judges[]" not in values(make())
    held = plan.resolved()
    assert (
        held["eval_annotation"]["reward_weights"] == [1.0, 0.5]
        and held["eval_annotation"]["max_length"] == 4096
    )
    assert held["annotation"]["max_length"] == 99


def test_the_kl_is_at_the_held_out_temperature_and_none_of_greedy_answers(make):
    assert make(heldout={"temperature": 0.7}).resolved()["heldout"]["temperature"] == 0.7
    assert values(make())["divergence"] is True
    for more in ({"divergence": False}, {"heldout": {"temperature": 0.0}}):
        assert not values(make(**more))["divergence"]


def test_responses_may_be_of_a_mixture_and_held_out_answers_are_of_one_temperature(make):
    plan = make(generation={"K": 8, "temperature": "1.0,0.7"})  # as --generation.temperature 1.0,0.7
    held = values(plan)
    assert held["generation.temperature"] == "1.0,0.7" and held["heldout.temperature"] == "1.0"
    resolved = plan.resolved()
    assert resolved["generation"]["temperature"] == [1.0, 0.7] and resolved["heldout"]["temperature"] == 1.0
    parts = [{"K": 6, "temperature": 0.7, "top_p": 0.9, "system_prompt": "be odd"}, {"K": 2}]
    given = {"K": 8, "mixture": parts}
    resolved = make(generation=given).resolved()
    assert resolved["generation"]["mixture"] == parts and resolved["heldout"]["mixture"] is None
    found = {key: resolved["heldout"][key] for key in ("temperature", "top_p", "system_prompt")}
    assert found == {"temperature": 0.7, "top_p": 0.9, "system_prompt": None}
    own = make(generation=given, heldout={"temperature": 0.5})
    assert own.resolved()["heldout"]["temperature"] == 0.5
    for plan, told in ((make(generation=given), True), (own, False)):
        check.check_heldout(plan, found := check.Findings())
        assert any("held-out answers are sampled at temperature 0.7" in note for note in found.notes) == told


def test_a_mixture_s_models_are_those_that_an_iteration_has(make):
    """Before policy 1 the start is all of them, before policy 2 it is the previous policy."""
    parts = [{"K": 3, "model": "start"}, {"K": 4, "temperature": 0.5}, {"K": 1, "model": "previous"}]
    plan = make(generation={"K": 8, "mixture": parts}, keep_iterates=1, iterations=4)
    found = values(plan)
    named = [found[f"parts.{i}"] for i in (1, 2, 3, 4)]
    whole = "policy previous start"
    assert named == [whole.replace(" ", ","), "policy previous,start", whole, whole]
    assert found["heldout.temperature"] == "0.5" and found["keep_iterates"] == 2  # the next samples from it
    check.check_mixture(plan, notes := check.Findings())
    assert "once more an iteration" in notes.notes[0] and "keep_iterates 1: 2 are kept" in notes.notes[1]
    plan = make(generation={"K": 8, "mixture": parts[:1] + [{}]}, keep_iterates=1, iterations=3)
    found = values(plan)
    assert [found[f"parts.{i}"] for i in (1, 2, 3)] == ["policy,start", "policy start", "policy start"]
    assert found["keep_iterates"] == 1 and values(make())["keep_iterates"] is None
    found = values(make(generation={"K": 8, "mixture": [{"K": 4}, {"temperature": 0.5}]}))
    assert not [key for key in found if key.startswith("parts.")]


@pytest.mark.parametrize(
    "first, last, named",
    [
        (None, "0.4", "0.evaluate"),
        ("1.1", "1.1", "1.generate"),
        ("generate", "2", "1.generate 1.annotate"),
        ("3.train", "7.1", "3.train 3.evaluate"),
    ],
)
def test_stages(make, first, last, named):
    assert " ".join(make().stages(first, last)) == named


@pytest.mark.parametrize(
    "first, last, told",
    [
        ("7", None, "--stage 7: ITERATION.STAGE was expected"),
        ("9.1", None, "there are 3 iterations"),
        ("2.1", "1.4", "comes behind"),
        ("x.train", None, "was expected"),
        ("-1.train", None, "was expected"),
        ("0.train", None, "was expected"),
    ],
)
def test_stages_that_are_not_there(make, first, last, told):
    with pytest.raises(UserError, match=told):
        make().stages(first, last)


def test_prompt_sets_are_taken_in_turn(make):
    found = values(make(prompts=["a", "b"], iterations=3))
    assert [found[f"prompts.{i}"] for i in (1, 2, 3)] == ["a", "b", "a"]


def test_without_held_out_prompts_nothing_is_evaluated(make):
    plan = make(heldout_prompts=None)
    assert plan.stages(None, None)[:4] == ["1.generate", "1.annotate", "1.train", "2.generate"]
    assert plan.resolved()["heldout"] == {} and len(plan.jobs()) == 1


@pytest.mark.parametrize(
    "words, given",
    [
        (["a.yaml", "--K", "4"], ["a.yaml", "--K", "4"]),
        (["--iterations", "5", "a.yaml"], ["a.yaml", "--iterations", "5"]),
        (["--seed=3", "a.yml"], ["a.yml", "--seed=3"]),
        (["--prompts", "p", "--seed", "1"], ["default.yaml", "--prompts", "p", "--seed", "1"]),
        (["--training", "t.yaml"], ["default.yaml", "--training", "t.yaml"]),
        ([], ["default.yaml"]),
    ],
)
def test_where_the_config_stands(words, given):
    assert with_config(words, "default.yaml") == given


def made(plan, name, settings, inputs):
    """Put a complete output of a run there, as a script leaves it."""
    from common.manifest import beside, fingerprint, write_json

    path = plan.folder.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")
    marks = {key: fingerprint(str(value)) for key, value in inputs.items()}
    write_json(beside(path, ".manifest.json"), {"settings": settings, "inputs": marks, "complete": True})


def test_changes_are_refused_where_something_was_made_from_what_was(make, tmp_path):
    first = tmp_path / "p.jsonl"
    first.write_text('{"prompt": "a"}\n')
    plan = make(prompts=[str(first)])
    plan.before = plan.resolved()

    def refused(**more):
        other = make(**({"prompts": [str(first)]} | more))
        other.before = plan.before
        try:
            return "; ".join(changes.refuse(other, other.resolved()))
        except UserError as error:
            return str(error)

    assert refused() == ""
    held = "this holds for what is made from here on"  # nothing is there yet
    changed = ("seed was 0 and is now 9", "generation.K was 8 and is now 2", "heldout.K was 8 and is now 2")
    told = refused(seed=9, generation=plan.settings.generation | {"K": 2})
    assert told == "; ".join(f"{line}; {held}" for line in changed)
    made(plan, "iter1/generated.jsonl", {}, {"dataset_name_or_path": first})
    made(plan, "iter1/rewarded.jsonl", {}, {})
    assert "rewarded.jsonl was made with other settings: reward_name_or_path was ['tiny/" in refused(
        reward_name_or_path=["a/b"]
    )
    assert "iter1/generated.jsonl was made with other settings: seed was 0 and is now 9" in refused(seed=9)
    assert "K was 8 and is now 2" in refused(generation=plan.settings.generation | {"K": 2})
    more = {"training_args": {"beta": 0.7}, "generation": plan.settings.generation | {"kv_cache_gib": 3}}
    told = refused(**more, iterations=9)  # also what shapes nothing
    assert f"training_args.beta was 0.1 and is now 0.7; {held}" in told and "was made" not in told
    assert "generation.kv_cache_gib was None and is now 3.0" in told
    del plan.before["report"], plan.before["generation"]["bad_prompts"]  # a version wrote it that had no such
    del plan.before["training_args"]["date"], plan.before["machines"]
    assert refused() == ""
    plan.before = plan.resolved()
    other = tmp_path / "q.jsonl"
    other.write_text('{"prompt": "b, and longer"}\n')
    assert f"prompts was '{first}' and is now '{other}'" in refused(prompts=[str(other)])
    other.write_bytes(first.read_bytes())
    assert "was made" not in refused(prompts=[str(other)])  # the same data under another name
    made(plan, "iter1/model", {}, {})
    assert "iter1/model was made with other settings: training_args.beta was" in refused(
        training_args={"beta": 0.7}
    )
    unit = plan.before["training_args"].pop("length_penalty_unit")  # that version counted tokens
    assert unit == "token" and "was made" not in refused()
    told = refused(training_args={"length_penalty_unit": "character"})
    assert "length_penalty_unit was 'token' and is now 'character'" in told
    before, plan.before = plan.before, {}
    assert "loop.yaml is empty or gone, so nobody can tell" in refused()
    plan.before = before
    first.write_text('{"prompt": "edited in place"}\n')
    assert "dataset_name_or_path" in refused() and "has changed since" in refused()


def test_another_mixture_is_refused_where_one_model_has_given_its_parts(make, tmp_path):
    first, other = tmp_path / "p.jsonl", tmp_path / "q.jsonl"
    first.write_text('{"prompt": "a"}\n')
    other.write_text('{"prompt": "b, and longer"}\n')

    def plan(model, prompts=first):
        parts = [{"K": 4}, {"K": 4, "model": model}]
        return make(prompts=[str(prompts)], generation={"K": 8, "mixture": parts})

    before = plan("previous")
    made(before, "iter2/generated.policy.jsonl", {}, {"dataset_name_or_path": first})
    for now, told in (
        (plan("previous"), None),
        (plan("start"), "iter2/generated.policy.jsonl was made with other settings: generation.mixture was"),
        (plan("previous", other), f"prompts was '{first}' and is now '{other}'"),
    ):
        now.before = before.resolved()
        if told is None:
            assert changes.refuse(now, now.resolved()) == []
        else:
            with pytest.raises(UserError, match=re.escape(told)):
                changes.refuse(now, now.resolved())


@pytest.mark.parametrize(
    "more, named",
    [
        (
            {"eval_reward_model": ["tiny/built/reward_model"]},
            "eval_reward_model tiny/built/reward_model is what training is rewarded by",
        ),
        ({"eval_reward_model": ["./nowhere"]}, "nowhere: no such folder"),
        ({"eval_reward_model": ["a/b"], "eval_annotation": {"max_lenght": 3}}, "did you mean 'max_length'"),
        ({"eval_reward_model": ["a/b", "c/d"]}, "need --reward_weights"),
        ({"generation": {"K": 7, "temperature": [1.0, 0.7]}}, "--generation.K 7 cannot be shared out evenly"),
        (
            {"generation": {"mixture": [{"K": 5}]}},
            "K 5 together and --generation.K is 8: give --generation.K 5",
        ),
        (
            {"generation": {"mixture": [{"model": "before"}]}},
            "model in part 1 of --generation.mixture: 'before' is not one of policy, previous, start",
        ),
        ({"generation": {"mixture": [{"model": "start"}]}}, "--generation.mixture has no part of policy"),
        ({"generation": {"parts_of": ["start"]}}, "generation.parts_of is what the run itself decides"),
        ({"heldout": {"temperature": [1.0, 0.7]}}, "held-out answers are sampled at one temperature"),
        ({"generation": {"engine_args": {"model": "x"}}}, "--generation.engine_args may not hold model"),
        ({"generation": {"sampling_args": {"n": 2}}}, "--generation.sampling_args may not hold n"),
        ({"report_to": ["wanbd"]}, "report_to wanbd: one of none, wandb, tensorboard, "),
    ],
)
def test_wrong_settings_are_problems_of_the_check(make, more, named):
    found = check.Findings()
    check.check_models(make(**more), found)
    assert any(named in problem for problem in found.problems), found.problems
