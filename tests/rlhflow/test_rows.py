"""Pairs as token ids: equal to TRL's where nothing is cut, end of turn and truncation."""

from types import SimpleNamespace

import micro
import pytest
from datasets import Dataset
from trl import DPOTrainer

from common.cli import UserError
from dpo_iteration.rows import PairTokenizer, check_bos, show_pair

CONVERSATIONS = [
    [{"role": "user", "content": "Hi there"}],
    [
        {"role": "user", "content": "数字は\u2028?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": " again "},
    ],
]


def make_pair(prompt=CONVERSATIONS[0], chosen="Good answer.", rejected="Bad one", **more):
    sides = {
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return {"id": "p", "prompt": prompt} | sides | more


def rows_of_trl(tokenizer, pairs):
    """What TRL's own `_prepare_dataset` makes of the conversational records."""
    config = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs])
    rows = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, config, "train")
    return [{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]


@pytest.mark.parametrize("family", micro.TEMPLATES)
def test_rows_equal_trls(family):
    tokenizer = micro.make_tokenizer(family)
    pairs = [make_pair(prompt) for prompt in CONVERSATIONS]
    if family in ("llama3", "chatml", "phi"):
        pairs.append(make_pair([{"role": "system", "content": "Be brief."}, *CONVERSATIONS[0]]))
    to_row = PairTokenizer(tokenizer, 500, 400)
    ours = [to_row(pair)[0] for pair in pairs]
    assert ours == rows_of_trl(tokenizer, pairs)
    assert not to_row.counts
    for row in ours:
        if tokenizer.bos_token_id is not None:
            assert (row["prompt_ids"] + row["chosen_ids"]).count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(row["chosen_ids"]).strip().startswith("Good answer.")
        assert row["chosen_ids"][-len(to_row.end_of_turn) :] == to_row.end_of_turn


def test_a_template_that_renders_the_prompt_otherwise_is_cut_where_trl_cuts_it():
    tokenizer = micro.make_tokenizer("chatml")
    to_row = PairTokenizer(tokenizer, 500, 400, {"enable_thinking": False})
    row, _ = to_row(make_pair())
    assert row == rows_of_trl(tokenizer, [make_pair()])[0]  # the empty thought is in the generation prompt only
    assert to_row.counts == {"prompts_rendered_otherwise": 1}


@pytest.mark.parametrize("family", micro.TEMPLATES)
def test_a_cut_off_response_has_no_end_of_turn(family):
    tokenizer = micro.make_tokenizer(family)
    to_row = PairTokenizer(tokenizer, 500, 400)
    whole, _ = to_row(make_pair())
    cut, _ = to_row(make_pair(chosen_finish_reason="length", rejected_finish_reason="stop"))
    assert cut["chosen_ids"] == whole["chosen_ids"][: -len(to_row.end_of_turn)]
    assert not set(cut["chosen_ids"]) & set(tokenizer.all_special_ids)
    assert cut["rejected_ids"] == whole["rejected_ids"]
    assert to_row.counts == {"responses_without_end_of_turn": 1}


def test_a_long_response_is_cut_on_the_right():
    tokenizer = micro.make_tokenizer()
    whole, _ = PairTokenizer(tokenizer, 500, 400)(make_pair())
    prompt = len(whole["prompt_ids"])
    to_row = PairTokenizer(tokenizer, prompt + len(whole["chosen_ids"]) - 1, prompt)
    row, _ = to_row(make_pair())
    assert row["chosen_ids"] == whole["chosen_ids"][:-1] and row["rejected_ids"] == whole["rejected_ids"]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in row["chosen_ids"]
    assert to_row.counts == {"responses_cut": 1}


def test_a_long_prompt_is_cut_on_the_left_and_keeps_its_bos():
    tokenizer = micro.make_tokenizer()
    whole, _ = PairTokenizer(tokenizer, 500, 400)(make_pair())
    to_row = PairTokenizer(tokenizer, 500, 10)
    row, _ = to_row(make_pair())
    assert row["prompt_ids"] == [tokenizer.bos_token_id] + whole["prompt_ids"][-9:]
    assert row["chosen_ids"] == whole["chosen_ids"] and to_row.counts == {"prompts_cut": 1}
    row, _ = PairTokenizer(micro.make_tokenizer("chatml"), 500, 10)(make_pair())
    assert len(row["prompt_ids"]) == 10


def test_pairs_that_teach_nothing_are_returned_with_a_reason():
    tokenizer = micro.make_tokenizer()
    row, reason = PairTokenizer(tokenizer, 500, 400)(make_pair(chosen="same ", rejected=" same"))  # the template trims
    assert row is None and "equal token ids" in reason
    length = len(PairTokenizer(tokenizer, 500, 400)(make_pair())[0]["prompt_ids"])
    row, reason = PairTokenizer(tokenizer, length + 4, length)(
        make_pair(chosen="same start, A", rejected="same start, B")
    )
    assert row is None and "after truncation" in reason


def test_a_template_without_a_system_role_is_refused_by_record():
    to_row = PairTokenizer(micro.make_tokenizer("gemma"), 500, 400)
    pair = make_pair([{"role": "system", "content": "Be brief."}, *CONVERSATIONS[0]], source="data/r.jsonl")
    with pytest.raises(UserError, match=r"data/r.jsonl record p: .*system, user.*System role not supported"):
        to_row(pair)


def test_two_bos_are_refused():
    tokenizer = micro.make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="two <|begin_of_text|>"):
        check_bos(tokenizer, PairTokenizer(tokenizer, 500, 400)(make_pair())[0])


def test_the_shown_pair_marks_what_the_loss_counts():
    tokenizer = micro.make_tokenizer()
    shown = show_pair(tokenizer, PairTokenizer(tokenizer, 500, 400)(make_pair())[0])
    assert "1 BOS" in shown and "⟦Good answer.<|eot_id|>⟧" in shown and "⟦Bad one<|eot_id|>⟧" in shown
