"""A last look at a saved model, before its manifest says complete: would the next iteration load it?

The files' headers go through transformers' own loader on a device without memory, so that names and shapes are compared as
a load would (experts that a file holds one by one, a head that shares the embedding), without a second model. Each weight
is read once, one at a time, for numbers that are not finite.
"""

import json
from pathlib import Path

from common import models
from common.cli import UserError


def check_saved(folder, trust_remote_code=False):
    """Refuse a folder that does not hold a whole model with finite weights, its tokenizer and chat template.

    Raises:
        UserError: what is wrong, by file or weight.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    folder = Path(folder)

    def load(what, function, *args, **kwargs):
        try:
            return function(*args, trust_remote_code=trust_remote_code, **kwargs)
        except Exception as error:
            raise UserError(f"the saved model {folder} has no {what} that loads: {' '.join(str(error).split())[:300]}") from None

    tokenizer = load("tokenizer", models.load_tokenizer, str(folder))
    if not tokenizer.chat_template:
        raise UserError(f"the saved model {folder} has no chat template")
    config = load("config", AutoConfig.from_pretrained, str(folder))
    weights, infinite = read_weights(folder)
    if infinite:
        raise UserError(f"the saved model {folder} holds numbers that are not finite in {some(infinite)}: lower --learning_rate")
    unset_hf_deepspeed_config()  # else ZeRO-3 would cut up this model too
    with torch.device("meta"):
        kind = type(load("architecture", AutoModelForCausalLM.from_config, config))
    try:
        _, found = kind.from_pretrained(
            None, config=config, state_dict=weights, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(f"the saved model {folder} does not load: {' '.join(str(error).split())[:300]}") from None
    wrong_shapes = [name for name, *_ in found["mismatched_keys"]]
    for names, how in ((found["missing_keys"], "lacks"), (found["unexpected_keys"], "has too many:"), (wrong_shapes, "has in another shape:")):
        if names:
            raise UserError(f"the saved model {folder} {how} {some(names)}")


def read_weights(folder):
    """(name → tensor without memory of each weight in the folder's safetensors, names of weights that are not all finite).

    Raises:
        UserError: no such file, one that is damaged, or files other than their index names.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    files, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if not files:
        raise UserError(f"the saved model {folder} has no *.safetensors")
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if named != {file.name for file in files}:
            raise UserError(f"the saved model {folder}: {index.name} and the files differ in {some(named ^ {file.name for file in files})}")
    weights, infinite = {}, []
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():
                    weight = stored.get_tensor(name)
                    if weight.is_floating_point() and not weight.isfinite().all():
                        infinite.append(name)
                    weights[name] = torch.empty_like(weight, device="meta")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
    return weights, infinite


def some(names):
    """The first three names, and how many there are more."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
