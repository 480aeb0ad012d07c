"""Pair selection: which two responses, what is left out and why, and the held-out prompts.

No model is needed.
"""

import json
import random
from collections import Counter

import pytest

from common.cli import UserError
from dpo_iteration.pairs import CHOOSE_TYPES, choose, held_out, make_pairs, select_pairs

SIGHTED = [name for name, choice in CHOOSE_TYPES.items() if not choice.blind]


def make_pair(row, *more, **choice):
    """(the first pair or None, the reason, responses left out)."""
    pairs, reason, left_out = make_pairs(row, *more, **choice)
    return pairs[0] if pairs else None, reason, left_out


def record(rewards, responses=None, number=0, **more):
    responses = responses or [f"answer {i}" for i in range(len(rewards))]
    prompt = [{"role": "user", "content": f"question {number}"}]
    return {"id": f"r{number}", "prompt": prompt, "responses": responses, "rewards": rewards} | more


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def indices(pair):
    return pair["chosen_index"], pair["rejected_index"]


def test_max_min_takes_best_and_worst_with_all_fields():
    row = record(
        [0.5, 2.0, -1.0, 1.0],
        finish_reasons=["stop", "stop", "length", "stop"],
        num_tokens=[3, 4, 5, 6],
        source_id="x7",
        reward_parts={"a": [1.0] * 4},
        pair_probabilities=[[None] * 4] * 4,
    )
    pair, reason, left_out = make_pair(row)
    assert reason is None and not left_out
    assert indices(pair) == (1, 2) and pair["margin"] == 3.0
    assert pair["chosen"] == [{"role": "assistant", "content": "answer 1"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "answer 2"}]
    assert (pair["chosen_reward"], pair["rejected_reward"]) == (2.0, -1.0)
    assert (pair["chosen_finish_reason"], pair["rejected_finish_reason"]) == ("stop", "length")
    assert (pair["chosen_num_tokens"], pair["rejected_num_tokens"]) == (4, 5)
    left = {"responses", "rewards", "reward_parts", "pair_probabilities"}
    assert pair["source_id"] == "x7" and not left & set(pair)


def test_max_max_takes_best_and_second_best():
    assert indices(make_pair(record([0.5, 2.0, -1.0, 1.0]), "max_max")[0]) == (1, 3)
    assert make_pair(record([2.0, 2.0, 1.0]), "max_max")[1] == "equal rewards"


def test_max_random_keeps_the_best_and_draws_every_other():
    drawn = {indices(make_pair(record([0.5, 2.0, -1.0, 1.0], number=i), "max_random")[0]) for i in range(60)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}


def test_random_draws_all_pairs_ordered_by_reward():
    rewards = [0.5, 2.0, -1.0, 1.0]
    drawn = {indices(make_pair(record(rewards, number=i), "random")[0]) for i in range(200)}
    assert drawn == {(a, b) for a in range(4) for b in range(4) if rewards[a] > rewards[b]}


@pytest.mark.parametrize("choose_type", ["max_random", "random"])
def test_random_choices_depend_on_seed_and_id_only(choose_type, tmp_path):
    rows = [record([i * k % 7 for k in range(1, 8)], number=i) for i in range(1, 30)]
    forward = select_pairs([write(tmp_path / "a.jsonl", rows)], choose_type=choose_type).pairs
    backward = select_pairs([write(tmp_path / "b.jsonl", rows[::-1])], choose_type=choose_type).pairs
    assert {p["id"]: indices(p) for p in forward} == {p["id"]: indices(p) for p in backward}
    other = select_pairs([write(tmp_path / "a.jsonl", rows)], seed=1, choose_type=choose_type).pairs
    assert [indices(p) for p in forward] != [indices(p) for p in other]


def test_max_min_p_penalises_length_in_tokens_for_choice_and_margin():
    row = record([1.0, 1.2, 0.9], ["a" * 500, "b", "c"], num_tokens=[2, 100, 10])
    pair = make_pair(row, "max_min_p", length_penalty=0.01)[0]
    assert indices(pair) == (0, 1)  # 0.98, 0.2, 0.8: neither raw reward nor characters order them so
    assert pair["margin"] == pytest.approx(0.78)
    del row["num_tokens"]
    pair = make_pair(row, "max_min_p", length_penalty=0.01, count_tokens=len)[0]
    assert indices(pair) == (1, 0) and pair["chosen_num_tokens"] == 1


