"""annotate_data/: ArmoRM, pair preference, functions and sums, each against a computation of one sequence
written here.
"""

import json
import math
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import micro
from rewarding import annotate, armorm, generated, refused, write

from annotate_data import preference, reward_models
from common import cli

pytestmark = pytest.mark.env("vllm")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: micro models gain nothing from threads


def test_an_encoder_with_one_label_against_its_own_forward(tmp_path):
    """BERT's kind has no linear `score` on the last token: its own head is asked."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = micro.make_tokenizer("llama3")
    config = BertConfig(
        vocab_size=288,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = reward_models.BradleyTerry(str(tmp_path), batch_tokens=300)
    scorer.load()
    prompt, responses = [{"role": "user", "content": "q?"}], ["yes", "", "no " * 20]
    [(_, got)] = list(scorer.score([{"prompt": prompt, "responses": responses}]))
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(tmp_path).eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    expected = []
    for response in responses:
        text = "".join(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"
            for role, content in (("user", "q?"), ("assistant", response))
        )
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits[0, 0].item())
    assert got["rewards"] == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.01


SHAPE = {
    "vocab_size": 288,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 1,
    "initializer_range": 0.3,
}
OTHERS = {  # architecture → settings; what their heads look at differs, and DeBERTa has no sdpa
    "deberta-v2": SHAPE | {"pos_att_type": ["p2c", "c2p"], "relative_attention": True},
    "roberta": SHAPE | {"max_position_embeddings": 100},
    "bart": {
        "vocab_size": 288,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_labels": 1,
        "init_std": 0.3,
        "decoder_start_token_id": 0,
    },
    "modernbert-decoder": SHAPE | {"num_hidden_layers": 3, "max_position_embeddings": 512},
    "gpt_neo": {
        "vocab_size": 288,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 48,
        "num_labels": 1,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "initializer_range": 0.3,
    },
}


@pytest.mark.parametrize("padding", ["<|pad|>", "<|eot_id|>"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_classifiers_of_other_architectures_against_one_sequence_alone(architecture, padding, tmp_path):
    """As they come, in one batch of different lengths, also where the end of turn is the padding token."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = micro.make_tokenizer("llama3")
    tokenizer.pad_token = padding
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|eot_id|>"),
    }
    if architecture == "roberta":
        ids["pad_token_id"] = 1  # its positions are counted from there
    config = AutoConfig.for_model(architecture, **OTHERS[architecture] | ids)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = reward_models.BradleyTerry(str(tmp_path))
    scorer.load()
    turns = [
        {"role": "user", "content": "q?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "and?"},
    ]
    records = [
        {"prompt": turns[:1], "responses": ["yes", "", "no " * 20]},
        {"prompt": turns, "responses": ["so", "word " * 30]},
    ]
    got = dict(scorer.score(records))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for index, record in enumerate(records):
        expected = []
        for response in record["responses"]:
            own = torch.tensor([list(scorer.encode(record["prompt"], response).ids)])
            with torch.no_grad():
                if (
                    architecture == "modernbert-decoder"
                ):  # its head at the last token, without looking for padding
                    expected.append(
                        model.classifier(model.head(model.model(own).last_hidden_state))[0, -1, 0].item()
                    )
                    continue
                if architecture == "gpt_neo":
                    expected.append(model.score(model.transformer(own).last_hidden_state)[0, -1, 0].item())
                    continue
                expected.append(model(own, attention_mask=torch.ones_like(own)).logits[0, 0].item())
        assert got[index]["rewards"] == pytest.approx(expected, abs=1e-4)
    assert len({round(r, 3) for found in got.values() for r in found["rewards"]}) > 3
    if architecture == "roberta":
        assert scorer.max_length == 98 and got[1]["cut"] == 1


def test_an_encoders_first_token_outlives_truncation(tmp_path):
    """BERT's kind pools [CLS], which such tokenizers do not call BOS."""
    tokenizer = micro.make_tokenizer("llama3")
    bos, tokenizer.bos_token, tokenizer.cls_token = tokenizer.bos_token, None, tokenizer.bos_token
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    micro.make_reward_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = reward_models.BradleyTerry(str(tmp_path), max_length=60)
    row = scorer.encode([{"role": "user", "content": "q?"}], "x" * 500)
    assert len(row.ids) == 60 and row.cut > 400 and row.ids[0] == tokenizer.convert_tokens_to_ids(bos)


def test_weights_without_a_place_are_told(models, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    for key, size in (("score.bias", 1), ("v_head.summary.weight", 64)):
        folder = shutil.copytree(models["bt"], tmp_path / key)
        weights = load_file(folder / "model.safetensors")
        save_file(
            weights | {key: weights["score.weight"].new_ones(size)},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    reward_models.BradleyTerry(str(tmp_path / "score.bias")).load()
    assert "its score.bias has no place in its architecture" in capsys.readouterr().out
    with pytest.raises(
        cli.UserError,
        match="v_head.summary.weight have no place in its architecture, LlamaForSequenceClassification",
    ):
        reward_models.BradleyTerry(str(tmp_path / "v_head.summary.weight")).load()


def test_an_error_of_the_models_own_code_is_one_line(tmp_path, monkeypatch):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = micro.make_tokenizer("llama3")
    BertForSequenceClassification(BertConfig(**SHAPE, pad_token_id=tokenizer.pad_token_id)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    scorer = reward_models.BradleyTerry(str(tmp_path))
    scorer.load()
    scorer.model.bert.embeddings.position_embeddings = torch.nn.Embedding(4, 32)
    with pytest.raises(
        cli.UserError, match="fails on 1 sequences of up to .* tokens: .*; with --max_length N they are cut"
    ):
        list(scorer.score([{"prompt": [{"role": "user", "content": "q?"}], "responses": ["yes"]}]))


# ---- ArmoRM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_armorm_against_the_published_formula(shards, tmp_path, monkeypatch):
    folder = micro.make_armorm(tmp_path / "rm", shards=shards)
    rows = generated(tmp_path / "gen.jsonl", 6)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder, "--batch_tokens", 700)
    expected = [armorm(folder, r["prompt"], x) for r in rows for x in r["responses"]]
    got = sum((r["rewards"] for r in out), [])
    assert got == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.5
    assert "reward_parts" not in out[0]


def test_armorm_without_its_header_is_null(models, tmp_path, monkeypatch):
    prompt = [{"role": "user", "content": "Hi"}]
    rows = [{"id": "a", "prompt": prompt, "responses": ["short", "x" * 200]}]
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(
        monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", models["armorm"], "--max_length", 60
    )
    assert out[0]["rewards"] == [pytest.approx(armorm(models["armorm"], prompt, "short", 60), abs=1e-4), None]
    assert armorm(models["armorm"], prompt, "x" * 200, 60) is None
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert (counts["null_rewards"], counts["truncated"]) == (1, 1)


@pytest.mark.parametrize(
    "lost", ["gating.layers.1.bias", "regression_layer.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_armorm_with_missing_weights_is_refused(lost, shards, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    folder = micro.make_armorm(tmp_path / "rm", shards=shards)
    for path in folder.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if k != lost}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if shards > 1:
        values = json.loads(index.read_text())
        values["weight_map"].pop(lost)
        index.write_text(json.dumps(values))
    generated(tmp_path / "gen.jsonl", 2)
    message = refused(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder)
    assert f"no trained {lost.removeprefix('model.')}" in message


# ---- Pair preference ---------------------------------------------------------------------------------------


def prefers(folder, messages, a, b):
    """P(a is better than b): both orders, each one sequence, the template typed by hand."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    context = "\n"
    for m in messages:
        context += (
            "\n<turn> assistant\n " + m["content"]
            if m["role"] == "assistant"
            else "\n<turn> user\n " + m["content"]
        )
    context += "\n"
    better = []
    for first, second, letter in ((a, b, "A"), (b, a, "B")):
        question = "[CONTEXT] " + context + " [RESPONSE A] " + first + " [RESPONSE B] " + second + " \n"
        text = "<|start_header_id|>user<|end_header_id|>\n\n" + question.strip() + "<|eot_id|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        x = {k: math.exp(logits[tokenizer.convert_tokens_to_ids(k)].item()) for k in "AB"}
        better.append(x[letter] / (x["A"] + x["B"]))
    return sum(better) / 2


def test_the_context_is_what_the_published_jinja_template_renders():
    """The template as RLHFlow prints it; jinja as transformers sets it trims one newline behind each
    block.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    published = (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] "
        "}}"
        "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
    )
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "How?"), ("assistant", "So.\n"), ("user", " And\n\nthen?"))
    ]
    for count in (1, 3):
        rendered, _ = render_jinja_template([turns[:count]], chat_template=published)
        assert preference.context_of(turns[:count]) == rendered[0]
    assert (
        preference.context_of(turns[:1]) == "\n\n<turn> user\n How?\n"
    )  # as in the training data that RLHFlow shows


