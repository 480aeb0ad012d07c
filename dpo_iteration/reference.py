"""Log-probabilities of the pairs under the reference: computed once, before the policy is loaded, and kept on
disk.

`add_reference` puts `ref_chosen_logps` and `ref_rejected_logps` into rows of token ids. What it computes lies
in the folder `cache`/KEY, where KEY is a hash of all that shapes a log-probability besides the tokens: every
byte of the reference's weights, dtype, attention, way of computing, device and library versions. In it,
`*.safetensors` files hold

    pairs  [n, 32] uint8: SHA-256 of a pair's token ids (so of truncation, tokenizer and template too)
    logps  [n, 2] float32: of chosen and rejected

and are written as the pass goes, so that a killed one continues, and other runs with the same pairs read
them.
"""

import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from trl.trainer.utils import add_fused_lm_head

from common.cli import UserError, one_line
from common.manifest import let_others_read, versions, writing
from common.progress import Progress, duration
from common.shared_prompts import Unsupported, only_wanted, prepare
from common.training import say
from dpo_iteration import models
from dpo_iteration.arguments import Arguments
from dpo_iteration.losses import needs_mismatched, needs_reference
from dpo_iteration.packing import (
    PaddedCollator,
    Rows,
    Steps,
    collate_packed,
    row_tokens,
    score,
)
from dpo_iteration.rounding import check_packing
from dpo_iteration.rows import with_mismatched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig

SAVE_EVERY = 2000  # pairs, about: what a killed pass does again at most
LIBRARIES = ("torch", "transformers", "trl")
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.py")  # of a model folder: what its forward pass depends on


def compute_reference(
    args: Arguments, config: "DPOConfig", rows: dict, sharing: bool, tokenizer: "PreTrainedTokenizerBase"
):
    """Put the reference's log-probabilities into the rows, from disk where they are known; says how many
    were. Where no loss looks at the reference they are 0, and nothing is loaded.
    """
    every = with_mismatched(rows["train"] + rows["eval"])
    if not needs_reference(args.loss_type):
        leave_out(every)
        say(f"no reference: the loss {' '.join(args.loss_type)} looks at none")
        return
    name, revision = models.reference_name(args)
    deepspeed, passes = config.deepspeed_plugin, passes_of(args, config, sharing, tokenizer)
    about = {
        "dtype": str(models.weights_dtype(args, config)),
        "load_in_4bit": args.load_in_4bit,
        "autocast": bool(passes.autocast),
        "ld_alpha": args.ld_alpha,
        "model_init_kwargs": {k: str(v) for k, v in (config.model_init_kwargs or {}).items()},
        "zero_stage": deepspeed.zero_stage if deepspeed else None,
        "fsdp": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
        "attention": "shared_prompts" if sharing else models.attention(name, args, revision),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    half = ", half of them with answers to another prompt," if needs_mismatched(args.loss_type) else ""
    started = time.time()
    found, key = add_reference(
        every,
        lambda: ready(models.load_model(name, args, config, revision), config, sharing),
        name,
        revision,
        reference_cache(args),
        about,
        passes,
    )
    say(
        f"reference: {found} of {len(every)} pairs{half} known from {reference_cache(args)}/{key}, "
        f"{duration(time.time() - started)}"
    )


def leave_out(rows: list[dict]):
    """Rows for losses that look at no reference."""
    for row in rows:
        row["ref_chosen_logps"] = row["ref_rejected_logps"] = 0.0


def reference_cache(args: Arguments) -> Path:
    return Path(args.reference_cache or Path(args.output_dir).parent / "reference_logps")


def pair_key(row: dict) -> bytes:
    """[32] uint8: a pair's token ids, hashed."""
    text = json.dumps([row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]])
    return hashlib.sha256(text.encode()).digest()


def model_folder(name: str, revision: str | None) -> Path:
    """A model's folder on disk: a local one, or the hub's snapshot, which has been loaded from."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WEIGHTS)))
    except Exception as error:
        raise UserError(f"cannot read the reference {name}: {one_line(error)}") from None


def weights_key(folder: Path) -> str:
    """SHA-256 of every byte of a model's weights, configuration and code, tokenizer files left out."""
    digest = hashlib.sha256()
    others = ("tokenizer", "special_tokens", "trainer_state", "generation_config")
    files = {f for pattern in WEIGHTS for f in folder.glob(pattern) if not f.name.startswith(others)}
    for file in sorted(files):
        with open(file, "rb") as stream:
            digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def checksum(pairs: torch.Tensor, logps: torch.Tensor) -> str:
    """SHA-256 of the two tensors of a file, which safetensors itself does not guard."""
    return hashlib.sha256(pairs.numpy().tobytes() + logps.numpy().tobytes()).hexdigest()


