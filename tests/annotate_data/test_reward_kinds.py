"""Other classifiers, ArmoRM and pair preference, each against a computation of one sequence written here."""

import json
import math
import shutil

import micro
import pytest
from rewarding import armorm, flat, generated, write

from annotate_data import kinds, preference, reward_models
from common import cli

pytestmark = pytest.mark.env("vllm")

COMMON = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_labels": 1,
    "initializer_range": 0.3,
}
SHAPE = COMMON | {"num_hidden_layers": 2, "num_attention_heads": 2}
BART = {
    f"{part}_{key}": n
    for part in ("encoder", "decoder")
    for key, n in (("layers", 1), ("attention_heads", 2))
}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0, "init_std": 0.3}
LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": 16}
OTHERS = {  # architecture → settings; what their heads look at differs, and DeBERTa has no sdpa
    "bert": SHAPE,
    "deberta-v2": SHAPE | {"pos_att_type": ["p2c", "c2p"], "relative_attention": True},
    "roberta": SHAPE | {"max_position_embeddings": 100},
    "bart": {"vocab_size": 288, "d_model": 32, "num_labels": 1} | BART,
    "modernbert-decoder": SHAPE | {"num_hidden_layers": 3, "max_position_embeddings": 512},
    "gpt_neo": COMMON | {"num_layers": 2, "num_heads": 2} | LOCAL,
}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def classifier(folder, architecture, padding="<|pad|>"):
    """A reward model of any architecture with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = micro.make_tokenizer("llama3")
    tokenizer.pad_token = padding
    # RoBERTa's positions are counted from its padding.
    ids = {"pad_token_id": 1 if architecture == "roberta" else tokenizer.pad_token_id}
    ids |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|eot_id|>"),
    }
    config = AutoConfig.for_model(architecture, **OTHERS[architecture] | ids)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("padding", ["<|pad|>", "<|eot_id|>"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_classifiers_of_other_architectures_against_one_sequence_alone(architecture, padding, tmp_path):
    """As they come, in one batch of different lengths, also where the end of turn is the padding token."""
    import torch
    from transformers import AutoModelForSequenceClassification

    scorer = reward_models.BradleyTerry(classifier(tmp_path, architecture, padding))
    scorer.load()
    records = [
        {"prompt": turns("q?"), "responses": ["yes", "", "no " * 20]},
        {"prompt": turns("q?", "a", "and?"), "responses": ["so", "word " * 30]},
    ]
    got = dict(scorer.score(records))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()

    def alone(ids):
        if architecture == "modernbert-decoder":  # its head at the last token, without looking for padding
            return model.classifier(model.head(model.model(ids).last_hidden_state))[0, -1, 0]
        if architecture == "gpt_neo":
            return model.score(model.transformer(ids).last_hidden_state)[0, -1, 0]
        return model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0]

    for index, record in enumerate(records):
        rows = [torch.tensor([list(scorer.encode(record["prompt"], x).ids)]) for x in record["responses"]]
        with torch.no_grad():
            assert got[index]["rewards"] == pytest.approx([alone(ids).item() for ids in rows], abs=1e-4)
    assert len({round(r, 3) for r in flat(got.values())}) > 3
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
    row = scorer.encode(turns("q?"), "x" * 500)
    assert len(row.ids) == 60 and row.cut > 400 and row.ids[0] == tokenizer.convert_tokens_to_ids(bos)


def test_weights_without_a_place_are_told(models, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    def with_more(key, size):
        folder = shutil.copytree(models["bt"], tmp_path / key)
        weights = load_file(folder / "model.safetensors")
        weights[key] = weights["score.weight"].new_ones(size)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return reward_models.BradleyTerry(str(folder))

    with_more("score.bias", 1).load()
    assert "its score.bias has no place in its architecture" in capsys.readouterr().out
    told = "v_head.summary.weight have no place in its architecture, LlamaForSequenceClassification"
    with pytest.raises(cli.UserError, match=told):
        with_more("v_head.summary.weight", 64).load()


def test_an_error_of_the_models_own_code_is_one_line(tmp_path):
    import torch

    scorer = reward_models.BradleyTerry(classifier(tmp_path, "bert"))
    scorer.load()
    scorer.model.bert.embeddings.position_embeddings = torch.nn.Embedding(4, 32)
    told = "fails on 1 sequences of up to .* tokens: .*; lower --max_length"
    with pytest.raises(cli.UserError, match=told):
        list(scorer.score([{"prompt": turns("q?"), "responses": ["yes"]}]))


# ---- ArmoRM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_armorm_against_the_published_formula(shards, annotate, tmp_path):
    folder = micro.make_armorm(tmp_path / "rm", shards=shards)
    rows = generated(tmp_path / "gen.jsonl", 6)
    out = annotate(folder, batch_tokens=700)
    expected = [armorm(folder, r["prompt"], x) for r in rows for x in r["responses"]]
    assert flat(out) == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.5
    assert "reward_parts" not in out[0]


def test_armorm_without_its_header_is_null(models, annotate, tmp_path):
    prompt, folder = turns("Hi"), models["armorm"]
    write(tmp_path / "gen.jsonl", [{"id": "a", "prompt": prompt, "responses": ["short", "x" * 200]}])
    [out] = annotate(folder, max_length=60)
    assert out["rewards"] == [pytest.approx(armorm(folder, prompt, "short", 60), abs=1e-4), None]
    assert armorm(folder, prompt, "x" * 200, 60) is None
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert (counts["null_rewards"], counts["truncated"]) == (1, 1)


@pytest.mark.parametrize("shards, lost", [
    (1, "gating.layers.1.bias"),
    (2, "regression_layer.weight"),
    (2, "model.layers.1.mlp.up_proj.weight"),
])  # fmt: skip
def test_armorm_with_missing_weights_is_refused(shards, lost, refused, tmp_path):
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
    assert f"no trained {lost.removeprefix('model.')}" in refused(folder)


# ---- Pair preference ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefers(models):
    """P(a is better than b): both orders, each one sequence, the template typed by hand."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["pairs"])
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(models["pairs"], **options).eval()

    def probability(messages, a, b):
        context = "\n"
        for m in messages:
            context += f"\n<turn> {m['role']}\n " + m["content"]
        better = []
        for first, second, letter in ((a, b, "A"), (b, a, "B")):
            question = f"[CONTEXT] {context}\n [RESPONSE A] {first} [RESPONSE B] {second} \n"
            text = "<|start_header_id|>user<|end_header_id|>\n\n" + question.strip() + "<|eot_id|>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            x = {k: math.exp(logits[tokenizer.convert_tokens_to_ids(k)].item()) for k in "AB"}
            better.append(x[letter] / (x["A"] + x["B"]))
        return sum(better) / 2

    return probability


