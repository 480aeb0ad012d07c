"""What a model's folder or hub name stands for: its tokenizer, the same one in every environment, and its
positions.
"""

from pathlib import Path

from common import chat
from common.cli import UserError

# How vLLM is started, so that it reads the same files as transformers: Mistral's folders hold config, weights
# and tokenizer twice.
ENGINE_FORMATS = {"tokenizer_mode": "hf", "config_format": "hf", "load_format": "hf"}
# Names of the length in configs, as vLLM 0.32 reads them (model_arch_config_convertor.py); the smallest
# counts.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# With these kinds of rotary encoding a config says the length as it is after stretching.
STRETCHED = {"su", "longrope", "llama3", "yarn", "telechat3-yarn", "deepseek_yarn", "deepseek_llama_scaling"}
TEKKEN = "tekken.json"  # of mistral-common, which environment vllm has and rlhflow has not


def check_tokenizer_files(name):
    """Refuse a local folder whose only tokenizer is a tekken.json."""
    folder = Path(name)
    if (
        (folder / TEKKEN).is_file()
        and not (folder / "tokenizer.json").is_file()
        and not list(folder.glob("tokenizer.model*"))
    ):
        refuse_tekken(name)


def refuse_tekken(name):
    raise UserError(
        f"{name} has no tokenizer but {TEKKEN}, which the training environment cannot read: put the "
        "tokenizer.json and "
        "tokenizer_config.json beside it, from a release of the model for transformers"
    )


def load_tokenizer(name, revision=None, trust_remote_code=False, chat_template=None):
    """The tokenizer of a model, with the chat template of the file `chat_template` where one is given.

    Args:
        name: folder or hub name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model.
        chat_template: jinja file in place of the tokenizer's own template.

    Raises:
        UserError: it does not load, or `chat_template` is no file.
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
        raise UserError(
            f"cannot load the tokenizer of {name}: {' '.join(str(error).split())[:300]}"
        ) from None
    if Path(str(getattr(tokenizer, "vocab_file", None))).name == TEKKEN:
        refuse_tekken(name)
    tokenizer.name_or_path = tokenizer.name_or_path or str(name)  # errors name it
    chat.use_template(tokenizer, chat_template)
    return tokenizer


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


def stretch(config):
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


def positions(config):
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


def encoding_of_length(config):
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
            limits.append(
                (
                    settings.get("original_max_position_embeddings")
                    or get("original_max_position_embeddings"),
                    int.__gt__,
                )
            )
    return (lambda length: [compare(length, limit) for limit, compare in limits]) if limits else None