class Cache:
    """What is known of some pairs; rank 0 alone reads and writes it."""

    def __init__(self, folder, about):
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        self.folder, self.about = Path(folder) / key, about

    def read(self) -> dict:
        """{pair key: (chosen, rejected)}.

        A file that is damaged is left out: its pairs are computed again.
        """
        found = {}
        for path in self.folder.glob("*.tmp"):  # left by a write that was killed, or in work elsewhere
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    pairs, logps = file.get_tensor("pairs"), file.get_tensor("logps")
                    mark = (file.metadata() or {}).get("sha256")
                if mark != checksum(pairs, logps):
                    raise ValueError("its values are not those that were written")
                found |= dict(zip(map(bytes, pairs.numpy()), map(tuple, logps.tolist()), strict=True))
            except (SafetensorError, OSError, ValueError) as error:
                print(f"note: {path} is damaged and not used: {one_line(error, 200)}", flush=True)
        return found

    def write(self, known: dict):
        """Save {pair key: (chosen, rejected)} under a name of its own."""
        keys = sorted(known)
        pairs = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32)
        path = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.safetensors"
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several runs may share the folder
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            logps = torch.tensor([known[key] for key in keys], dtype=torch.float32)
            save_file(
                {"pairs": pairs, "logps": logps},
                temporary,
                {"about": json.dumps(self.about), "sha256": checksum(pairs, logps)},
            )
            let_others_read(temporary)
            os.replace(temporary, path)


@dataclass(frozen=True)
class Passes:
    """How pairs are laid into forward passes.

    row_tokens: of a packed row, in which chosen and rejected share their prompt; None: pairs are padded.
    at_once: pairs of a padded pass.
    pad_token_id: that pads them.
    autocast: dtype to compute in, or None.
    ld_alpha: as TRL's DPOConfig has it; padded only.
    """

    row_tokens: int | None
    at_once: int
    pad_token_id: int
    autocast: torch.dtype | None = None
    ld_alpha: float | None = None


def passes_of(
    args: Arguments, config: "DPOConfig", sharing: bool, tokenizer: "PreTrainedTokenizerBase"
) -> Passes:
    """How a training's reference is computed."""
    return Passes(
        row_tokens(args) if sharing else None,
        args.per_device_train_batch_size,
        tokenizer.pad_token_id or 0,
        torch.bfloat16 if args.bf16 and not config.deepspeed_plugin else None,
        args.ld_alpha,
    )


def add_reference(
    rows: list[dict],
    load: Callable[[], torch.nn.Module],
    name: str,
    revision: str | None,
    cache: Path,
    about: dict,
    passes: Passes,
) -> tuple[int, str]:
    """Put the reference's log-probabilities into `rows` (dicts of token ids), on all ranks.

    Args:
        load: function that loads the reference; called only where something is missing.
        name, revision: the reference, for the hash of its weights.
        cache: folder.
        about: what shapes the result besides the weights.
        passes: how it is computed.

    Returns:
        (number of pairs found on disk, the cache's key).
    """
    state = PartialState()
    main, about = state.is_main_process, dict(about)
    found, key = [None], [None]
    if main:
        about |= {"weights": weights_key(model_folder(name, revision))} | {
            k: v for k, v in versions().items() if k in LIBRARIES
        }
        store = Cache(cache, about)
        known = store.read()
        key = [store.folder.name]
        wanted = [pair_key(row) for row in rows]
        found = [[known.get(k, (float("nan"),) * 2) for k in wanted]]
    # Disks need not be shared between machines, so rank 0's word counts.
    broadcast_object_list(key, 0)
    logps = torch.tensor(found[0], dtype=torch.float32) if main else torch.empty(len(rows), 2)
    logps = broadcast(logps.to(state.device), 0)
    missing = (~logps.isfinite()).any(1).nonzero()[:, 0].tolist()
    if missing:
        progress = Progress(len(missing), "reference", "pairs", enabled=main)
        model, asked = load(), [rows[i] for i in missing]
        for done, values in compute(model, asked, passes, check=True):
            at = [missing[i] for i in done]
            logps[at] = values[done]
            if not bool(logps[at].isfinite().all()):
                raise UserError(
                    f"the reference {name} gives log-probabilities that are no numbers: is it damaged, or "
                    "trained in another dtype?"
                )
            if main:
                store.write({wanted[i]: tuple(logps[i].tolist()) for i in at})
            progress.update(len(done))
        progress.close()
        let_go(getattr(model, "module", model))
        del model
        collect()
    for row, (chosen, rejected) in zip(rows, logps.tolist(), strict=True):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen, rejected
    return len(rows) - len(missing), key[0]


