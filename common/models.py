"""What a model's folder or hub name stands for: refused where it is no whole model; its config, tokenizer and
weights, loaded alike by every stage; its positions.
"""

import functools
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Names of the length in configs, as vLLM 0.32 reads them (model_arch_config_convertor.py); the smallest
# counts.
LENGTHS = (
    "max_position_embeddings n_positions max_seq_len seq_length model_max_length max_target_positions "
    "max_sequence_length max_seq_length seq_len"
).split()
# With these kinds of rotary encoding a config says the length as it is after stretching.
STRETCHED = {"su", "longrope", "llama3", "yarn", "telechat3-yarn", "deepseek_yarn", "deepseek_llama_scaling"}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Small enough to be read before the weights, and large enough for git-lfs.
READ_FIRST = ("config.json", "tokenizer.json", "tokenizer.model", *INDEXES)
TEKKEN = "tekken.json"  # of mistral-common, which environment vllm has and rlhflow has not
# Of a module, or numbers that a module hands to its attention.
DROPOUTS = ("p", "attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "attn_dropout")


def check_model(name: str, what: str = "--model_name_or_path") -> None:
    """Refuse a local model folder that does not exist or is no complete model, before anything heavy is
    imported.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            _refuse_adapter(path, f"{what} {name}")
        if not (path / "config.json").is_file():
            raise UserError(f"{what} {name} is a folder without config.json, so it is no model folder")
        _check_weights(path, f"{what} {name}")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise UserError(f"{what} {name}: no such folder, and not a hub name of the form owner/model")
    elif path.parent.is_dir():
        near = ", ".join(sorted(f.name for f in path.parent.iterdir() if f.is_dir())[:5])
        raise UserError(
            f"{what} {name}: no such folder in {path.parent}/" + (f"; there is {near}" if near else "")
        )


def check_policy(name: str, what: str = "--model_name_or_path") -> None:
    """Refuse as `check_model` does, and a local model whose config says that it writes no text: a reward
    model, an encoder.
    """
    check_model(name, what)
    path = Path(name) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{what} {name} is an encoder-decoder ({config.get('model_type')}), which neither vLLM nor "
            "training can run here: give a causal language model"
        )
    kinds = [str(kind) for kind in config.get("architectures") or []]
    # LlamaForSequenceClassification, LlamaForRewardModelWithGating, BertForMaskedLM; MistralModel, which has
    # no head. Code that comes with a model (auto_map) may call its classes what it likes.
    silent = [
        k
        for k in kinds
        if re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]", k) or re.search(r"(?<!LMHead)Model$", k)
    ]
    if kinds and silent == kinds and "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        raise UserError(
            f"{what} {name} is a {silent[0]}, which writes no text: give a causal language model (a reward "
            "model goes to reward_name_or_path)"
        )


def _refuse_adapter(path, named):
    """An adapter's folder is called that.

    With a whole model beside it, transformers would load the adapter and vLLM the model.
    """
    if any(path.glob("model*.safetensors")):
        raise UserError(
            f"{named} holds a whole model and an adapter, and it is not known which is meant: move its "
            "adapter_* files elsewhere"
        )
    base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
    merged = path.absolute().parent  # training here keeps the adapter in OUTPUT_DIR/adapter
    if path.name == "adapter" and (merged / "config.json").is_file():
        raise UserError(f"{named} is an adapter (LoRA), no model: give {merged}, into which it is merged")
    raise UserError(
        f"{named} is an adapter (LoRA), no model: merge it into {base} first (peft: "
        "PeftModel.from_pretrained(base, adapter)"
        ".merge_and_unload(), then save_pretrained of it and of the tokenizer), and give that folder"
    )


def _check_weights(path, named):
    """Refuse a model's folder whose weights are missing or were not fetched, as its files show."""
    for name in READ_FIRST:
        if (path / name).is_file():
            _refuse_note(path / name, named)
    whole = path / "model.safetensors"
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    if whole.is_file():
        files = [whole]
    elif index:
        shards = sorted(set((read_json(index).get("weight_map") or {}).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise UserError(
                f"{named} lacks {len(missing)} of the {len(shards)} files of its weights, {missing[0]} for "
                "one: fetch or save it again"
            )
        files = [path / shard for shard in shards]
    else:
        files = [*path.glob("*.safetensors"), *path.glob("pytorch_model.bin")]
    for states, kind, command in (
        ("global_step*", "DeepSpeed", f"python {path / 'zero_to_fp32.py'} {path} {path}"),
        ("pytorch_model_fsdp_0", "FSDP", f"accelerate merge-weights {path / 'pytorch_model_fsdp_0'} {path}"),
    ):
        if not files and any(path.glob(states)):
            how = f"make some of its {kind} states: {command}"
            raise UserError(f"{named} is a checkpoint without whole weights; {how}")
    for file in files:
        _refuse_note(file, named)
        if file.suffix == ".safetensors" and _is_cut(file):
            raise UserError(f"{named}: {file.name} is damaged or was cut off: fetch or save it again")


def _refuse_note(file, named):
    """Refuse what git-lfs left in place of a file that it was to fetch."""
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(
            f"{named}: {file.name} is a note of git-lfs in place of the file: run `git lfs pull` in that "
            "folder"
        )


def _is_cut(file):
    """Whether a .safetensors file ends before the last tensor of its header, or has no header."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        there = file.stat().st_size - 8 - size
        if there < 0:
            return True
        try:
            header = json.loads(opened.read(size))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            return there < max(ends, default=0)
        except (ValueError, AttributeError, LookupError, TypeError):
            return True


def read_json(path: Path) -> dict:
    """The mapping in a JSON file of a model folder; anything else is an error."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: a JSON object was expected; fetch or save the model again")
    return values


def local_config(name: str) -> dict | None:
    """config.json of a local model folder, else None."""
    path = Path(name) / "config.json"
    return read_json(path) if path.is_file() else None


def has_template(name: str) -> bool:
    """Whether a local model folder carries a chat template."""
    folder = Path(name)
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def check_tokenizer_files(name: str) -> None:
    """Refuse a local folder whose only tokenizer is a tekken.json."""
    folder = Path(name)
    if (
        (folder / TEKKEN).is_file()
        and not (folder / "tokenizer.json").is_file()
        and not list(folder.glob("tokenizer.model*"))
    ):
        refuse_tekken(name)


def refuse_tekken(name: str):
    raise UserError(
        f"{name} has no tokenizer but {TEKKEN}, which the training environment cannot read: put the "
        "tokenizer.json and "
        "tokenizer_config.json beside it, from a release of the model for transformers"
    )


def load_tokenizer(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model.

    Args:
        name: folder or hub name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: it does not load.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(name)
    try:
        # transformers would take tekken.json before tokenizer.json where mistral-common is installed, as it
        # is beside vLLM alone: another tokenizer, without a template.
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, mistral_format=False
        )
    except Exception as error:  # hub, file and remote code fail in many ways
        raise UserError(f"cannot load the tokenizer of {name}: {one_line(error)}") from None
    if Path(str(getattr(tokenizer, "vocab_file", None))).name == TEKKEN:
        refuse_tekken(name)
    tokenizer.name_or_path = tokenizer.name_or_path or str(name)  # errors name it
    return tokenizer


@functools.cache
def quiet_libraries():
    """Keep off the terminal what libraries say that means nothing to a user, or that we say ourselves."""
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")  # looked for wherever bitsandbytes is
    kernels.addFilter(
        lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
    )
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what it reports of loading is looked at by who loads
    transformers_logging.disable_progress_bar()  # of weights that are read and written
    if sys.stderr.isatty():
        enable_progress_bars()  # of downloads


def load_config(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    what: str = "model",
    **more: object,
) -> "PretrainedConfig":
    """transformers' config of a model, which errors call `what`; `more` changes settings in it."""
    quiet_libraries()
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **more
        )
    except Exception as error:  # hub, file and remote code fail in many ways
        raise UserError(f"cannot load the {what} {name}: {one_line(error)}") from None


def without_weights(config: "PretrainedConfig", trust_remote_code: bool = False) -> "PreTrainedModel":
    """The causal language model of a config on a device without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def choose_attention(config: "PretrainedConfig", auto_class: type, flash: bool) -> str | None:
    """How transformers is to compute a model's attention; None: its own choice.

    Eager where sdpa would leave something out: it drops the soft-cap of Gemma-2's scores without a word.

    Args:
        config: transformers' config of the model.
        auto_class: class of transformers that builds the model.
        flash: whether flash_attention_2 may be taken: there is a GPU, and it computes in half precision.
    """
    import transformers

    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    model_class = getattr(auto_class, "_model_mapping", {}).get(type(config), None) or auto_class
    flash = flash and transformers.utils.is_flash_attn_2_available()
    return "flash_attention_2" if flash and getattr(model_class, "_supports_flash_attn", False) else None


def load_weights(auto_class: type, name: str, what: str = "model", **options: object) -> tuple:
    """(model, what transformers says of its loading: `missing_keys`, `unexpected_keys`, …).

    Args:
        auto_class: class of transformers whose `from_pretrained` builds the model.
        what: what errors call it.
        options: of `from_pretrained`.

    Raises:
        UserError: it does not load, or does not fit into memory.
    """
    import torch

    try:
        return auto_class.from_pretrained(name, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        dtype = str(options.get("dtype")).removeprefix("torch.")
        raise UserError(
            f"{name} in {dtype} does not fit the GPU's memory: free it, or use a smaller model"
        ) from None
    except Exception as error:
        raise UserError(f"cannot load the {what} {name}: {one_line(error)}") from None


def without_dropout(model: "torch.nn.Module"):
    """Switch dropout off, be it a module or a number of a module."""
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _text_settings(config):
    """A function that gives a setting of the text model by its name, None where it is not set."""
    if isinstance(config, dict):
        return (config.get("text_config") or config).get
    text = config.get_text_config()
    return lambda key: getattr(text, key, None)


def _encodings(get):
    """(kind, settings) of the rotary encodings of a model: one for all layers, or one for each kind of
    layer.
    """
    rope = get("rope_parameters") or get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    layers = [settings for settings in rope.values() if isinstance(settings, dict)] or [rope]
    return [(str(settings.get("rope_type") or settings.get("type")), settings) for settings in layers]


def stretch(config: "PretrainedConfig | dict") -> float:
    """By how much a model's positions are stretched beyond the length that its config says; see
    `positions`.
    """
    get, factor = _text_settings(config), 1
    if "gemma3" in (get("model_type") or ""):  # it says its length after stretching
        return 1
    for kind, settings in _encodings(get):
        if kind not in STRETCHED:
            factor = settings.get("factor", factor)
    return factor or 1


def positions(config: "PretrainedConfig | dict") -> int | None:
    """Tokens of prompt and response that a model can take, counted as vLLM 0.32 counts them; None where its
    config does not say.

    A model with the rotary encodings `linear` and `dynamic` has `factor` times the positions that its config
    says.

    Args:
        config: transformers' config, or the mapping in a config.json.
    """
    get = _text_settings(config)
    if get("relative_attention_num_buckets") and not get("max_position_embeddings"):
        return None  # T5's kind, which the engine does not know: its n_positions limits nothing
    said = [get(key) for key in LENGTHS if get(key) is not None]
    said = get("model_max_length") or min(said, default=None)  # Cohere's word goes before the others
    return int(said * stretch(config)) if said else None


def check_embeddings(name: str, highest: int, embeddings: int):
    """Refuse a model that has no embedding for the token id `highest`, the largest that it would be given."""
    if highest >= embeddings:
        raise UserError(
            f"the tokenizer gives token id {highest} and {name} has {embeddings} embeddings: no match"
        )


def encoding_of_length(config: "PretrainedConfig | dict") -> Callable[[int], list] | None:
    """A function of a sequence's length that tells apart what transformers encodes apart; None where the
    length does not matter.

    `dynamic` and `longrope` choose their frequencies by the longest sequence of a pass. Sequences that are to
    get what each would get alone share a pass only where this function says the same of them.
    """
    get, limits = _text_settings(config), []
    for kind, settings in _encodings(get):
        if "dynamic" in kind:
            limits.append((get("max_position_embeddings"), max))
        elif kind in ("longrope", "su"):
            name = "original_max_position_embeddings"
            limits.append((settings.get(name) or get(name), int.__gt__))
    return (lambda length: [compare(length, limit) for limit, compare in limits]) if limits else None