def test_the_context_is_what_the_published_jinja_template_renders():
    """As RLHFlow prints it; jinja as transformers sets it trims one newline behind each block."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turn = "\n\n<turn> {}\n {{{{ message['content'] }}}}"
    published = (
        f"\n{{% for message in messages %}}{{% if loop.index0 % 2 == 0 %}}{turn.format('user')}"
        f"{{% else %}}{turn.format('assistant')}{{% endif %}}{{% endfor %}}\n\n\n"
    )
    talk = turns("How?", "So.\n", " And\n\nthen?")
    for count in (1, 3):
        rendered, _ = render_jinja_template([talk[:count]], chat_template=published)
        assert preference.context_of(talk[:count]) == rendered[0]
    assert preference.context_of(talk[:1]) == "\n\n<turn> user\n How?\n"  # as in RLHFlow's training data


def test_round_robin_against_one_pair_at_a_time(models, prefers, annotate, refused, tmp_path):
    rows = generated(tmp_path / "gen.jsonl", 4, K=3, longest=60)
    rows[2]["responses"][2] = rows[2]["responses"][0]  # a tie
    write(tmp_path / "gen.jsonl", rows)
    out = annotate(models["pairs"], save_pair_probabilities=True, batch_tokens=900)
    for record, row in zip(out, rows, strict=True):
        for i, a in enumerate(row["responses"]):
            found = record["pair_probabilities"][i]
            expected = [prefers(row["prompt"], a, b) for j, b in enumerate(row["responses"]) if j != i]
            assert found[i] is None and [p for p in found if p is not None] == pytest.approx(
                expected, abs=1e-5
            )
            assert record["rewards"][i] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert max(flat(out)) - min(flat(out)) > 0.05 and out[2]["pair_probabilities"][0][2] == 0.5
    told = refused(models["pairs"], save_pair_probabilities=True, ranking="tournament")
    assert "ranking was 'round_robin' and is now 'tournament'" in told


def test_tournament_against_one_pair_at_a_time(models, prefers, annotate, tmp_path):
    rows = generated(tmp_path / "gen.jsonl", 3, K=5, longest=40)
    out = annotate(models["pairs"], ranking="tournament", save_pair_probabilities=True)
    for record, row in zip(out, rows, strict=True):
        found, texts, rewards = record["pair_probabilities"], row["responses"], record["rewards"]
        asked = [(i, j) for i in range(5) for j in range(i) if found[i][j] is not None]
        assert len(asked) == 6  # 3 * (5 // 2)
        for i, j in asked:
            assert found[i][j] == pytest.approx(prefers(row["prompt"], texts[i], texts[j]), abs=1e-5)
        assert rewards.count(1.0) == rewards.count(0.0) == 1
        assert all(p is None or p >= 0.5 for p in found[rewards.index(1.0)])
        assert all(p is None or p <= 0.5 for p in found[rewards.index(0.0)])


@pytest.mark.parametrize("family, architecture", [("chatml", "qwen2"), ("gemma", "gemma2")])
def test_pair_preference_of_other_families_against_the_whole_model(family, architecture, tmp_path):
    """Logits from two rows of the head, soft-capped where the model does so, are the model's own."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = micro.make_pair_preference(tmp_path / "rm", family, architecture)
    scorer = preference.PairPreference(str(folder), save_pair_probabilities=True)
    scorer.load()
    prompt, responses = [{"role": "system", "content": "s"}, *turns("q?")], ["yes", "no no", "x" * 30]
    [(_, found)] = list(scorer.score([{"prompt": prompt, "responses": responses}]))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for i, j in ((0, 1), (1, 2)):
        *orders, cut = scorer.encode_pair(prompt, responses[i], responses[j])
        with torch.no_grad():
            logits = [model(torch.tensor([list(ids)])).logits[0, -1, scorer.letters] for ids in orders]
        a, b = (torch.softmax(of, 0)[0].item() for of in logits)
        assert found["pairs"][i][j] == pytest.approx((a + 1 - b) / 2, abs=1e-5) and not cut


