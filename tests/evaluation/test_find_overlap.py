"""Which prompts also stand in evaluation sets: by a naive comparison of all words, by hand-made texts, and as
the script writes the others.
"""

import json
import random
import sys
from unittest.mock import patch

import datasets
import pytest

from common.cli import UserError
from common.manifest import read_manifest
from common.records import read_prompts
from evaluation import find_overlap
from evaluation.find_overlap import EvaluationSet, words_of

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"  # 13 words


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def overlap(tmp_path, prompts, texts):
    """The Overlap of prompts, strings or lists of messages, with a set of these texts."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write(tmp_path / "set.jsonl", [{"question": text} for text in texts])
    sets = [find_overlap.read_evaluation_set(str(tmp_path / "set.jsonl"))]
    return find_overlap.find_overlap(str(prompts), None, sets)


def has_in_common(words, others, n=13):
    """Whether two lists of words have n in a row in common: by comparing all with all."""
    starts, theirs = range(len(words) - n + 1), range(len(others) - n + 1)
    return any(words[i : i + n] == others[j : j + n] for i in starts for j in theirs)


def noisy(rng, words):
    """Words as a text, whose case, punctuation and white space are a matter of chance."""
    gaps = (" ", "  ", "\n", ", ", " – ", "\t", "... ", "\u2028", " (", '"')
    return "".join(rng.choice((word, word.upper(), word.title())) + rng.choice(gaps) for word in words)


def test_as_a_comparison_of_all_with_all_finds(tmp_path):
    """Few different words, so that some texts have up to 13 in common by chance; each kind is met often."""
    rng, found = random.Random(0), {"exact": 0, "words": 0, "none": 0}
    vocabulary = ["alpha", "été", "strasse", "b2", "γάμμα"]
    texts = [[rng.choice(vocabulary) for _ in range(rng.randint(1, 40))] for _ in range(150)]
    texts += [words[:12] for words in texts[:20]]
    prompts = []
    for _ in range(300):
        turns = []
        for _ in range(rng.choice((1, 1, 2))):
            words, taken = [rng.choice(vocabulary) for _ in range(rng.randint(1, 30))], rng.choice(texts)
            size = rng.randint(10, 16)
            cut = rng.randint(0, max(0, len(taken) - size))
            how = rng.random()
            turns.append(taken if how < 0.15 else words + taken[cut : cut + size] if how < 0.6 else words)
        prompts.append(turns)
    asked = []
    for turns in prompts:
        between = {"role": "assistant", "content": noisy(rng, rng.choice(texts))}  # does not count
        listed = [{"role": "user", "content": noisy(rng, words)} for words in turns]
        asked.append([listed[0], between, listed[1]] if len(listed) == 2 else listed)
    done = overlap(tmp_path, asked, [noisy(rng, words) for words in texts])
    [kinds] = done.kinds.values()
    for turns in prompts:
        if any(words in texts for words in turns):
            found["exact"] += 1
        else:
            found["words" if any(has_in_common(w, t) for w in turns for t in texts) else "none"] += 1
    assert (kinds["exact"], kinds["words"]) == (found["exact"], found["words"]) and min(found.values()) > 20
    assert done.prompts == 300 and len(done.left_out) == 300 - found["none"]
    assert done.short == sum(all(len(words) < 13 for words in turns) for turns in prompts) > 20


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("What's 2 + 2?", "what s 2 2", True),
        ("ﬁne Ｔｅｘｔ", "FINE text", True),  # compatible forms of letters
        ("Straße", "STRASSE", True),
        ("cafe\u0301", "café", True),
        ("cafe", "café", False),
        ("不知道，吗？", "不知道 吗", True),
        ("नमस्ते दुनिया", "नमसत दनय", False),  # its vowels are marks
        ("???", "???", True),
        ("???", "!!!", False),
        ("well known", "wellknown", False),
    ],
)
def test_what_counts_as_equal(tmp_path, text, other, same):
    assert overlap(tmp_path, [text], [other]).kinds[str(tmp_path / "set.jsonl")]["exact"] == same


def test_scripts_without_spaces_are_compared_by_letters(tmp_path):
    text = "请告诉我如何在家里做一顿好吃的晚饭"
    [(_, kinds)] = overlap(tmp_path, [f"你好！{text[:13]}。", f"你好！{text[:12]}。"], [text]).kinds.items()
    assert kinds == {"words": 1}


def test_ascii_and_other_texts_have_the_same_words():
    for text in (LONG, "don't A_b 3.5x\n--y\x00z"):
        assert [*words_of(text), "é"] == words_of(f"{text} é")


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"instruction": "a", "output": "b", "generator": "g"}, ["a"]),  # AlpacaEval
        ({"question": "a", "answer": "#### 4"}, ["a"]),  # GSM8K
        ({"question": "a", "choices": ["x", "y"], "answer": 1}, ["a"]),  # MMLU
        ({"task_id": 1, "text": "a", "code": "x"}, ["a"]),  # MBPP
        ({"uid": "1", "category": "x", "prompt": "a"}, ["a"]),  # Arena-Hard v2.0
        ({"question_id": "1", "turns": [{"content": "a"}]}, ["a"]),  # and v0.1
        ({"question_id": 1, "turns": ["a", "b"]}, ["a", "b"]),  # MT-Bench
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["a"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
    ],
)
def test_columns_of_known_sets(tmp_path, record, turns):
    path = write(tmp_path / "set.json", [record])
    assert find_overlap.read_evaluation_set(str(path)).texts == set(turns)


def test_the_split_to_evaluate_on_is_read(tmp_path):
    split = lambda text: datasets.Dataset.from_list([{"question": text}])  # noqa: E731
    read = lambda name: find_overlap.read_evaluation_set(str(tmp_path / name)).texts  # noqa: E731
    whole = {name: split(name) for name in ("train", "validation", "test")}
    datasets.DatasetDict(whole).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"only": split("only")}).save_to_disk(tmp_path / "one")
    split("no splits").save_to_disk(tmp_path / "plain")
    (tmp_path / "cloned").mkdir()
    for name in ("train", "validation"):
        whole[name].to_parquet(tmp_path / f"cloned/{name}-0.parquet")
    assert read("saved") == {"test"} and read("one") == {"only"} and read("plain") == {"no splits"}
    assert read("cloned") == {"validation"}
    datasets.DatasetDict({"train": split("a"), "dev": split("b")}).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="has the splits train, dev, none of which is test, eval, validation"):
        read("none")


def run(*words):
    with patch.object(sys, "argv", ["find_overlap.py", *map(str, words)]):
        find_overlap.main()


@pytest.fixture
def files(tmp_path):
    """Prompts, some of which are no prompts or have an id and other fields, and two evaluation sets."""
    rows = [
        {"prompt": "Keep me", "id": 7, "answer": [1]},
        {"prompt": f"So: {LONG.upper()}!"},
        {"prompt": ""},
        {"prompt": "SHORT one."},
        {"prompt": "Keep me"},
        {"prompt": [{"role": "system", "content": LONG}, {"role": "user", "content": "and me"}], "id": "x"},
    ]
    write(tmp_path / "prompts.jsonl", rows)
    write(tmp_path / "alpaca_eval.json", [{"instruction": "short, one"}])
    write(
        tmp_path / "gsm8k.jsonl", [{"question": f"and {LONG} and", "answer": ""}, {"question": "Short one"}]
    )
    return tmp_path


def words_for(folder, *sets):
    words = ["--dataset_name_or_path", folder / "prompts.jsonl", "--output_dir", folder / "clean.jsonl"]
    return [*words, "--evaluation_sets", *(folder / name for name in sets)]


def test_the_others_are_written_as_they_are_read(files, capsys):
    run(*words_for(files, "alpaca_eval.json", "gsm8k.jsonl"))
    told = capsys.readouterr().out.splitlines()
    prompts = f"5 prompts of {files}/prompts.jsonl overlap with {files}"
    assert told[:3] == [
        f"1 of {prompts}/alpaca_eval.json: 1 exact",
        f"2 of {prompts}/gsm8k.jsonl: 1 exact, 1 by 13 words",
        "4 have fewer than 13 words a turn: only an equal text is an overlap there",
    ]
    kept = [json.loads(line) for line in (files / "clean.jsonl").read_text().splitlines()]
    user = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    assert kept[:2] == [{"id": 7, "prompt": user("Keep me"), "answer": [1]}, {"prompt": user("Keep me")}]
    assert kept[2]["id"] == "x" and len(kept) == 3
    # Each has the id, and so the seed and the answers, that it had among all.
    before = [
        r["id"] for r in read_prompts(str(files / "prompts.jsonl"), keep_bad=True) if isinstance(r, dict)
    ]
    after = [record["id"] for record in read_prompts(str(files / "clean.jsonl"))]
    assert after == [before[0], before[3], before[4]]
    skipped = [json.loads(line) for line in (files / "clean.skipped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in skipped] == [
        f"overlaps with {files}/gsm8k.jsonl: 13 words: {LONG}",
        f"{files}/prompts.jsonl record 3: its prompt is empty",
        f"overlaps with {files}/alpaca_eval.json: exact",
    ]
    assert [skipped[0]["id"], skipped[2]["id"]] == before[1:3]
    assert read_manifest(files / "clean.jsonl")["counts"] == {"prompts": 5, "written": 3, "skipped": 3}


def test_a_second_start_does_nothing_and_other_sets_are_refused(files, capsys):
    run(*words_for(files, "gsm8k.jsonl"))
    before = (files / "clean.jsonl").stat().st_mtime_ns
    run(*words_for(files, "gsm8k.jsonl"))
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert (files / "clean.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="evaluation_sets was 1 and is now 2"):
        run(*words_for(files, "gsm8k.jsonl", "alpaca_eval.json"))
    with pytest.raises(UserError, match=r"alpaca_eval.json\) has changed since"):
        run(*words_for(files, "alpaca_eval.json"))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "gsm9k.jsonl", "^no such evaluation set: .*gsm9k.jsonl; there is .*gsm8k.jsonl"),
        ("", "set.jsonl", "set.jsonl is empty"),
        ('{"goal": "x"}\n', "set.jsonl", "record 1 has no text in .*; its fields are goal: save the texts"),
        ('{"question": "x"}\n{"text": "x"}\n', "set.jsonl", "record 2 has no text in question"),
        ('{"question": "x"}\n{"question"\n{}\n', "set.jsonl", "line 2 is not valid JSON"),
        ('{"question": "keep me"}\n{"question": "and me"}\n', "set.jsonl", None),
        (
            "".join(json.dumps({"question": q}) + "\n" for q in ("keep me", "and me", "short one", LONG)),
            "set.jsonl",
            "every prompt of .*prompts.jsonl overlaps",
        ),
    ],
)
def test_sets_that_cannot_be_compared(files, content, name, message):
    if content is not None:
        (files / name).write_text(content)
    if message is None:
        run(*words_for(files, name))
        return
    with pytest.raises(UserError, match=message):
        run(*words_for(files, name))
    assert not (files / "clean.jsonl").exists()


def test_a_set_is_made_of_texts_that_say_something():
    one = EvaluationSet("x")
    one.add(" \n")
    assert not one.texts and not one.grams