def test_round_robin_against_one_pair_at_a_time(models, tmp_path, monkeypatch):
    folder = models["pair-preference-model-x"]
    rows = generated(tmp_path / "gen.jsonl", 4, K=3, longest=60)
    rows[2]["responses"][2] = rows[2]["responses"][0]  # a tie
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(
        monkeypatch,
        tmp_path / "gen.jsonl",
        tmp_path / "out.jsonl",
        folder,
        "--save_pair_probabilities",
        "--batch_tokens",
        900,
    )
    for record, row in zip(out, rows, strict=True):
        p = [
            [None if i == j else prefers(folder, row["prompt"], a, b) for j, b in enumerate(row["responses"])]
            for i, a in enumerate(row["responses"])
        ]
        for i in range(3):
            others = [x for x in p[i] if x is not None]
            assert record["pair_probabilities"][i][i] is None
            assert [x for x in record["pair_probabilities"][i] if x is not None] == pytest.approx(
                others, abs=1e-5
            )
            assert record["rewards"][i] == pytest.approx(sum(others) / 2, abs=1e-5)
    spread = [x for r in out for x in r["rewards"]]
    assert max(spread) - min(spread) > 0.05 and out[2]["pair_probabilities"][0][2] == 0.5
    settings = json.loads((tmp_path / "out.manifest.json").read_text())["settings"]
    assert settings["save_pair_probabilities"] is True and settings["ranking"] == "round_robin"
    assert "ranking was 'round_robin' and is now 'tournament'" in refused(
        monkeypatch,
        tmp_path / "gen.jsonl",
        tmp_path / "out.jsonl",
        folder,
        "--save_pair_probabilities",
        "--ranking",
        "tournament",
    )