def test_max_min_p_may_count_characters():
    row = record([1.0, 1.2, 0.9], ["a" * 500, "b" * 10, "ab"], num_tokens=[2, 100, 10])
    pair = make_pair(row, "max_min_p", length_penalty=0.001, length_penalty_unit="character")[0]
    assert indices(pair) == (1, 0) and pair["chosen_num_tokens"] == 100  # 0.5, 1.19, 0.898
    assert pair["margin"] == pytest.approx(1.2 - 0.01 - (1.0 - 0.5))


def test_a_pair_says_which_part_of_a_mixture_its_sides_came_from():
    hot, cool = {"temperature": 1.0}, {"temperature": 0.7}
    row = record([0.0, 2.0, 1.0], response_sources=[hot, hot, cool], stop_strings=[None, "x", None])
    pair = make_pair(row | {"rewards": [1.0, 2.0, 0.0]})[0]
    assert (pair["chosen_source"], pair["rejected_source"]) == (hot, cool)
    assert (pair["chosen_stop_string"], pair["rejected_stop_string"]) == ("x", None)
    assert not {"response_sources", "stop_strings"} & set(pair)
    assert not {"chosen_source", "chosen_stop_string"} & set(make_pair(record([0.0, 1.0]))[0])


def test_responses_that_cannot_take_part_are_counted_by_reason():
    nan = float("nan")
    rewards = [9.0, None, nan, float("inf"), 1.0, 5.0, 2.0, 0.0]
    row = record(rewards, ["", "b", "c", "d", "e", "e", "g", " \n"])
    pair, _, left_out = make_pair(row, drop_empty=True)
    assert indices(pair) == (6, 4)
    assert left_out == {"empty response": 2, "reward not finite": 3, "repeated response": 1}


@pytest.mark.parametrize("choose_type", SIGHTED)
def test_an_empty_response_may_be_rejected_and_is_never_chosen(choose_type):
    row = record([9.0, 1.0, 2.0, 0.5], ["", "b", "c", " \n"], num_tokens=[1, 5, 5, 2])
    drawn = {indices(make_pair(row | {"id": f"{i}"}, choose_type)[0]) for i in range(60)}
    assert drawn <= {(2, 1), (2, 3), (1, 3)}
    if choose_type in ("max_min", "max_min_p"):
        assert drawn == {(2, 3)}
    if choose_type in ("max_random", "random"):
        assert (2, 3) in drawn and (2, 1) in drawn
    assert indices(make_pair(row, choose_type, drop_empty=True)[0]) == (2, 1)
    silent = record([9.0, 1.0], ["", "b"], num_tokens=[1, 5])
    assert make_pair(silent, choose_type)[:2] == (None, "no response with text has the higher reward")


def test_responses_of_equal_text_and_other_tokens_are_two():
    row = record([1.0, 2.0, 3.0], ["same", "same", "same"], response_token_ids=[[1, 2], [1, 3], [1, 2]])
    pair, _, left_out = make_pair(row)
    assert indices(pair) == (1, 0) and left_out == {"repeated response": 1}
    assert (pair["chosen_token_ids"], pair["rejected_token_ids"]) == ([1, 3], [1, 2])
    assert "response_token_ids" not in pair
    for ids in ([[], []], [[7], [7]]):  # of another tool, or of texts that were edited
        assert indices(make_pair(record([1.0, 2.0], ["a", "b"], response_token_ids=ids))[0]) == (1, 0)


def test_drop_truncated():
    row = record([3.0, 2.0, 1.0], finish_reasons=["length", "stop", "stop"])
    assert indices(make_pair(row)[0]) == (0, 2)
    pair, _, left_out = make_pair(row, drop_truncated=True)
    assert indices(pair) == (1, 2) and left_out == {"cut off by the length limit": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (record([1.0]), "fewer than two responses"),
        (record([1.0, 1.0, 1.0]), "equal rewards"),
        (record([1.0, None]), "fewer than two usable responses: 1 reward not finite"),
        (record([1.0, 2.0], ["same", "same"]), "fewer than two usable responses: 1 repeated response"),
    ],
)
@pytest.mark.parametrize("choose_type", SIGHTED)
def test_a_prompt_without_a_pair_says_why(row, reason, choose_type):
    assert make_pair(row | {"num_tokens": [5] * len(row["responses"])}, choose_type)[:2] == (None, reason)


def test_min_margin():
    assert make_pair(record([1.0, 0.6]), min_margin=0.5)[1].startswith("margin below min_margin")
    assert make_pair(record([1.0, 0.5]), min_margin=0.5)[0] is not None


