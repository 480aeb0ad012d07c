"""What PPO starts from: the value model, the prompts that are left out, models that do not go together."""

import micro
import pytest
import torch
from small_ppo import argv, make
from training import read_json, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import UserError
from ppo import train_ppo as ppo


def test_the_value_model_starts_as_the_reward_model(work, capsys):
    it = make(work, reward_name_or_path=[str(work / "rm")], reward_function=...)
    assert f"value model: from {work / 'rm'}, head and all" in capsys.readouterr().out
    rows, _ = it.rollout(1)
    end = it.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for row, text in zip(rows, ("", "a", "Paris is it.", "bb", "no", "x y", "z", "a longer answer")):
        row["response"] = [*it.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        record = next(p for p in it.prompts if p["ids"] == row["prompt"])
        row |= {"text": text, "cut": False, "record": record}
    it.score(rows)
    for row in rows:  # one token more, so that the value behind the last token is among those given out
        inputs, responses, _ = ppo.padded([row | {"response": row["response"] + [0]}], it.pad, "cpu")
        with torch.no_grad():
            value = ppo.values_of(it.critic, inputs, responses)[0, -1].item()
        assert value == pytest.approx(row["score"], abs=1e-4)
    assert len({row["score"] for row in rows}) == len(rows)


def test_another_vocabulary_scores_texts_and_the_value_model_starts_from_the_policy(work, capsys):
    it = make(work, reward_name_or_path=[str(work / "rm_chatml")], reward_weights=[0.5, 2.0])
    told = f"value model: from {work / 'policy'}, the policy, with a new head that says 0"
    assert told in capsys.readouterr().out
    rows, _ = it.rollout(1)
    assert all(not row["values"].any() for row in rows)
    from annotate_data.reward_models import BradleyTerry

    scorer = BradleyTerry(str(work / "rm_chatml"))
    scorer.load()
    row = rows[3]
    prompt = next(p["prompt"] for p in it.prompts if p["ids"] == row["prompt"])
    [(_, entry)] = scorer.score([{"prompt": prompt, "responses": [row["text"]]}])
    expected = 0.5 * entry["rewards"][0] + 2 * (row["text"].count("a") - 0.2 * len(row["text"]))
    assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert len({row["score"] for row in rows}) > 1


def test_long_prompts_are_skipped_and_listed(work, here):
    here(argv(work, "skipping", max_input_length=70, rollout_batch_size=2, batch_size=4, max_rollouts=1))
    skipped = read_jsonl(work / "skipping.skipped.jsonl")
    assert 0 < len(skipped) < 12 and all("more than 70" in entry["reason"] for entry in skipped)
    assert read_json(work / "skipping.manifest.json")["counts"]["prompts"] == 12 - len(skipped)


def test_a_policy_without_a_template_or_under_another_vocabulary_size_is_refused(work, here):
    AutoModelForCausalLM.from_pretrained(work / "policy").save_pretrained(work / "bare")
    tokenizer = AutoTokenizer.from_pretrained(work / "policy")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(work / "bare")
    with pytest.raises(UserError, match="has no chat template: give one with --chat_template FILE"):
        here(argv(work, "wrong", model_name_or_path=str(work / "bare")))
    micro.make_reward_model(work / "small", vocab_size=261)
    with pytest.raises(UserError, match="token id 261 and .*small has 261 embeddings"):
        here(argv(work, "wrong", critic_name_or_path=str(work / "small")))
