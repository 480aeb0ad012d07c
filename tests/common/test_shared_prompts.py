"""common/shared_prompts.py: states, scores and gradients against one sequence at a time; what it refuses."""

import functools
import os
import random
from array import array

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: micro models gain nothing from threads

import micro
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, FalconConfig

from common import shared_prompts
from common.shared_prompts import Unsupported, hidden_states, last_states, pack, packed_tokens, plan, prepare

pytestmark = pytest.mark.env("vllm")

WINDOW = 7  # smaller than the prompts below
NARROW, LAYERS = {"sliding_window": WINDOW}, ["full_attention", "sliding_attention"]
ARCHITECTURES = {  # what its config says beside the micro one
    "llama": {},
    "mistral": NARROW,
    "qwen2": NARROW | {"use_sliding_window": True, "layer_types": LAYERS},
    "qwen3": {"num_key_value_heads": 2},
    "gemma2": NARROW | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 9},
    "gemma3_text": NARROW | {"layer_types": LAYERS[::-1]},
    "phi3": NARROW,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


def sequences(prompt, *own, seed=0):
    """Sequences of `prompt` equal tokens and then `own` tokens that differ from the first on."""
    rng = random.Random(seed)
    front = [rng.randrange(250) for _ in range(prompt)]
    return [front + [k] + [rng.randrange(250) for _ in range(n - 1)] for k, n in enumerate(own)]


# prompts long and short, 1 to 4 responses, a single token beside a long one, nothing in common
GROUPS = [
    sequences(23, 5, 1, 40, 5),
    sequences(9, 12, seed=1),
    sequences(3, 8, 8, seed=2),
    sequences(0, 6, 11, seed=3),
    sequences(40, 2, 3, seed=4),
]
EVERY = [sequence for group in GROUPS for sequence in group]


def configured(architecture, **overrides):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return micro.make_config(micro.make_tokenizer(), architecture, **(ids | overrides))


@functools.cache
def built(architecture):
    """A model whose attention is far from even: with small weights a wrong mask would hardly show."""
    torch.manual_seed(1)
    config = configured(architecture, **ARCHITECTURES[architecture])
    model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3 if "proj" in name else 1.0)
    return model


@pytest.fixture
def fresh():
    """A model of its own with the same weights, eager attention, float32."""

    def make(architecture="llama"):
        source = built(architecture)
        model = type(source)._from_config(source.config, attn_implementation="eager").eval()
        model.load_state_dict(source.state_dict())
        return model

    return make


@pytest.fixture
def emulate(monkeypatch):
    """Lets an emulation stand in for the GPU's kernel."""

    def switch():
        monkeypatch.setattr(shared_prompts, "uses_varlen", lambda query, softcap: True)
        monkeypatch.setattr(shared_prompts, "varlen_attn", varlen)

    return switch


def gradients(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def alone(model, sequence):
    ids = torch.tensor([list(sequence)])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]


def check(model, groups, tolerance=2e-5, **options):
    with torch.no_grad():
        expected = [alone(model, sequence) for group in groups for sequence in group]
        before = prepare(model)
        packed = pack(groups, **options)
        hidden, states = hidden_states(model, packed), last_states(model, packed)
        assert torch.equal(hidden, hidden_states(model, packed))  # the shortcut leaves nothing behind
        model.set_attn_implementation(before)
    assert hidden.shape[0] == packed.ids.shape[1]
    columns = packed.columns()
    assert len(columns) == len(expected) == len(packed.last)
    for where, last, state, want in zip(columns, packed.last, states, expected, strict=True):
        scale = want.abs().max()
        assert (hidden[where] - want).abs().max() < tolerance * scale
        assert (hidden[last] - want[-1]).abs().max() < tolerance * scale
        assert (state - want[-1]).abs().max() < tolerance * scale
    return packed


@each
def test_states_equal_one_sequence_at_a_time(architecture, fresh):
    packed = check(fresh(architecture), GROUPS)
    assert packed.ids.shape[1] == sum(map(packed_tokens, GROUPS)) < sum(map(len, EVERY)) - 100


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_windows_are_what_the_states_depend_on(name, fresh):
    """The check above could not fail on windows if they did not matter for these sequences."""
    model, sequence = fresh(name), GROUPS[0][2]
    with torch.no_grad():
        want = alone(model, sequence)
        model.config.sliding_window = 1000
        for layer in model.layers:
            if getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn.sliding_window = 1000
        assert (alone(model, sequence) - want).abs().max() > 0.01 * want.abs().max()