def test_choice_among_equals_is_the_earlier():
    rng = random.Random(0)
    assert choose([1.0, 2.0, 2.0, 1.0], [0, 1, 2, 3], "max_min", rng) == (1, 0)


def test_files_of_past_iterations_may_repeat_ids(tmp_path):
    one = write(tmp_path / "1.jsonl", [record([1.0, 0.0])])
    two = write(tmp_path / "2.jsonl", [record([0.0, 1.0])])
    found = [(p["id"], p["source"], indices(p)) for p in select_pairs([one, two]).pairs]
    assert found == [("r0", one, (0, 1)), ("r0", two, (1, 0))]


def test_skipped_records_are_listed_and_counted(tmp_path):
    rewards = ([1.0, 0.0], [1.0, 1.0], [1.0, None], [None, 0.0])
    rows = [record(given, number=i) for i, given in enumerate(rewards)]
    selection = select_pairs([write(tmp_path / "a.jsonl", rows)])
    assert [s["id"] for s in selection.skipped] == ["r1", "r2", "r3"]
    assert selection.skipped_by_reason == {"equal rewards": 1, "fewer than two usable responses": 2}
    read_as = {str(tmp_path / "a.jsonl"): "rewarded answers"}
    left_out = {"reward not finite": 2}
    assert selection.counts == {"records": 4, "responses_left_out": left_out, "read_as": read_as}


