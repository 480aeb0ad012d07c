"""What the loop makes of `eval_reward_model`, `divergence` and `report_to`: which steps are left, and with
which arguments.
"""

from pathlib import Path

import pytest
import yaml

from annotate_data import get_rewards
from common.cli import UserError, build
from common.manifest import fingerprint, write_json
from evaluation import divergence
from loop import preflight
from loop.run import Run
from loop.settings import LoopSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A run of the tiny configuration with some settings changed; nothing of it is there yet."""
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load((ROOT / "configs/loop_tiny.yaml").read_text())
    settings |= {"run_dir": str(tmp_path / "run"), "model_name_or_path": str(tmp_path / "start")}
    return lambda **more: Run(build(LoopSettings, settings | more))


def test_the_judge_scores_the_held_out_answers_with_its_own_arguments(make):
    run = make(
        eval_reward_model=["a/one", "b/two"],
        eval_annotation={"reward_weights": [1, 0.5]},
        annotation={"max_length": 99},
    )
    steps, _ = run.steps(1, "evaluate")
    assert steps == ["generate", "annotate", "judge", "divergence", "metrics"]
    args = build(get_rewards.Arguments, yaml.safe_load(Path(run.path(1, "evaluate_judge.yaml")).read_text()))
    assert (
        args.reward_name_or_path == ["a/one", "b/two"]
        and args.reward_weights == [1.0, 0.5]
        and args.max_length == 4096
    )
    assert args.output_dir == [run.path(1, f"heldout_{kind}.judged.jsonl") for kind in ("sampled", "greedy")]
    assert args.dataset_name_or_path == [
        run.path(1, f"heldout_{kind}.generated.jsonl") for kind in ("sampled", "greedy")
    ]
    assert "judge" not in make().steps(1, "evaluate")[0] and "judge" not in run.steps(1, "generate")[0]


def test_the_kl_is_to_the_start_at_the_held_out_temperature(make):
    run = make(reference="previous", heldout={"temperature": 0.7})
    run.steps(2, "evaluate")
    args = build(divergence.Arguments, yaml.safe_load(Path(run.path(2, "divergence.yaml")).read_text()))
    assert (args.model_name_or_path, args.ref_model_name_or_path, args.temperature) == (
        run.iterate(2),
        run.iterate(0),
        0.7,
    )
    for more in ({"divergence": False}, {"heldout": {"temperature": 0.0}}):
        assert "divergence" not in make(**more).steps(2, "evaluate")[0]


def done(run, i):
    """Put a complete divergence of iterate i there, as of these settings."""
    args = build(divergence.Arguments, run.divergence(i))
    settings, inputs = divergence.shaping(args)
    for name in inputs.values():
        if name and not Path(name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("{}\n")
    marks = {key: fingerprint(name) for key, name in inputs.items() if name}
    write_json(
        run.path(i, "divergence.manifest.json"), {"settings": settings, "inputs": marks, "complete": True}
    )
    Path(args.output_dir).write_text("{}\n")
    write_json(divergence.summary_path(args.output_dir), {"kl": 1.0})


def test_what_is_there_is_left_alone_and_what_changed_is_refused(make):
    run = make()
    assert run.divergence_left(1)
    done(run, 1)
    assert not run.divergence_left(1)
    with pytest.raises(UserError, match="temperature was 1.0 and is now 0.8"):
        make(heldout={"temperature": 0.8}).divergence_left(1)
    Path(run.path(1, "divergence.json")).unlink()
    assert run.divergence_left(1)
    Path(run.path(1, "model.pruned")).touch()  # what is gone cannot be measured
    assert not run.divergence_left(1)


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
        ({"report_to": ["wanbd"]}, "report_to wanbd: one of none, wandb, tensorboard, "),
    ],
)
def test_wrong_settings_are_problems_of_the_check(make, more, named):
    found = preflight.Findings()
    preflight.check_models(make(**more), found)
    assert any(named in problem for problem in found.problems), found.problems