@each
def test_last_states_are_computed_for_last_tokens_only(architecture, fresh):
    model, seen = fresh(architecture), []
    prepare(model)
    for layer in model.layers:
        child = next(layer.mlp.children())
        child.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
    with torch.no_grad():
        last_states(model, pack(GROUPS))
    assert seen == [sum(map(packed_tokens, GROUPS)), sum(map(len, GROUPS))]


def test_layout_of_the_row():
    a, b, c = [5, 6, 7, 1, 2], [5, 6, 7, 3], [9, 9]
    packed = pack([[a, b], [c]])
    assert packed.ids.tolist() == [[5, 6, 7, 1, 2, 3, 9, 9]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert packed.groups == [(0, 3, (2, 1)), (6, 0, (2,))]
    assert packed.last.tolist() == [4, 5, 7]
    assert [columns.tolist() for columns in packed.columns()] == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7]]
    assert pack([[a, b]], labelled=True).ids.tolist() == [[5, 6, 7, 1, 2, 7, 3]]


@pytest.mark.parametrize(
    ("group", "prefix"),
    [
        ([[1, 2, 3], [1, 2, 3]], 2),  # equal: the last token stays with each
        ([[1, 2], [1, 2, 3, 4]], 1),  # one is the other's beginning
        ([[1], [1, 2]], 0),
        ([[4, 2, 3], [5, 2, 3]], 0),
        ([[1, 2, 3]], 0),
        ([[7, 8, 9, 1], [7, 8, 9, 2], [7, 8, 3]], 2),
    ],
)
def test_what_is_shared(group, prefix, fresh):
    assert shared_prompts.shared(group) == prefix
    assert packed_tokens(group) == pack([group]).ids.shape[1]
    check(fresh(), [[array("i", sequence) for sequence in group]])


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        pack([[[1, 2], []]])


def test_left_truncation_shares_what_is_left(fresh):
    whole = sequences(30, 5, 9, 14)
    cut = [sequence[-25:] for sequence in whole]  # each begins elsewhere in the prompt
    with_bos = [[1, *sequence] for sequence in cut]
    assert pack([cut]).groups[0].prefix == 0 and pack([with_bos]).groups[0].prefix == 1
    check(fresh(), [cut, with_bos, whole])


def test_labelled_rows_give_each_column_one_next_token(fresh):
    packed = check(fresh("qwen2"), GROUPS, labelled=True)
    assert [group.prefix for group in packed.groups] == [22, 0, 2, 0, 39]
    after = {}
    for columns, sequence in zip(packed.columns(), EVERY, strict=True):
        for column, token in zip(columns.tolist(), sequence[1:]):
            assert after.setdefault(column, token) == token
    nested = [[1, 2, 3], [1, 2, 3, 4, 5]]  # one is the other's beginning: nothing comes after its last token
    assert pack([nested], labelled=True).ids.tolist() == [[1, 2, 3, 3, 4, 5]]
    assert shared_prompts.shared([[1, 2], [3]], labelled=True) == 0