def test_tournament_against_one_pair_at_a_time(models, tmp_path, monkeypatch):
    folder = models["pair-preference-model-x"]
    rows = generated(tmp_path / "gen.jsonl", 3, K=5, longest=40)
    out = annotate(
        monkeypatch,
        tmp_path / "gen.jsonl",
        tmp_path / "out.jsonl",
        folder,
        "--ranking",
        "tournament",
        "--save_pair_probabilities",
    )
    for record, row in zip(out, rows, strict=True):
        asked = [(i, j) for i in range(5) for j in range(i) if record["pair_probabilities"][i][j] is not None]
        assert len(asked) == 6  # 3 * (5 // 2)
        for i, j in asked:
            expected = prefers(folder, row["prompt"], row["responses"][i], row["responses"][j])
            assert record["pair_probabilities"][i][j] == pytest.approx(expected, abs=1e-5)
        best, worst = record["rewards"].index(1.0), record["rewards"].index(0.0)
        assert record["rewards"].count(1.0) == record["rewards"].count(0.0) == 1
        assert all(p is None or p >= 0.5 for p in record["pair_probabilities"][best])
        assert all(p is None or p <= 0.5 for p in record["pair_probabilities"][worst])


@pytest.mark.parametrize("family, architecture", [("chatml", "qwen2"), ("gemma", "gemma2")])
def test_pair_preference_of_other_families_against_the_whole_model(family, architecture, tmp_path):
    """Logits from two rows of the head, soft-capped where the model does so, are the model's own."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = micro.make_pair_preference(tmp_path / "rm", family, architecture)
    scorer = preference.PairPreference(str(folder), save_pairs=True)
    scorer.load()
    prompt, responses = (
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q?"}],
        ["yes", "no no", "x" * 30],
    )
    [(_, found)] = list(scorer.score([{"prompt": prompt, "responses": responses}]))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for i, j in ((0, 1), (1, 2)):
        forth, back, cut = scorer.encode_pair(prompt, responses[i], responses[j])
        with torch.no_grad():
            a, b = (
                torch.softmax(model(torch.tensor([list(ids)])).logits[0, -1, scorer.letters], 0)[0].item()
                for ids in (forth, back)
            )
        assert found["pairs"][i][j] == pytest.approx((a + 1 - b) / 2, abs=1e-5) and not cut


def test_long_pairs_lose_context_first_and_are_left_out_last(models, tmp_path, monkeypatch):
    folder = models["pair-preference-model-x"]
    scorer = preference.PairPreference(str(folder), max_length=150)
    prompt = [{"role": "user", "content": "long " * 100 + "end"}]
    forth, back, cut = scorer.encode_pair(prompt, "abc", "defg")
    text = scorer.tokenizer.decode(list(forth))
    assert cut and max(len(forth), len(back)) <= 150 and len(forth) > 140
    assert "[CONTEXT]" in text and "end\n [RESPONSE A] abc [RESPONSE B] defg" in text
    assert scorer.encode_pair(prompt, "a" * 100, "b" * 100) == (None, None, True)
    rows = [{"id": "r", "prompt": prompt, "responses": ["abc", "b" * 200, "defg"]}]
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(monkeypatch, tmp_path / "gen.jsonl", tmp_path / "out.jsonl", folder, "--max_length", 150)
    first, none, last = out[0]["rewards"]
    assert none is None and first + last == pytest.approx(1, abs=1e-5)
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert (counts["null_rewards"], counts["truncated"]) == (1, 6)


def test_a_policy_is_not_taken_for_a_preference_model(models, tmp_path, monkeypatch):
    generated(tmp_path / "gen.jsonl", 2)
    files = tmp_path / "gen.jsonl", tmp_path / "out.jsonl"
    policy = micro.make_policy(tmp_path / "policy", max_position_embeddings=1024)
    assert "--reward_type pair_preference" in refused(monkeypatch, *files, policy)
    assert "which is pair_preference, not --reward_type armorm" in refused(
        monkeypatch, *files, policy, "--reward_type", "armorm"
    )
    message = refused(monkeypatch, *files, models["bt"], "--reward_type", "pair_preference")
    assert "which is bradley_terry, not --reward_type pair_preference" in message
    assert "not one of auto" in refused(monkeypatch, *files, policy, "--reward_type", "pairs")
    assert "--ranking is for pair-preference models" in refused(
        monkeypatch, *files, models["bt"], "--ranking", "tournament"
    )
    assert (
        len(annotate(monkeypatch, *files, policy, "--reward_type", "pair_preference")) == 2
    )  # told so, it is believed


def test_a_tokenizer_without_single_letters_is_refused(models, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    folder = micro.make_pair_preference(tmp_path / "rm")
    odd = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(kinds.WordLevel({"x": 0, "?": 1}, unk_token="?")), unk_token="?"
    )
    odd.chat_template = micro.TEMPLATES["llama3"]
    odd.save_pretrained(folder)
    with pytest.raises(cli.UserError, match='no single tokens for "A" and "B"'):
        preference.PairPreference(str(folder))


def test_kinds_go_by_the_config():
    kind = reward_models.kind_of
    assert (
        kind({"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "x"}}, "auto", "m")
        == "bradley_terry"
    )
    assert kind({"architectures": ["LlamaForRewardModelWithGating"]}, "auto", "m") == "armorm"
    assert (
        kind({"architectures": ["LlamaForCausalLM"]}, "auto", "RLHFlow/pair-preference-model-LLaMA3-8B")
        == "pair_preference"
    )
    assert kind({"architectures": ["LlamaForCausalLM"]}, "pair_preference", "my/model") == "pair_preference"
    for config in (
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForRewardModelWithGating31"]},
        {"architectures": ["XForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
    ):
        with pytest.raises(cli.UserError):
            kind(config, "auto", "my/model")
