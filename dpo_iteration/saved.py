"""A trained model's folder: what goes into it beside the weights, and a last look at it: would the next
iteration load it?

The files' headers go through transformers' own loader on a device without memory, so that names and shapes
are compared as a load would (experts that a file holds one by one, a head that shares the embedding), without
a second model. Each weight is read once, one at a time, for numbers that are not finite.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common import models
from common.chat import ChatTemplate
from common.cli import UserError, one_line
from common.manifest import let_others_read, write_json

if TYPE_CHECKING:
    import torch

# What a policy's folder holds beside weights, configs and tokenizer, and its next reader needs: the
# processors of images, audio and video, the tokenizer in Mistral's own format, and code of the model's own.
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tekken.json",
)


def companion(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """The local path of a file of a model's folder, or of a hub model (fetched); None where it has none."""
    from transformers.utils import cached_file

    missing = {
        f"_raise_exceptions_for_{what}": False
        for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    found = cached_file(str(source), name, revision=revision, **missing)
    return Path(found) if found else None


def copy_companions(source: str | Path, folder: str | Path, revision: str | None = None):
    """Copy into a trained model's folder what its policy's has for its readers and training left out.

    Args:
        source: folder or hub name of the policy.
    """
    local = Path(source)
    # A hub model's config names the hub as its code's place.
    code = sorted(local.glob("*.py")) if local.is_dir() else []
    for path in [*(companion(source, name, revision) for name in COMPANIONS), *code]:
        if path is not None and not (Path(folder) / path.name).exists():
            shutil.copyfile(path, Path(folder) / path.name)


def generation_config(
    source: str | Path, template: ChatTemplate, revision: str | None = None, stops: Iterable[int] = ()
) -> dict:
    """The policy's generation_config.json as a dict (the tokenizer's special tokens where it has none), with
    every token that ends a response.

    Other programs stop at what it names; without the template's end of turn they would go on into the next
    turn.

    Args:
        stops: token ids that ended responses beside those of generation config, tokenizer and template.
    """
    path = companion(source, "generation_config.json", revision)
    values = models.read_json(path) if path else {}
    before = values.get("eos_token_id")
    known = list(before) if isinstance(before, list) else [before] if before is not None else []
    values["eos_token_id"] = known + [
        token for token in template.stop_token_ids(known, stops) if token not in known
    ]
    if not isinstance(before, list) and len(values["eos_token_id"]) == 1:
        [values["eos_token_id"]] = values["eos_token_id"]
    for key in ("bos_token_id", "pad_token_id"):
        if getattr(template.tokenizer, key) is not None:
            values.setdefault(key, getattr(template.tokenizer, key))
    return values


def check_saved(folder: str | Path, trust_remote_code: bool = False):
    """Refuse a folder that does not hold a whole model with finite weights, its tokenizer and chat template.

    Raises:
        UserError: what is wrong, by file or weight.
    """
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    folder = Path(folder)
    for file in folder.rglob("*.safetensors"):
        let_others_read(file)

    def load(what: str, function: Callable, *args: object, **kwargs: object) -> object:
        try:
            return function(*args, trust_remote_code=trust_remote_code, **kwargs)
        except Exception as error:
            raise UserError(f"the saved model {folder} has no {what} that loads: {one_line(error)}") from None

    tokenizer = load("tokenizer", models.load_tokenizer, str(folder))
    if not tokenizer.chat_template:
        raise UserError(f"the saved model {folder} has no chat template")
    config = load("config", AutoConfig.from_pretrained, str(folder))
    weights, infinite = read_weights(folder)
    if infinite:
        raise UserError(
            f"the saved model {folder} holds numbers that are not finite in {some(infinite)}: lower "
            "--learning_rate"
        )
    unset_hf_deepspeed_config()  # else ZeRO-3 would cut up this model too
    kind = type(load("architecture", models.without_weights, config))
    try:
        _, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise UserError(f"the saved model {folder} does not load: {one_line(error)}") from None
    wrong_shapes = [name for name, *_ in found["mismatched_keys"]]
    for names, how in (
        (found["missing_keys"], "lacks"),
        (found["unexpected_keys"], "has too many:"),
        (wrong_shapes, "has in another shape:"),
    ):
        if names:
            raise UserError(f"the saved model {folder} {how} {some(names)}")


def store_once(folder: str | Path, trust_remote_code: bool = False):
    """Take second copies of tied weights out of a folder that another program saved: DeepSpeed hands them
    over as weights of their own.

    A live engine that has loaded such a copy keeps it when it is given weights without one.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder, index, places = Path(folder), Path(folder, "model.safetensors.index.json"), {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            places |= dict.fromkeys(stored.keys(), file)
    config = models.load_config(str(folder), trust_remote_code=trust_remote_code)
    tied = models.without_weights(config, trust_remote_code).all_tied_weights_keys

    def read(name: str) -> "torch.Tensor":
        with safe_open(places[name], "pt") as stored:
            return stored.get_tensor(name)

    def called(name: str) -> list[str]:
        """Names in the files: those of some architectures (Gemma 3) begin otherwise than the model's."""
        return [stored for stored in places if stored.split(".")[-2:] == name.split(".")[-2:]]

    for copied, source in (
        (copied, source)
        for target, origin in tied.items()
        for copied in called(target)
        for source in called(origin)
    ):
        if copied == source or not {copied, source} <= set(places) or not read(copied).equal(read(source)):
            continue  # a head of its own
        file, temporary = places.pop(copied), folder / ".once.tmp"
        weights = {name: weight for name, weight in load_file(file).items() if name != copied}
        if weights:
            save_file(weights, temporary, {"format": "pt"})
            os.replace(temporary, file)
        else:
            file.unlink()
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))
            listed["weight_map"].pop(copied, None)
            write_json(index, listed)


def read_weights(folder: Path) -> tuple[dict, list[str]]:
    """(name → tensor without memory of each weight in the folder's safetensors, names of weights that are not
    all finite).

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
            raise UserError(
                f"the saved model {folder}: {index.name} and the files differ in "
                f"{some(named ^ {file.name for file in files})}"
            )
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


def some(names: Iterable[str]) -> str:
    """The first three names, and how many there are more."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
