"""What ppo/train_ppo.py refuses before it loads a model, or once it knows its scorers."""

import micro
import pytest
from small_ppo import argv

from common.cli import UserError
from common.training import Training

WRONG = {
    "nothing scores": {"reward_function": ...},
    "does not divide by 1 process × micro_batch_size 3": {"micro_batch_size": 3},
    "generation_batch_size 1 is below": {"generation_batch_size": 1},
    "gae_lambda 1.5": {"gae_lambda": 1.5},
    "lr_scheduler_type constant has no warm-up": {"lr_scheduler_type": "constant", "warmup_steps": 3},
    "warmup_steps 7 is more than the 6 optimizer steps": {"warmup_steps": 7},
    "needs --reward_weights|need --reward_weights": {"reward_name_or_path": ["RM"]},
    "is the model .* itself": {"output_dir": "POLICY"},
    "12 prompts for rollouts of 16": {"rollout_batch_size": 16, "batch_size": 32},
    "has 512 positions": {"max_input_length": 510},
    "advantage_estimator rloo has no value model": {
        "critic_name_or_path": "RM",
        "advantage_estimator": "rloo",
    },
    "advantage_estimator rloo compares": {"advantage_estimator": "rloo", "samples_per_prompt": 1},
    "has another vocabulary": {"critic_name_or_path": "RM_CHATML"},
    "no such input|no such prompt": {"dataset_name_or_path": ["./nowhere.jsonl"]},
    "cannot write": {"output_dir": "FILE/model"},
    "is a file, a folder was expected": {"output_dir": "FILE"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_end_with_one_clear_line(work, here, message):
    (work / "file").write_text("")
    names = {"RM": "rm", "RM_CHATML": "rm_chatml", "POLICY": "policy", "FILE": "file"}
    places = {name: work / folder for name, folder in names.items()}

    def there(value):
        if isinstance(value, list):
            return [there(v) for v in value]
        name, slash, rest = str(value).partition("/")
        return f"{places[name]}{slash}{rest}" if name in places else value

    with pytest.raises(UserError, match=message) as error:
        here(argv(work, "wrong", **{key: there(value) for key, value in WRONG[message].items()}))
    assert all("\n" not in line for line in str(error.value).split("\nerror: "))  # more of them, a line each


def test_one_response_a_prompt_is_refused_where_responses_are_compared(work, here):
    """`auto` knows a pair-preference model by its published name; alone each response would score 0.5, for
    the whole run.
    """
    name = str(micro.make_pair_preference(work / "pair-preference-model-x"))
    more = {"reward_name_or_path": [name], "reward_function": ..., "samples_per_prompt": 1}
    for kind in ("auto", "pair_preference"):
        with pytest.raises(UserError, match="compares the responses of a prompt: give samples_per_prompt 2"):
            here(argv(work, "wrong", reward_type=[kind], **more))


def test_a_second_run_into_the_same_folder_is_refused_and_sharding_too(work, here, monkeypatch):
    with Training(work / "locked", "", {}, {}).locked():
        with pytest.raises(UserError, match="another process is training into"):
            here(argv(work, "locked"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DEEPSPEED would cut them up: launch it with configs/ddp.yaml"):
        here(argv(work, "locked"))