def test_long_pairs_lose_context_first_and_are_left_out_last(models, annotate, tmp_path):
    scorer = preference.PairPreference(str(models["pairs"]), max_length=150)
    prompt = turns("long " * 100 + "end")
    forth, back, cut = scorer.encode_pair(prompt, "abc", "defg")
    text = scorer.tokenizer.decode(list(forth))
    assert cut and max(len(forth), len(back)) <= 150 and len(forth) > 140
    assert "[CONTEXT]" in text and "end\n [RESPONSE A] abc [RESPONSE B] defg" in text
    assert scorer.encode_pair(prompt, "a" * 100, "b" * 100) == (None, None, True)
    write(tmp_path / "gen.jsonl", [{"id": "r", "prompt": prompt, "responses": ["abc", "b" * 200, "defg"]}])
    first, none, last = annotate(models["pairs"], max_length=150)[0]["rewards"]
    assert none is None and first + last == pytest.approx(1, abs=1e-5)
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    assert (counts["null_rewards"], counts["truncated"]) == (1, 6)


def test_a_policy_is_not_taken_for_a_preference_model(models, annotate, refused, tmp_path):
    generated(tmp_path / "gen.jsonl", 2)
    policy = micro.make_policy(tmp_path / "policy", max_position_embeddings=1024)
    assert "--reward_type pair_preference" in refused(policy)
    assert "which is pair_preference, not --reward_type armorm" in refused(policy, reward_type="armorm")
    told = refused(models["bt"], reward_type="pair_preference")
    assert "which is bradley_terry, not --reward_type pair_preference" in told
    assert "not one of auto" in refused(policy, reward_type="pairs")
    assert "--ranking is for pair_preference reward models" in refused(models["bt"], ranking="tournament")
    assert len(annotate(policy, reward_type="pair_preference")) == 2  # told so, it is believed


def test_a_tokenizer_without_single_letters_is_refused(models, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(models["pairs"], tmp_path / "rm")
    words = Tokenizer(WordLevel({"x": 0, "?": 1}, unk_token="?"))
    odd = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    odd.chat_template = micro.TEMPLATES["llama3"]
    odd.save_pretrained(folder)
    with pytest.raises(cli.UserError, match='no single tokens for "A" and "B"'):
        preference.PairPreference(str(folder))


@pytest.mark.parametrize("architecture, asked, name, kind", [
    ("Qwen3ForSequenceClassification", "auto", "m", "bradley_terry"),
    ("LlamaForRewardModelWithGating", "auto", "m", "armorm"),
    ("LlamaForCausalLM", "auto", "RLHFlow/pair-preference-model-LLaMA3-8B", "pair_preference"),
    ("LlamaForCausalLM", "pair_preference", "my/model", "pair_preference"),
    ("LlamaForRewardModelWithGating31", "auto", "my/model", None),
])  # fmt: skip
def test_kinds_go_by_the_config(architecture, asked, name, kind):
    config = {"architectures": [architecture], "id2label": {"0": "x"}}
    if kind:
        assert kinds.kind_of(config, asked, name) == kind
    else:
        with pytest.raises(cli.UserError, match="not a reward model of a kind known here"):
            kinds.kind_of(config, asked, name)


def test_a_kind_is_an_entry(monkeypatch):
    """One with the same config as another must be asked for, by its name or its key."""
    config = {"architectures": ["LlamaForCausalLM"]}
    monkeypatch.setitem(kinds.KINDS, "yes", kinds.Kind(object, "ForCausalLM", names=("my-yes",)))
    assert kinds.kind_of(config, "yes", "m") == kinds.kind_of(config, "auto", "x/my-yes-8b") == "yes"
    assert kinds.kind_of(config, "auto", "pair-preference-model-x") == "pair_preference"
    with pytest.raises(cli.UserError, match="--reward_type pair_preference or yes$"):
        kinds.kind_of(config, "auto", "m")
