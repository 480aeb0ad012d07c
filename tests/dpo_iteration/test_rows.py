"""Pairs as token ids: equal to TRL's where nothing is cut, end of turn and truncation."""

import random
from types import SimpleNamespace

import micro
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from common.chat import ChatTemplate, TemplateArguments, parse_date
from common.cli import UserError
from common.manifest import write_json
from common.tokens import Answer, is_decoded
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
    rows = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, config, "train"
    )
    return [{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]


def ended(tokenizer, ids):
    """TRL's tokens up to the end of turn: what the template writes behind it, a line break, was nobody's
    choice.
    """
    end = ChatTemplate(tokenizer).end_of_turn()
    return ids[: len(ids) - ids[::-1].index(end)]


@pytest.mark.parametrize("family", micro.TEMPLATES)
def test_rows_equal_trls_up_to_the_end_of_turn(family):
    tokenizer = micro.make_tokenizer(family)
    pairs = [make_pair(prompt) for prompt in CONVERSATIONS]
    if family in ("llama3", "chatml", "phi"):
        pairs.append(make_pair([{"role": "system", "content": "Be brief."}, *CONVERSATIONS[0]]))
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    ours, trls = [to_row(pair)[0] for pair in pairs], rows_of_trl(tokenizer, pairs)
    sides = ("chosen_ids", "rejected_ids")
    assert ours == [row | {key: ended(tokenizer, row[key]) for key in sides} for row in trls]
    assert not to_row.counts
    for row, trl in zip(ours, trls):
        if tokenizer.bos_token_id is not None:
            assert (row["prompt_ids"] + row["chosen_ids"]).count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(row["chosen_ids"]).strip().startswith("Good answer.")
        line_break = family in ("chatml", "gemma", "phi")
        assert len(trl["chosen_ids"]) - len(row["chosen_ids"]) == line_break


@pytest.mark.parametrize("family", micro.TEMPLATES)
def test_a_cut_off_response_has_no_end_of_turn(family):
    tokenizer = micro.make_tokenizer(family)
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    whole, _ = to_row(make_pair())
    cut, _ = to_row(make_pair(chosen_finish_reason="length", rejected_finish_reason="stop"))
    assert cut["chosen_ids"] == whole["chosen_ids"][:-1]
    assert not set(cut["chosen_ids"]) & set(tokenizer.all_special_ids)
    assert cut["rejected_ids"] == whole["rejected_ids"]
    assert to_row.counts == {"responses_without_end_of_turn": 1}


def with_kwargs(tokenizer, kwargs):
    return ChatTemplate(tokenizer, TemplateArguments(template_kwargs=kwargs))


def sampled(tokenizer, messages, texts, end, template_kwargs=None):
    """A pair with the token ids of an engine: the prompt as templated, the responses' own tokens and the one
    that ended them.
    """
    prompt = with_kwargs(tokenizer, template_kwargs or {}).encode(messages, True)
    ids = {
        f"{side}_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"] + end
        for side, text in zip(("chosen", "rejected"), texts)
    }
    texts = (tokenizer.decode(one, skip_special_tokens=True) for one in ids.values())
    finished = {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    return make_pair(messages, *texts, prompt_token_ids=prompt, **finished, **ids)


# A thought in front of </think> is left out of a turn that is rendered; the prompt opens one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Nothing closes a turn but the next one's role.
UNCLOSED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A channel's header, of control tokens, is written in front of an answer.
CHANNEL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|endoftext|>final{% endif "
    "%}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    "template, texts",
    [
        (THINKING, ("Because.</think>Yes", "Since.</think>Yes")),
        (UNCLOSED, ("Yes", "No")),
        (CHANNEL, ("<|endoftext|>think\n yes", "<|endoftext|>final\n no")),
    ],
)
def test_sampled_tokens_are_trained_one_for_one(template, texts):
    tokenizer = micro.make_tokenizer("chatml")
    tokenizer.chat_template = template
    stop = [tokenizer.convert_tokens_to_ids("<|im_start|>" if template == UNCLOSED else "<|im_end|>")]
    pair = sampled(tokenizer, CONVERSATIONS[0], texts, stop)
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    row, _ = to_row(pair)
    assert row == {
        "prompt_ids": pair["prompt_token_ids"],
        "chosen_ids": pair["chosen_token_ids"],
        "rejected_ids": pair["rejected_token_ids"],
    }
    assert to_row.counts == {"as_sampled": 2}


def test_text_alone_keeps_what_the_template_would_change_and_says_so():
    tokenizer = micro.make_tokenizer("chatml")
    tokenizer.chat_template = THINKING
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    lengths = {"chosen_num_tokens": 20, "rejected_num_tokens": 5}
    row, _ = to_row(make_pair(chosen="Because.</think>Yes", rejected="Since.</think>Yes", **lengths))
    assert tokenizer.decode(row["prompt_ids"]).endswith("<think>\n")
    assert tokenizer.decode(row["chosen_ids"]) == "Because.</think>Yes<|im_end|>"
    assert to_row.counts == {"written_otherwise": 2, "retokenised": 1}  # 20 tokens of a byte each
    tokenizer.chat_template = UNCLOSED
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    assert tokenizer.decode(to_row(make_pair())[0]["chosen_ids"]) == "Good answer."
    assert to_row.counts == {"never_closed": 2}


def test_an_empty_thought_of_the_prompt_stays_in_the_prompt():
    """The template writes it where an answer is asked for and nowhere else."""
    tokenizer, kwargs = micro.make_tokenizer("chatml"), {"enable_thinking": False}
    template = with_kwargs(tokenizer, kwargs)
    row, _ = PairTokenizer(template, 500, 400)(make_pair())
    assert row["prompt_ids"] == template.encode(CONVERSATIONS[0], True)
    assert tokenizer.decode(row["prompt_ids"]).endswith("</think>\n\n")
    assert tokenizer.decode(row["chosen_ids"]) == "Good answer.<|im_end|>"


def test_token_ids_that_are_not_the_text_give_way_to_it():
    tokenizer = micro.make_tokenizer()
    pair = sampled(tokenizer, CONVERSATIONS[0], ("Good", "Bad"), [ChatTemplate(tokenizer).end_of_turn()])
    for changed in (
        {"chosen": [{"role": "assistant", "content": "Edited"}]},
        {"chosen_token_ids": [9999]},
        {"chosen_token_ids": [1, True]},
    ):
        to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
        row, _ = to_row(pair | changed)
        text = (pair | changed)["chosen"][0]["content"]
        assert tokenizer.decode(row["chosen_ids"]) == f"{text}<|eot_id|>" and not to_row.counts["as_sampled"]
        assert to_row.counts["other_ids"] == (1 if True in changed.get("chosen_token_ids", []) else 2)


def byte_tokens():
    """A tokenizer of SentencePiece's kind, whose characters are all written as bytes: `<0xE6>`."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = micro.TEMPLATES["phi"]
    return tokenizer


def engine_text(tokenizer, ids, ended):
    """What vLLM 0.32 writes of sampled ids: token by token (v1/engine/detokenizer.py), without the one that
    ended them.
    """
    stream, text = decoders.DecodeStream(skip_special_tokens=True), ""
    for token in ids[:-1] if ended else ids:
        try:
            text += stream.step(tokenizer._tokenizer, token) or ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            stream = decoders.DecodeStream(skip_special_tokens=True)
            text += stream.step(tokenizer._tokenizer, token) or ""
    return text


@pytest.mark.parametrize("make", [micro.make_tokenizer, byte_tokens])
def test_what_an_engine_sampled_is_known_as_such_whatever_it_is(make):
    """Also characters cut at the length limit, bytes that make none, rows beyond the vocabulary, and a word
    as the end.
    """
    tokenizer, rng = make(), random.Random(0)
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    prompt, beyond = to_row.encoder.rendered(make_pair()), len(tokenizer) + 20
    words = [
        tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("do not", "数字", "🙂", "é.")
    ]
    ends = [*words[0], tokenizer.eos_token_id, len(tokenizer) + 1, *words[1][:1]]
    for _ in range(300):
        parts = (
            rng.choice(words) if rng.random() < 0.7 else [rng.randrange(beyond)]
            for _ in range(rng.randrange(5))
        )
        ids = [*sum(parts, [])[: rng.randrange(12)], rng.choice(ends)]
        ended = rng.random() < 0.5
        answer = Answer(engine_text(tokenizer, ids, ended), "stop" if ended else "length", len(ids), ids)
        assert to_row.encoder.are_sampled({"prompt_token_ids": prompt}, [answer]), (ids, answer)


@pytest.mark.parametrize(
    "text, decoded, same",
    [
        ("🙂 a", "🙂a", True),
        ("", "\ufffd", True),
        ("aNb", "a\ufffdN\ufffdb", True),
        ("a", "b", False),
        ("ab", "a\ufffdb\ufffdb", False),
        ("xa", "a\ufffd", False),
    ],
)
def test_bytes_that_make_no_character_stand_for_any_text(text, decoded, same):
    assert is_decoded(text, decoded) == same


def test_a_prompt_that_is_written_otherwise_than_it_was_sampled_is_refused(tmp_path):
    tokenizer = micro.make_tokenizer("chatml")
    end = [ChatTemplate(tokenizer).end_of_turn()]
    pair = sampled(tokenizer, CONVERSATIONS[0], ("Good", "Bad"), end, {"enable_thinking": False})
    kwargs = {"enable_thinking": False}
    inputs = {"chat_template": {"path": "x.jinja"}}
    made = {"script": "generation/get_hf2.py", "settings": {"template_kwargs": kwargs}, "inputs": inputs}
    write_json(tmp_path / "g.manifest.json", made)
    inputs = {"dataset_name_or_path": {"path": str(tmp_path / "g.jsonl")}}
    write_json(tmp_path / "r.manifest.json", {"script": "a", "settings": {}, "inputs": inputs})
    told = r"r.jsonl record p: .* behind .*think.*x.jinja.*enable_thinking.*--template_kwargs"
    with pytest.raises(UserError, match=told):
        PairTokenizer(ChatTemplate(tokenizer), 500, 400)(pair | {"source": str(tmp_path / "r.jsonl")})
    row, _ = PairTokenizer(with_kwargs(tokenizer, kwargs), 500, 400)(pair)
    assert row["prompt_ids"] == pair["prompt_token_ids"]


def test_a_prompt_is_dated_by_the_day_of_its_sampling():
    tokenizer = micro.make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert ChatTemplate(tokenizer).writes_date() and not ChatTemplate(micro.make_tokenizer()).writes_date()
    prompt = ChatTemplate(tokenizer).encode(CONVERSATIONS[0], True, date="2024-02-29")
    assert tokenizer.decode(prompt).startswith("29 Feb 2024")
    pair = sampled(tokenizer, CONVERSATIONS[0], ("Good", "Bad"), [ChatTemplate(tokenizer).end_of_turn()])
    pair |= {"prompt_token_ids": prompt, "prompt_date": "2024-02-29"}
    assert PairTokenizer(ChatTemplate(tokenizer), 500, 400)(pair)[0]["prompt_ids"] == prompt
    with pytest.raises(UserError, match="YYYY-MM-DD"):
        parse_date("29.2.2024")


def test_what_is_asked_of_a_template_needs_no_turns_that_it_refuses():
    """A system turn that must be there or that alone is dated, line breaks that are added tokens, content in
    parts.
    """
    tokenizer = micro.make_tokenizer("chatml")
    plain, end = tokenizer.chat_template, tokenizer.convert_tokens_to_ids("<|im_end|>")
    refuses = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuses + "{{ strftime_now('%d') }}" + plain
    assert ChatTemplate(tokenizer).writes_date() and ChatTemplate(tokenizer).end_of_turn() == end
    tokenizer.chat_template = plain.replace("<|im_end|>", "\n<|im_end|>")
    tokenizer.add_tokens(["\n"])
    template = ChatTemplate(tokenizer)
    assert template.end_of_turn() == end and template.stop_token_ids() == [end]
    tokenizer.chat_template = plain.replace("m.content", "m.content[0].text")
    with pytest.raises(UserError, match="leaves out the text of a turn"):
        ChatTemplate(tokenizer).end_of_turn()


def test_a_long_response_is_cut_on_the_right():
    tokenizer = micro.make_tokenizer()
    whole, _ = PairTokenizer(ChatTemplate(tokenizer), 500, 400)(make_pair())
    prompt = len(whole["prompt_ids"])
    to_row = PairTokenizer(ChatTemplate(tokenizer), prompt + len(whole["chosen_ids"]) - 1, prompt)
    row, _ = to_row(make_pair())
    assert row["chosen_ids"] == whole["chosen_ids"][:-1] and row["rejected_ids"] == whole["rejected_ids"]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in row["chosen_ids"]
    assert to_row.counts == {"responses_cut": 1}


def test_a_long_prompt_is_cut_on_the_left_and_keeps_its_bos():
    tokenizer = micro.make_tokenizer()
    whole, _ = PairTokenizer(ChatTemplate(tokenizer), 500, 400)(make_pair())
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 10)
    row, _ = to_row(make_pair())
    assert row["prompt_ids"] == [tokenizer.bos_token_id] + whole["prompt_ids"][-9:]
    assert row["chosen_ids"] == whole["chosen_ids"] and to_row.counts == {"prompts_cut": 1}
    row, _ = PairTokenizer(ChatTemplate(micro.make_tokenizer("chatml")), 500, 10)(make_pair())
    assert len(row["prompt_ids"]) == 10


def test_pairs_that_teach_nothing_are_returned_with_a_reason():
    tokenizer = micro.make_tokenizer()
    to_row = PairTokenizer(ChatTemplate(tokenizer), 500, 400)
    # The template trims.
    assert to_row(make_pair(chosen="same ", rejected=" same")) == (None, "equal token ids")
    length = len(to_row(make_pair())[0]["prompt_ids"])
    to_row = PairTokenizer(ChatTemplate(tokenizer), length + 4, length)
    told = to_row(make_pair(chosen="same start, A", rejected="same start, B"))
    assert told == (None, "equal token ids (after truncation)")


def test_a_template_without_a_system_role_is_refused_by_record():
    to_row = PairTokenizer(ChatTemplate(micro.make_tokenizer("gemma")), 500, 400)
    pair = make_pair([{"role": "system", "content": "Be brief."}, *CONVERSATIONS[0]], source="data/r.jsonl")
    with pytest.raises(UserError, match=r"data/r.jsonl record p: .*system, user.*System role not supported"):
        to_row(pair)


def test_two_bos_are_refused():
    tokenizer = micro.make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="two <|begin_of_text|>"):
        check_bos(tokenizer, PairTokenizer(ChatTemplate(tokenizer), 500, 400)(make_pair())[0])


def test_the_shown_pair_marks_what_the_loss_counts():
    tokenizer = micro.make_tokenizer()
    shown = show_pair(tokenizer, PairTokenizer(ChatTemplate(tokenizer), 500, 400)(make_pair())[0])
    assert "1 BOS" in shown and "⟦Good answer.<|eot_id|>⟧" in shown and "⟦Bad one<|eot_id|>⟧" in shown
