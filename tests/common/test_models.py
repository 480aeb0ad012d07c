"""A model's positions are counted as vLLM counts them, a folder is one tokenizer whatever lies beside it, and
what is no whole model is called what it is.
"""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import micro

from common import chat, models
from common.cli import UserError

pytestmark = pytest.mark.env("vllm")

LINEAR = {"rope_type": "linear", "factor": 4.0}
CONFIGS = {  # name → (config.json, positions)
    "plain": ({"model_type": "llama", "max_position_embeddings": 64}, 64),
    "said nowhere": ({"model_type": "llama"}, 2048),
    "linear": ({"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": LINEAR}, 256),
    "of old": (
        {
            "model_type": "llama",
            "max_position_embeddings": 64,
            "rope_theta": 1e4,
            "rope_scaling": {"type": "linear", "factor": 2.5},
        },
        160,
    ),
    "of transformers 5": (
        {
            "model_type": "qwen3",
            "max_position_embeddings": 64,
            "rope_parameters": LINEAR | {"rope_theta": 1e4},
        },
        256,
    ),
    "dynamic": (
        {
            "model_type": "llama",
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        128,
    ),
    "yarn": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
        64,
    ),
    "llama3": (
        {
            "model_type": "llama",
            "max_position_embeddings": 64,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        64,
    ),
    "longrope": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "pad_token_id": 0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 64,
            },
        },
        128,
    ),
    "mrope": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        },
        64,
    ),
    "factor null": (
        {
            "model_type": "llama",
            "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "default", "factor": None},
        },
        64,
    ),
    "window": ({"model_type": "mistral", "max_position_embeddings": 64, "sliding_window": 16}, 64),
    "gemma 3": ({"model_type": "gemma3_text", "max_position_embeddings": 64, "rope_scaling": LINEAR}, 64),
    "gemma 3 with pictures": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "max_position_embeddings": 64,
                "rope_scaling": LINEAR,
            },
        },
        64,
    ),
    "a kind for each layer": (
        {
            "model_type": "olmo3",
            "max_position_embeddings": 64,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": LINEAR | {"rope_theta": 1e4},
            },
        },
        256,
    ),
    "text inside": (
        {
            "model_type": "qwen2_vl",
            "text_config": {"model_type": "qwen2_vl_text", "max_position_embeddings": 64},
        },
        64,
    ),
    "gpt2": ({"model_type": "gpt2", "n_positions": 64}, 64),
    "opt": ({"model_type": "opt", "max_position_embeddings": 64}, 64),
    "bloom": ({"model_type": "bloom", "seq_length": 64}, 64),
    "mpt": ({"model_type": "mpt", "max_seq_len": 64}, 64),
    "cohere": ({"model_type": "cohere", "max_position_embeddings": 64, "model_max_length": 96}, 96),
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
    found = models.positions(AutoConfig.from_pretrained(tmp_path))
    assert found == expected
    if name != "said nowhere":  # config.json lacks what only the class knows
        assert models.positions(config) == expected
    assert engine_takes(tmp_path, expected or 10**9) and (
        expected is None or not engine_takes(tmp_path, expected + 1)
    )


def test_t5_counts_distances_and_not_positions():
    assert (
        models.positions({"model_type": "t5", "n_positions": 512, "relative_attention_num_buckets": 32})
        is None
    )


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
    assert (
        chat.encode(tokenizer, turns, False) == chat.encode(before, turns, False)
        and tokenizer.get_vocab() == before.get_vocab()
    )
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
    assert chat.render(load({"tool_use": "no", "default": template}), turns, True).startswith(
        "<|im_start|>user\nhi"
    )
    with pytest.raises(
        UserError,
        match=(
            "policy has the chat templates tool_use, rag and none is the default: give one with "
            "--chat_template"
        ),
    ):
        chat.render(load({"tool_use": "no", "rag": "no"}), turns, True)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the tokenizer of .*policy has no chat template"):
        chat.render(models.load_tokenizer(str(path)), turns, True)


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
        (
            lambda f: (adapter(f), (f / "config.json").unlink()),
            r"is an adapter \(LoRA\), no model: merge it into owner/base first",
        ),
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
        (
            lambda f: (f / "model.safetensors").write_text(NOTE),
            "model.safetensors is a note of git-lfs .*git lfs pull",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text(NOTE),
            "tokenizer.json is a note of git-lfs .*git lfs pull",
        ),
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
