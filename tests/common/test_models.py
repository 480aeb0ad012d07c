"""A model's positions are counted as vLLM counts them, a folder is one tokenizer whatever lies beside it, and
what is no whole model is called what it is.
"""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import micro

from common import models
from common.chat import ChatTemplate
from common.cli import UserError

pytestmark = pytest.mark.env("vllm")

LINEAR = {"rope_type": "linear", "factor": 4.0}
PHI = {"hidden_size": 64, "num_attention_heads": 2, "pad_token_id": 0, "original_max_position_embeddings": 64}


def of(model_type, length=64, rope=None, **more):
    """A config.json; `rope`: its `rope_scaling`."""
    scaling = {"rope_scaling": rope} if rope else {}
    return {"model_type": model_type, "max_position_embeddings": length} | scaling | more


def yarn(kind, factor, original, **more):
    return {"type": kind, "factor": factor, "original_max_position_embeddings": original} | more


CONFIGS = {  # name → (config.json, positions)
    "plain": (of("llama"), 64),
    "said nowhere": ({"model_type": "llama"}, 2048),
    "linear": (of("llama", rope=LINEAR), 256),
    "of old": (of("llama", rope_theta=1e4, rope={"type": "linear", "factor": 2.5}), 160),
    "of transformers 5": (of("qwen3", rope_parameters=LINEAR | {"rope_theta": 1e4}), 256),
    "dynamic": (of("llama", rope={"type": "dynamic", "factor": 2.0}), 128),
    "yarn": (of("qwen2", rope=yarn("yarn", 4.0, 16)), 64),
    "llama3": (of("llama", rope=yarn("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)), 64),
    "longrope": (
        of("phi3", 128, yarn("longrope", 1.0, 64, short_factor=[1.0] * 16, long_factor=[2.0] * 16), **PHI),
        128,
    ),
    "factor null": (of("llama", rope={"rope_type": "default", "factor": None}), 64),
    "window": (of("mistral", sliding_window=16), 64),
    "gemma 3": (of("gemma3_text", rope=LINEAR), 64),
    "a kind for each layer": (
        of(
            "olmo3",
            num_hidden_layers=4,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": LINEAR | {"rope_theta": 1e4},
            },
        ),
        256,
    ),
    "text inside": ({"model_type": "qwen2_vl", "text_config": of("qwen2_vl_text")}, 64),
    "gpt2": ({"model_type": "gpt2", "n_positions": 64}, 64),
    "mpt": ({"model_type": "mpt", "max_seq_len": 64}, 64),
    "cohere": (of("cohere", model_max_length=96), 96),
    "recurrent": ({"model_type": "mamba"}, None),
}


def engine_takes(folder, length):
    """Whether vLLM takes a model for `length` tokens, by its own check."""
    from types import SimpleNamespace

    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    config = get_config(str(folder), trust_remote_code=False)
    text = get_hf_text_config(config)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)(
        config, text
    )
    derived = SimpleNamespace(derived_max_model_len_and_key=convertor.derive_max_model_len_and_key())
    try:
        return (
            _get_and_verify_max_len(text, derived, None, length, False, getattr(text, "sliding_window", None))
            == length
        )
    except ValueError:
        return False


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_are_those_of_the_engine(name, tmp_path):
    from transformers import AutoConfig

    config, expected = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.positions(AutoConfig.from_pretrained(tmp_path)) == expected
    if name != "said nowhere":  # config.json lacks what only the class knows
        assert models.positions(config) == expected
    assert engine_takes(tmp_path, expected or 10**9)
    assert expected is None or not engine_takes(tmp_path, expected + 1)


def test_t5_counts_distances_and_not_positions():
    config = {"model_type": "t5", "n_positions": 512, "relative_attention_num_buckets": 32}
    assert models.positions(config) is None


def test_a_reward_models_limit_is_stretched_too(tmp_path):
    """Also where its tokenizer repeats the length from before stretching; another limit of the tokenizer
    stays.
    """
    from annotate_data.backbone import Backbone

    folder = micro.make_reward_model(
        tmp_path / "rm", max_position_embeddings=64, rope_parameters=LINEAR | {"rope_theta": 1e4}
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for told, expected in ((None, 256), (64, 256), (100, 100), (10**30, 256)):
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings | ({"model_max_length": told} if told else {}))
        )
        assert Backbone(str(folder)).max_length == expected