def compute(
    model: torch.nn.Module, rows: list[dict], passes: Passes, check: bool
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices done since, [rows, 2] log-probabilities of chosen and rejected) now and then, on all
    ranks alike.

    Args:
        model: the reference as `ready` makes it.
        check: hold the first packed row against padded passes, see `check_packing`.
    """
    state, sharing = PartialState(), passes.row_tokens is not None
    costs = [len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    # As many pairs together as are saved together; `Steps` shares each such step out among the processes. All
    # steps have as many pairs, since a padded one has as many passes whatever it holds.
    together = math.ceil(len(rows) / math.ceil(len(rows) / SAVE_EVERY))
    steps = Steps(
        costs, together, passes.row_tokens, passes.at_once, state.num_processes, state.process_index
    )
    collate = collate_packed if sharing else PaddedCollator(passes.pad_token_id)
    data, batches = Rows(rows), iter(steps)
    base = getattr(model, "module", model)  # in DeepSpeed's engine

    def batch_of(keys: list) -> dict:
        return {
            k: v.to(state.device) if isinstance(v, torch.Tensor) else v
            for k, v in collate([data[key] for key in keys]).items()
        }

    def casting() -> AbstractContextManager:
        return torch.autocast(state.device.type, passes.autocast) if passes.autocast else nullcontext()

    if sharing and check:  # before the pass is paid for
        with casting():
            half = bool(passes.autocast) or base.dtype != torch.float32
            first = batch_of(next(iter(steps)))
            check_packing(model, base, first, passes.pad_token_id, half, "reference")
    for step in steps.steps(0):
        values = torch.zeros(len(rows), 2, device=state.device)
        for _ in range(steps.accumulation):
            keys = next(batches)
            batch = batch_of(keys)
            with torch.no_grad(), casting():
                try:
                    scored = score(model, batch, passes.ld_alpha)
                except Unsupported as error:
                    raise UserError(
                        f"prompts cannot be shared with the reference ({error}): give --share_prompts false"
                    ) from None
            for (i, scale), chosen, rejected in zip(keys, scored.chosen, scored.rejected, strict=True):
                if scale:  # a row without a pair holds another's
                    values[i, 0], values[i, 1] = chosen, rejected
        yield step, reduce(values, "sum")


def collect():
    """Give back what memory the models that are gone have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def let_go(model: torch.nn.Module):
    """Free the weights of a model that ZeRO-3 has partitioned, whoever still holds the model.

    DeepSpeed keeps every model that it has run, in a list of its module and in the cache of one of its
    methods.
    """
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            for tensor in (parameter.ds_tensor, parameter):
                tensor.data = tensor.data.new_empty(0)


def ready(model: torch.nn.Module, config: "DPOConfig", sharing: bool) -> torch.nn.Module:
    """A loaded reference on its device, with TRL's fused head, in evaluation; sharded where the policy will
    be.

    Args:
        config: TRL's DPOConfig.
    """
    model.eval().requires_grad_(False)
    add_fused_lm_head(model)
    if sharing:
        prepare(model)
        only_wanted(model.base_model)
    plugin = config.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        settings = {
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": model.dtype == torch.bfloat16},
        }
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        engine.eval()  # returns nothing
        return engine
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        dtypes = (config.fsdp_plugin_args or {}).get("mixed_precision_policy") or MixedPrecisionPolicy()
        for module in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]:
            fully_shard(module, mp_policy=dtypes)
        return fully_shard(model, mp_policy=dtypes)
    # 4 bits are loaded where they stay.
    return model if getattr(model, "hf_quantizer", None) else model.to(PartialState().device)
