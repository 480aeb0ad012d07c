"""What TRL's tests ask of DPOTrainer, asked of run_dpo.py: each run ends with a finite loss, its metrics, and
weights that moved.

TRL's file enters by the constructor, on models of the hub; here the same settings go through the script, on
micro models. Not here because it has another place: losses step by step (test_dpo.py), adapters and
quantisation (test_adapters.py), the card (test_card.py), ZeRO and FSDP (test_sharding.py). Not taken at all,
and refused by name (test_arguments.py): padding_free, sync_ref_model, truncation_mode, Liger where it is
not installed. TRL's vision models and iterable datasets are not offered.
"""

import math

import micro
import pytest
import torch
import training
from training import read_json, read_jsonl, weights

FLOAT32 = "--bf16 false --learning_rate 0.1 --max_steps 3 --per_device_train_batch_size 2 --label_smoothing 0"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    micro.make_policy(folder / "policy", initializer_range=0.1)
    training.write_rewarded(folder / "rewarded.jsonl", count=10)
    return folder


@pytest.fixture
def train(train, work):
    """Train; returns (weights before, weights after, entries of the log)."""

    def go(name, *more, policy="policy", data="rewarded.jsonl"):
        paths = f"--model_name_or_path {work}/{policy} --train_dir {work}/{data}"
        made = train(name, FLOAT32, paths, *more)
        log = read_json(f"{made}.trainer_state.json")["log_history"]
        assert math.isfinite(log[-1]["train_loss"])
        return weights(work / policy), weights(made), log

    return go


def all_moved(before, after, but=()):
    """Every tensor has changed (a bias of the keys has no gradient: a softmax does not see it)."""
    still = [name for name in before if torch.equal(before[name], after[name])]
    return [name for name in still if not name.endswith(("k_proj.bias", *but))] == []


def usually(cases, *some):
    """The cases, all but some of them `long`: they differ in what is TRL's or transformers' own."""
    return [pytest.param(case, marks=[] if case in some else pytest.mark.long) for case in cases]


EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "cohere2": {},
    "olmo3": {},
    "gpt_neox": {},
    "phi3": {},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "gpt_oss": EXPERTS | {"num_local_experts": 4},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
}


@pytest.mark.parametrize("architecture", usually(FAMILIES, "llama", "cohere2", "qwen3_moe"))
def test_architectures_train(work, train, architecture):
    policy, more = f"of_{architecture}", FAMILIES[architecture]
    micro.make_policy(work / policy, architecture=architecture, initializer_range=0.1, **more)
    before, after, log = train(f"from_{architecture}", policy=policy)
    # Experts that no token was sent to, and the router's bias where all are, stand still.
    still = ("router.bias", "sinks") if architecture == "gpt_oss" else ()
    assert set(before) == set(after) and all_moved(before, after, still)
    metrics = {"loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens"}
    metrics |= {
        f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")
    }
    metrics |= {"rewards/accuracies", "rewards/margins"}
    assert metrics <= set(log[0])


USUAL = (
    "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0",
    "--loss_type aot_unpaired",
    "--ld_alpha 0.5",
    "--f_divergence_type js_divergence",
    "--disable_dropout false",
)
OPTIONS = [
    *USUAL,
    "--loss_type sft",
    "--loss_type sigmoid_norm",
    "--use_weighting true",
    *(f"--f_divergence_type {kind}" for kind in ("reverse_kl", "forward_kl", "alpha_divergence")),
    '--gradient_checkpointing true --gradient_checkpointing_kwargs {"use_reentrant":true}',
    "--optim sgd",
    "--attn_implementation eager",
]


@pytest.mark.parametrize("more", usually(OPTIONS, *USUAL))
def test_options_train(train, more):
    before, after, _ = train("option", more, "--overwrite true")
    assert all_moved(before, after)


def test_moe_logs_its_auxiliary_loss(work, train):
    more = FAMILIES["qwen3_moe"] | {"output_router_logits": True}
    micro.make_policy(work / "router", architecture="qwen3_moe", initializer_range=0.1, **more)
    before, after, log = train("routed", "--router_aux_loss_coef 0.01", policy="router")
    assert all_moved(before, after) and "aux_loss" in log[0]


def test_template_arguments_reach_the_tokens(work, train):
    thought = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}THOUGHT{% endif %}{{ "
        "m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\nTHOUGHT{% endif %}"
    )
    (work / "thinking.jinja").write_text(template.replace("THOUGHT", thought))
    micro.make_policy(work / "chatml", "chatml", "qwen2", initializer_range=0.1)
    tokens = []
    for name, more in (("thinking", ""), ("plain", '--template_kwargs {"enable_thinking":false}')):
        _, _, log = train(name, f"--chat_template {work}/thinking.jinja", more, policy="chatml")
        tokens.append(log[0]["num_tokens"])
    more, thought = tokens[1] - tokens[0], len("<think></think>")  # a byte a token
    assert more >= 4 * 2 * thought and more % (2 * thought) == 0  # once a turn, in both sequences of 4 pairs


def test_a_response_that_the_prompt_leaves_no_room_for_is_cut_not_lost(work, train):
    """TRL drops a pair whose response is cut away whole; here the prompt is cut first, so that every response
    keeps tokens.
    """
    training.write_rewarded(work / "long.jsonl", count=10, prompt=[{"role": "user", "content": "x" * 300}])
    _, _, log = train("cut", "--max_length 64 --max_prompt_length 56", data="long.jsonl")
    counts = read_json(work / "cut.manifest.json")["counts"]
    assert counts["train_pairs"] == 10 and counts["prompts_cut"] == 10 and counts["responses_cut"] == 20
    assert len(read_jsonl(work / "cut.pairs.jsonl")) == 10
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