def test_held_out_prompts_are_a_share_and_twins_stay_together(tmp_path):
    messages = [[{"role": "user", "content": f"question {i}"}] for i in range(2000)]
    chosen = [held_out(m, 0.2, 42) for m in messages]
    assert 0.17 < sum(chosen) / 2000 < 0.23
    assert chosen == [held_out(m, 0.2, 42) for m in messages] != [held_out(m, 0.2, 7) for m in messages]
    assert not any(held_out(m, 0.0, 42) for m in messages)
    twins = [record([1.0, 0.0], number=i // 2) | {"id": f"twin{i}"} for i in range(200)]
    split = [p["split"] for p in select_pairs([write(tmp_path / "a.jsonl", twins)], eval_fraction=0.5).pairs]
    assert split[::2] == split[1::2] and {"train", "eval"} == set(split)


def test_null_stands_for_what_is_not_known():
    """A table that the records went through has a cell for every field."""
    unknown = dict.fromkeys(("finish_reasons", "num_tokens", "response_token_ids", "prompt_token_ids"))
    pair, _, _ = make_pair(record([1.0, 0.0]) | unknown)
    assert indices(pair) == (0, 1) and pair["chosen_finish_reason"] is None and "chosen_token_ids" not in pair


def test_several_pairs_of_a_prompt_share_no_response():
    row = record([3.0, 1.0, 2.0, 5.0, 4.0, 4.5, 0.0], extra="kept")
    pairs, reason, _ = make_pairs(row, pairs_per_prompt=9)
    assert [pair["margin"] for pair in pairs] == [5.0, 3.5, 2.0] and reason is None
    assert all(pair["extra"] == "kept" for pair in pairs)

    def chosen(row, **choice):
        return [indices(pair) for pair in make_pairs(row, count_tokens=len, **choice)[0]]

    best_first = [(3, 6), (5, 1), (4, 2)]  # best and worst, then the next
    assert chosen(row, pairs_per_prompt=9) == best_first
    assert chosen(row, pairs_per_prompt=2) == best_first[:2]
    assert chosen(row, pairs_per_prompt=9, min_margin=3.0) == best_first[:2]
    assert chosen(record([2.0, 1.0, 1.0, 1.0]), pairs_per_prompt=2) == [(0, 1)]
    for choose_type in CHOOSE_TYPES:
        used = sum(chosen(row, choose_type=choose_type, pairs_per_prompt=3), ())
        assert len(used) == len(set(used)) == 6


def test_a_weight_is_what_train_weights_says_and_not_a_field_of_the_record(tmp_path):
    """Pairs of an earlier training, read as preferences, have one."""
    prompt = [{"role": "user", "content": "2+2?"}]
    pair = {"prompt": prompt, "chosen": "four", "rejected": "five", "loss_weight": 0.25}
    files = [write(tmp_path / "a.jsonl", [record([0.0, 1.0], loss_weight=3.0)])]
    files.append(write(tmp_path / "b.jsonl", [pair]))
    assert ["loss_weight" in found for found in select_pairs(files).pairs] == [False, False]
    weighted = select_pairs(files, weights=[1.0, 0.5]).pairs
    assert [found["loss_weight"] for found in weighted] == [1.0, 0.5]


def test_without_rejected_the_best_is_taken_alone():
    def chosen(row, **choice):
        pairs, reason, _ = make_pairs(row, rejected=False, count_tokens=len, **choice)
        assert not any("rejected" in key for pair in pairs for key in pair)
        return [(pair["chosen_index"], pair["margin"]) for pair in pairs] or reason

    row = record([0.5, 2.0, -1.0, 1.0])
    for choose_type in ("max_min", "max_max", "max_random"):
        assert chosen(row, choose_type=choose_type) == [(1, 3.0)]
    assert chosen(row, pairs_per_prompt=3) == [(1, 3.0), (3, 2.0), (0, 1.5)]
    assert chosen(row, pairs_per_prompt=3, min_margin=1.8) == [(1, 3.0), (3, 2.0)]
    # The first stands for equal ones, at margin 0, which `min_margin` can leave out.
    assert chosen(record([1.0, 1.0, 1.0])) == [(0, 0.0)]
    assert chosen(record([1.0, 1.0]), min_margin=0.1) == "margin below min_margin: 0"
    assert chosen(record([3.0])) == [(0, 0.0)]  # K may be 1
    assert chosen(record([9.0, 1.0, 0.0], ["", "b", "c"])) == [(1, 1.0)]  # silence is not imitated
    assert chosen(record([9.0, 1.0], ["", " "])) == "no response with text above the worst"
    assert chosen(record([1.0, 0.0], ["", "the rejected one"])) == "no response with text above the worst"
    assert chosen(record([None, float("nan")])) == "no usable response: 2 reward not finite"
    short = record([2.0, 1.9], ["long answer", "short"])
    assert chosen(short, choose_type="max_min_p", length_penalty=0.1)[0][0] == 1


def test_a_blind_choice_does_not_look_at_rewards():
    """Each of the usable responses is drawn as often, on either side, and ties are drawn too."""
    counts, rows = Counter(), [record([0.0, 1.0, 2.0, None], ["", "b", "c", "d"], n) for n in range(600)]
    for row in rows:
        [pair], _, _ = make_pairs(row, "blind")
        counts[indices(pair)] += 1
        assert pair["margin"] == pair["chosen_reward"] - pair["rejected_reward"]
    assert set(counts) == {(1, 0), (1, 2), (2, 0), (2, 1)}  # the empty one is never chosen
    assert min(counts.values()) > 110
    alone = Counter(make_pairs(row, "blind", rejected=False)[0][0]["chosen_index"] for row in rows)
    assert set(alone) == {1, 2} and min(alone.values()) > 250
    assert make_pairs(record([1.0, 1.0]), "blind")[0] and make_pairs(record([1.0, 1.0]), "max_min")[0] == []
    flipped = [make_pairs(row | {"rewards": row["rewards"][2::-1] + [None]}, "blind")[0][0] for row in rows]
    assert [indices(pair) for pair in flipped] == [indices(make_pairs(row, "blind")[0][0]) for row in rows]


def test_pairs_of_a_prompt_are_on_one_side_of_the_split(tmp_path):
    rows = [record([i * k % 7 for k in range(1, 8)], number=i) for i in range(1, 40)]
    chosen = select_pairs([write(tmp_path / "a.jsonl", rows)], eval_fraction=0.4, pairs_per_prompt=3).pairs
    sides = {(pair["id"], pair["split"]) for pair in chosen}
    assert len(chosen) > 80 and len(sides) == len({pair["id"] for pair in chosen})
    assert {split for _, split in sides} == {"train", "eval"}


def test_nan_in_a_field_that_is_carried_names_the_record(tmp_path):
    path = tmp_path / "nan.jsonl"
    path.write_text(json.dumps(record([1.0, 2.0], number=3) | {"id": "x", "weight": float("nan")}) + "\n")
    with pytest.raises(UserError, match=r"nan.jsonl record x holds NaN or infinity"):
        select_pairs([path])


def test_a_record_does_not_weigh_its_own_pairs(tmp_path):
    """`loss_weight` is train_weights' alone; a column of that name would be taken for it, text and all."""
    path = write(tmp_path / "a.jsonl", [record([1.0, 2.0], loss_weight="high")])
    assert "loss_weight" not in select_pairs([path]).pairs[0]
    assert select_pairs([path], weights=[3.0]).pairs[0]["loss_weight"] == 3.0