def varlen(query, key, value, starts_q, starts_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """What torch's documentation says that its CUDA kernel computes, span by span in plain operations."""
    made, (left, right) = [], window_size
    assert right == 0 and enable_gqa == (query.shape[1] != key.shape[1]) and query.is_contiguous()
    assert starts_q.dtype == starts_k.dtype == torch.int32
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        assert b - a <= most_q and d - c <= most_k
        heads, q = query.shape[1] // key.shape[1], query[a:b].transpose(0, 1)
        k, v = (x[c:d].transpose(0, 1).repeat_interleave(heads, 0) for x in (key, value))
        # The last query stands at the last key.
        ahead = torch.arange(d - c) - torch.arange(b - a)[:, None] - (d - c - (b - a))
        may = (ahead <= 0) & (ahead >= -left if left >= 0 else True)
        made.append(((q @ k.mT) * scale).masked_fill(~may, float("-inf")).softmax(-1) @ v)
    return torch.cat(made, 1).transpose(0, 1)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2"])  # its soft-cap
def test_one_call_for_all_spans_is_laid_out_right(architecture, fresh, emulate):
    """The kernel runs on GPUs only, so its emulation stands in; the layout and the gradients are ours."""
    model, found = fresh(architecture), []
    prepare(model)
    for emulated in (False, True):
        if emulated:
            emulate()
        model.zero_grad()
        hidden_states(model, pack(GROUPS, labelled=True)).square().mean().backward()
        found.append(gradients(model))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()
    check(fresh(architecture), GROUPS)
    check(fresh(architecture), GROUPS, labelled=True)


def test_only_wanted_columns_come_back(fresh):
    model = fresh()
    prepare(model)
    handle, packed = shared_prompts.only_wanted(model), pack(GROUPS, labelled=True)
    with torch.no_grad():
        whole = hidden_states(model, packed)
        packed.wanted = torch.tensor([3, 0, 7])
        assert torch.equal(hidden_states(model, packed.to("cpu")), whole[[3, 0, 7]])
    handle.remove()


@each
def test_gradients_equal_the_sum_of_one_at_a_time(architecture, fresh):
    model = fresh(architecture)
    torch.manual_seed(3)
    toward = torch.randn(300, model.config.hidden_size)

    def loss(states):
        return (states * toward[: len(states)]).sum() / 100 + states.square().mean()

    sum(loss(alone(model, sequence)) for sequence in EVERY).backward()
    named = {name: weight for name, weight in model.named_parameters() if weight.grad is not None}
    expected = {name: weight.grad.clone() for name, weight in named.items()}
    model.zero_grad()
    prepare(model)
    packed = pack(GROUPS)
    hidden = hidden_states(model, packed)
    sum(loss(hidden[columns]) for columns in packed.columns()).backward()
    assert len(expected) > 10
    for name, weight in named.items():
        assert (weight.grad - expected[name]).norm() < 3e-5 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_with_checkpointing_are_the_same(architecture, fresh):
    found = []
    for checkpointing in (False, True):
        model = fresh(architecture).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        prepare(model)
        hidden_states(model, pack(GROUPS)).square().mean().backward()
        found.append(gradients(model))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-8) and found[0].norm() > 0


@each
def test_bfloat16_is_as_close_as_bfloat16_is(architecture, fresh):
    model = fresh(architecture)
    for weight in model.parameters():  # gentler than above, or rounding would grow from layer to layer
        weight.data.mul_(0.3 if weight.ndim == 2 else 1)
    with torch.no_grad():
        expected = [alone(model, sequence) for sequence in EVERY]
        model.to(torch.bfloat16)
        prepare(model, GROUPS[0])
        packed = pack(GROUPS)
        hidden = hidden_states(model, packed)
    assert hidden.dtype == torch.bfloat16
    for columns, want in zip(packed.columns(), expected, strict=True):
        assert (hidden[columns] - want).norm() < 0.03 * want.norm()


@each
def test_attention_goes_through_the_layout(architecture, fresh, monkeypatch):
    """Each layer calls our function with the layout and no mask, and the layout decides the result."""
    model, calls, true = fresh(architecture), [], shared_prompts.attention

    def counted(module, query, key, value, attention_mask, shared_prompts=None, **more):
        calls.append((attention_mask, shared_prompts))
        return true(module, query, key, value, attention_mask, shared_prompts=shared_prompts, **more)

    prepare(model)
    monkeypatch.setitem(shared_prompts.AttentionInterface._global_mapping, shared_prompts.NAME, counted)
    packed = pack(GROUPS)
    with torch.no_grad():
        hidden = hidden_states(model, packed)
        assert len(calls) == model.config.num_hidden_layers
        assert all(mask is None and layout is packed for mask, layout in calls)
        merged = [shared_prompts.Group(0, 0, (packed.ids.shape[1],))]  # one long causal sequence
        row = shared_prompts.Packed(packed.ids, packed.positions, merged, packed.last)
        ignored = hidden_states(model, row)
        assert (ignored - hidden).abs().max() > 0.01 * hidden.abs().max()
        with pytest.raises(RuntimeError, match="without `shared_prompts`"):
            model(input_ids=packed.ids)


