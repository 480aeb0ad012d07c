"""A loop whose responses are of the previous policy, too: two iterations of 24 prompts by real programs."""

import json
import shutil

import faults
import pytest
from faults import records

from common.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("built")

PARTS = [{"K": 1, "temperature": 0.7, "model": "previous"}, {"K": 3}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the run, its settings)."""
    folder = tmp_path_factory.mktemp("models")
    settings = [*faults.small_settings(folder), "--heldout_prompts", "null", "--iterations", 2]
    settings += ["--generation.mixture", json.dumps(PARTS), "--keep_iterates", 1]
    end = faults.loop(folder / "run", *settings)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-3000:]
    return folder / "run", settings


def test_answers_of_two_policies_are_trained_on(made):
    run, _ = made
    for i, models in ((1, None), (2, ["previous", "policy", "policy", "policy"])):
        rows = records(run / f"iter{i}/rewarded.jsonl")
        assert len(rows) == 24 and not list(run.glob(f"iter{i}/generated.p*"))
        for row in rows:
            assert [entry["temperature"] for entry in row["response_sources"]] == [0.7, 1.0, 1.0, 1.0]
            # before policy 1 there is one model
            assert [entry.get("model") for entry in row["response_sources"]] == (models or [None] * 4)
            assert len(row["rewards"]) == len(row["responses"]) == len(row["response_token_ids"]) == 4
    pairs = records(run / "iter2/pairs.jsonl")
    sides = [(pair["chosen_source"]["model"], pair["rejected_source"]["model"]) for pair in pairs]
    assert {"previous", "policy"} == {model for both in sides for model in both}
    inputs = read_manifest(run / "iter2/generated.jsonl")["inputs"]
    start = "tiny/built/policy"
    assert inputs["model_name_or_path"]["path"] == str(run / "iter1/model")
    assert inputs["model_name_or_path of previous"]["path"] == start
    card = (run / "iter2/model/README.md").read_text(encoding="utf-8")
    [line] = [line for line in card.splitlines() if line.startswith("| answers from")]
    assert str(run / "iter1/model") in line and start in line


def test_what_the_next_iteration_samples_from_is_kept(made):
    run, settings = made
    assert (run / "iter1/model").is_dir()
    planned = faults.loop(run, *settings, "--iterations", 3, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    [line] = [line for line in planned.stdout.splitlines() if "--parts_of previous" in line]
    assert f"--model_name_or_path {run}/iter1/model " in line


def test_a_second_start_does_nothing_and_another_mixture_is_refused_by_name(made):
    run, settings = made
    assert faults.loop(run, *settings, "--dry_run").stdout == ""
    other = json.dumps([{"K": 1, "model": "start"}, {"K": 3}])
    refused = faults.loop(run, *settings, "--generation.mixture", other, "--dry_run")
    assert refused.returncode == 2 and "generation.mixture was [{'K': 1, " in refused.stderr, refused.stderr


def test_parts_that_are_there_are_not_sampled_again(made, tmp_path):
    run, settings = shutil.copytree(made[0], tmp_path / "run"), made[1]
    shutil.rmtree(run / "iter2")
    (run / "iter2").mkdir()

    def commands():
        planned = faults.loop(run, *settings, "--stop_stage", "2.generate", "--dry_run")
        assert planned.returncode == 0, planned.stderr
        lines = [line for line in planned.stdout.splitlines() if line.startswith("python generation/")]
        return [line.split()[1] for line in lines], planned.stdout

    sampled = ["generation/get_hf2.py", "generation/merge_data.py"]
    assert commands()[0] == [*sampled * 2, "generation/join_parts.py"]
    (run / "iter2/generated.policy.jsonl").touch()
    names, said = commands()
    assert names == [*sampled, "generation/join_parts.py"] and "--parts_of policy" not in said
    (run / "iter2/generated.previous.jsonl").touch()
    assert commands()[0] == ["generation/join_parts.py"]
    (run / "iter2/generated.jsonl").touch()
    assert commands()[0] == []