def test_a_tekken_file_beside_the_tokenizer_changes_nothing(tmp_path):
    """mistral-common, which comes with vLLM, would take the folder over; a folder with that file alone is
    refused by name.
    """
    import mistral_common

    folder = micro.make_policy(tmp_path / "policy", "mistral", "mistral")
    before = models.load_tokenizer(str(folder))
    tekken = next((Path(mistral_common.__file__).parent / "data").glob("tekken*.json"))
    shutil.copy(tekken, folder / "tekken.json")
    tokenizer = models.load_tokenizer(str(folder))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert ChatTemplate(tokenizer).encode(turns, False) == ChatTemplate(before).encode(turns, False)
    assert tokenizer.get_vocab() == before.get_vocab()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="policy has no tokenizer but tekken.json.*put the tokenizer.json"):
        models.load_tokenizer(str(folder))


def test_several_chat_templates(tmp_path):
    """The one called default is taken; without it the error names model and templates."""
    tokenizer = micro.make_tokenizer("chatml")
    template, path = tokenizer.chat_template, tmp_path / "policy"
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    settings = json.loads((path / "tokenizer_config.json").read_text())

    def load(templates):
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": listed}))
        return models.load_tokenizer(str(path))

    turns = [{"role": "user", "content": "hi"}]
    text = ChatTemplate(load({"tool_use": "no", "default": template})).render(turns, True)
    assert text.startswith("<|im_start|>user\nhi")
    several = "policy has the chat templates tool_use, rag and none is the default: .*--chat_template"
    with pytest.raises(UserError, match=several):
        ChatTemplate(load({"tool_use": "no", "rag": "no"})).render(turns, True)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the tokenizer of .*policy has no chat template"):
        ChatTemplate(models.load_tokenizer(str(path))).render(turns, True)


HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"1234"
NOTE = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    models.check_model(str(folder))
    return folder


def sharded(folder, *there):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    )
    for name in there:
        (folder / name).write_bytes(WEIGHTS)


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "model.safetensors").unlink()


def checkpoint(folder, *states):
    (folder / "model.safetensors").unlink()
    for name in ("training_args.bin", "rng_state_0.pth", *states):
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (adapter, r"is an adapter \(LoRA\), no model: merge it into owner/base first"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a whole model and an adapter"),
        (lambda f: (f / "config.json").unlink(), "without config.json"),
        (lambda f: checkpoint(f, "global_step20"), "without whole weights; .*zero_to_fp32.py"),
        (
            lambda f: checkpoint(f, "pytorch_model_fsdp_0"),
            "without whole weights; .*accelerate merge-weights",
        ),
        (
            lambda f: sharded(f, "model-2-of-2.safetensors"),
            "lacks 1 of the 2 files of its weights, model-1-of-2.safetensors for one",
        ),
        (lambda f: (f / "model.safetensors").write_text(NOTE), "is a note of git-lfs .*git lfs pull"),
        (lambda f: (f / "tokenizer.json").write_text(NOTE), "is a note of git-lfs .*git lfs pull"),
        (lambda f: (f / "model.safetensors").write_bytes(WEIGHTS[:-1]), "is damaged or was cut off: fetch"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged or was cut off: fetch"),
    ],
)
def test_what_is_no_whole_model_is_called_what_it_is(model, change, told):
    change(model)
    with pytest.raises(UserError, match=told) as error:
        models.check_model(str(model), "--reward_name_or_path")
    assert str(error.value).startswith(f"--reward_name_or_path {model}") and "\n" not in str(error.value)


def test_whole_models_pass_and_what_only_has_a_config_is_left_to_the_loader(model):
    sharded(model, "model-1-of-2.safetensors", "model-2-of-2.safetensors")
    (model / "global_step20").mkdir()
    models.check_model(str(model))
    without = model.parent / "config"  # a plan may be made from it, and gen_hf.py wants its tokenizer only
    without.mkdir()
    (without / "config.json").write_text("{}")
    models.check_model(str(without))


def test_the_adapter_that_training_leaves_names_its_merged_model(model):
    own = model / "adapter"
    own.mkdir()
    (own / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"is an adapter .*: give {model}, into which it is merged"):
        models.check_model(str(own))


def test_weights_of_another_shape_are_called_that(tmp_path):
    """transformers' own error points at a report "above", which the scripts do not show."""
    from transformers import AutoModelForCausalLM

    folder = micro.make_policy(tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(UserError, match=": its weights have other shapes than its config.json says$"):
        models.load_weights(AutoModelForCausalLM, str(folder))


def test_an_encoder_decoder_is_no_policy(model):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is an encoder-decoder \(t5\)"):
        models.check_policy(str(model))


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [("llama", {}, None), ("gemma2", {"attn_logit_softcapping": 50.0}, "eager")],
)
def test_no_soft_cap_is_left_out_by_the_attention(architecture, more, expected):
    from transformers import AutoModelForCausalLM

    config = micro.make_config(micro.make_tokenizer(), architecture, **more)
    assert models.choose_attention(config, AutoModelForCausalLM, False) == expected