@pytest.mark.parametrize("one_call", [False, True])
def test_one_pass_for_scoring_does_not_spoil_the_row_for_training(fresh, emulate, one_call):
    if one_call:
        emulate()
    model = fresh()
    prepare(model)
    packed = pack(GROUPS)
    with torch.inference_mode():
        hidden_states(model, packed)
    hidden_states(model, packed).sum().backward()


def test_plan_holds_the_budget_and_forgets_nothing():
    rng = random.Random(0)
    owns = [[rng.randrange(1, 50) for _ in range(rng.randrange(1, 9))] for _ in range(40)]
    groups = [sequences(rng.randrange(60), *own, seed=i) for i, own in enumerate(owns)]
    for budget in (1, 60, 200, 5000):
        seen, sizes = [], []
        for batch in plan(groups, budget):
            seen += [(g, s) for g, part in batch for s in part]
            sizes.append(pack([[groups[g][s] for s in part] for g, part in batch]).ids.shape[1])
            # a part of few may share more than the whole group, never less
            assert sizes[-1] <= budget or len(batch) == len(batch[0][1]) == 1
        assert sorted(seen) == [(g, s) for g, group in enumerate(groups) for s in range(len(group))]
        assert len(sizes) < 40 or budget < 200


def test_prepare_with_an_example_takes_what_agrees(fresh):
    for architecture in ARCHITECTURES:
        model = fresh(architecture)
        assert prepare(model, GROUPS[0]) == "eager"
        assert model.config._attn_implementation == shared_prompts.NAME


def test_prepare_refuses_what_does_not_agree_and_leaves_the_model_alone(fresh, monkeypatch):
    true = shared_prompts._attend

    def forgets_the_prompt(query, key, value, *more):
        own = query.shape[2]
        return true(query, key[:, :, -own:], value[:, :, -own:], *more)

    model = fresh()
    for wrong, told in (
        (forgets_the_prompt, "its states differ by"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ):
        monkeypatch.setattr(shared_prompts, "_attend", wrong)
        with pytest.raises(Unsupported, match=told):
            prepare(model, GROUPS[0])
        assert model.config._attn_implementation == "eager"
        alone(model, GROUPS[0][0])


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("bert", {"num_key_value_heads": 2}, "looks ahead"),
        ("modernbert", {}, "looks ahead"),
        ("t5", {"d_kv": 8}, "one stack"),
        ("falcon", {}, "cannot be replaced"),
        ("bloom", {"n_head": 2}, "cannot be replaced"),
        ("mamba", {}, "recurrent"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("phi3", {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
            "original_max_position_embeddings": 64}}, "longrope"),
    ],
)  # fmt: skip
def test_what_cannot_share_is_refused(architecture, overrides, reason):
    if architecture == "falcon":  # has no setter for the micro shape's head_dim
        config = FalconConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=288)
    else:
        config = configured(architecture, **overrides)
    model = AutoModel.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(Unsupported, match=reason):
        prepare(model)
    assert model.config._attn_implementation == before


def test_attention_sinks_are_refused_by_the_trial():
    shape = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    model = AutoModel.from_config(configured("gpt_oss", **shape)).eval()
    with pytest.raises(Unsupported):
        prepare(model, GROUPS[0])


def test_a_classifier_and_its_saved_config(tmp_path):
    """The whole model is prepared through its head; another attention's name does not reach the disk."""
    torch.manual_seed(0)
    config = configured("llama", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        expected = [model(torch.tensor([sequence])).logits[0, 0].item() for sequence in EVERY]
        assert prepare(model, GROUPS[0]) == "sdpa"
        packed = pack(GROUPS)
        scores = model.score(hidden_states(model.base_model, packed)[packed.last])[:, 0].tolist()
    assert scores == pytest.approx(expected, abs=1e-5) and len({round(x, 4) for x in scores}) > 5
    model.save_pretrained(tmp_path)
    assert shared_prompts.NAME not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    model(torch.tensor([GROUPS[0][0]]))
