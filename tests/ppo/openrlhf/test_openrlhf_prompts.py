"""What OpenRLHF is given to read: whole rollouts, and a policy that stops."""

import json
from types import SimpleNamespace

import pytest

from common.cli import UserError
from ppo.openrlhf.prompts import load_tokenizer, prepare_policy, whole_rollouts


def test_a_policy_whose_config_lacks_the_end_of_turn_stops_anyway(models, tmp_path):
    """RLHFlow/LLaMA3-SFT is such a one: vLLM under OpenRLHF knows no stop tokens but EOS and
    generation_config.json's.
    """
    tokenizer = load_tokenizer(str(models["policy"]))
    source, made = tmp_path / "source", tmp_path / "policy"
    source.mkdir()
    for file in models["policy"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = {"eos_token_id": tokenizer.eos_token_id, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(config))
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    tokenizer.chat_template = "{# mine #}" + tokenizer.chat_template
    prepare_policy(SimpleNamespace(model_name_or_path=str(source)), tokenizer, made)
    config = json.loads((made / "generation_config.json").read_text())
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert set(config["eos_token_id"]) == {tokenizer.eos_token_id, end_of_turn}
    assert config["temperature"] == 0.6
    assert (made / "model.safetensors").resolve() == (source / "model.safetensors").resolve()
    assert load_tokenizer(str(made)).chat_template.startswith("{# mine #}")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize(
    "maximum, episodes, expected",
    [(None, 1, (24, 2, 1)), (2, 3, (8, 18, 1)), (13, 3, (24, 2, 2)), (99, 3, (24, 2, 3))],
)
def test_only_whole_rollouts_are_written(maximum, episodes, expected):
    args = SimpleNamespace(seed=1, rollout_batch_size=4, num_episodes=episodes, max_rollouts=maximum)
    args.dataset_name_or_path = ["p"]
    chosen, left, passes = whole_rollouts(args, list(range(26)))
    assert (len(chosen), len(left), passes) == expected and sorted(chosen + left) == list(range(26))
    assert whole_rollouts(args, list(range(26)))[0] == chosen != sorted(chosen)
    with pytest.raises(UserError, match="3 prompts of p are fewer than rollout_batch_size 4"):
        whole_rollouts(args, [1, 2, 3])
