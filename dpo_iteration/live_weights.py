"""The policy's weights on their way to servers that sample while it trains, and the proof that they arrived.

Weights of version k (the policy after k rounds) are written beside, renamed, and read by the servers in
place. A probe follows: a server's log-probabilities of a few fixed sequences against the trainer's own for
the same weights. What differs by more than rounding never samples: it is sent once more, then the run stops.
A reload can fail without an error: vLLM keeps what a folder does not hold, such as an earlier version's head.

Servers that share GPUs with the trainer sleep while it is at work, and wake to take weights.
"""

import contextlib
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file

from common.cli import UserError
from common.manifest import write_json
from common.shared_prompts import is_rotary, own_attention
from common.training import is_main, say
from dpo_iteration import adapters
from dpo_iteration.arguments import Arguments
from dpo_iteration.online_arguments import MEMORY, memory_folder
from dpo_iteration.packing import PaddedCollator, score
from dpo_iteration.rounding import ROUNDING, furthest, of_responses
from generation import live_servers
from generation.dispatch import Server

if TYPE_CHECKING:
    from dpo_iteration.dpo import IterativeDPOTrainer

COPIES = 2.2  # of the weights, for which it must have room: the old ones go when the new ones are served
Values = list[list[float]]  # for each sequence the log-probability of every token but the first


def weights_folder(rounds: str | Path, model: torch.nn.Module) -> Path:
    """`memory_folder` where it has room for the weights of `model`, else a folder beside the rounds."""
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    folder = memory_folder(rounds)
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free + there >= COPIES * size:
        return folder
    say(
        f"note: weights go through {rounds}/weights, {MEMORY} has no room for {COPIES} × "
        f"{size / 2**30:.1f} GiB"
    )
    return Path(rounds) / "weights"


def write_weights(trainer: "IterativeDPOTrainer", args: Arguments, folder: Path):
    """Write the policy's weights as they are now to `folder`: beside, then renamed. All ranks call it.

    With LoRA the merged weights are written. A tied head, which a saved model leaves out, is written too: an
    engine on a CPU has packed its own copy of it, and would keep that (vLLM 0.32).
    """
    beside = folder.with_name(f"{folder.name}.tmp")
    if is_main():
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        beside.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    if args.use_peft:
        adapters.save(trainer, args, beside)
    else:
        trainer.save_model(str(beside), _internal_call=True)
    if is_main():
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_copies(beside, getattr(model, "all_tied_weights_keys", {}))
        beside.rename(folder)
    trainer.accelerator.wait_for_everyone()


def write_copies(folder: Path, tied: dict[str, str]):
    """Add weights to a saved model that it has once under another name. `tied`: {name: that other name}."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    copies = {}
    for name, source in tied.items():
        if name not in files and source in files:
            with safe_open(files[source], "pt") as file:
                copies[name] = file.get_tensor(source)
    if not copies:
        return
    added, index = folder / "model-tied.safetensors", folder / "model.safetensors.index.json"
    save_file(copies, added, {"format": "pt"})
    if index.exists():
        told = json.loads(index.read_text(encoding="utf-8"))
        told["weight_map"] |= dict.fromkeys(copies, added.name)
        write_json(index, told)


@torch.no_grad()
def own_log_probs(trainer: "IterativeDPOTrainer", sequences: list[list[int]]) -> tuple[list, list]:
    """The trainer's log-probabilities of sequences under the weights that it has now. All ranks call it.

    Returns:
        ([tokens - 1] of each sequence, what rounding changes in them: the same with all positions moved on by
        one, less the first; empty where positions are not rotary).
    """
    model, training = trainer.model_wrapped, trainer.model_wrapped.training
    device, pads = trainer.args.device, PaddedCollator(trainer.processing_class.pad_token_id or 0)
    base = trainer.accelerator.unwrap_model(trainer.model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    found, moved = [], []
    model.eval()
    padded = own_attention(base) if trainer.sharing else contextlib.nullcontext()
    with padded, trainer.compute_loss_context_manager():
        for ids in sequences:
            row = {"prompt_ids": ids[:1], "chosen_ids": ids[1:], "rejected_ids": ids[1:]}
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in pads([row]).items()}
            found.append(of_responses(batch, score(model, batch))[0])
            if is_rotary(base):
                later = torch.arange(1, len(ids) + 1, device=device).expand_as(batch["input_ids"])
                again = of_responses(batch, score(model, batch | {"position_ids": later}))[0]
                moved.append(again - found[-1])
    model.train(training)
    return found, moved


def apart(now: Values, then: Values) -> float:
    """The largest distance of two log-probabilities of the same token."""
    return max(abs(a - b) for a, b in zip(sum(now, []), sum(then, []), strict=True))


def since_first_attempt(
    own_before: list[torch.Tensor], served_before: dict[str, Values], own: list, served: dict[str, Values]
) -> str:
    """How far each side's log-probabilities of the same weights moved from the first attempt to the second:
    which side was wrong.
    """
    told = [
        f"the trainer's moved by {apart([a.tolist() for a in own], [b.tolist() for b in own_before]):.2g}"
    ]
    told += [f"those of {url} by {apart(now, served_before[url]):.2g}" for url, now in served.items()]
    return f"log-probabilities of a second attempt: {', '.join(told)}"


class LiveWeights:
    """What the servers hold. All ranks call the methods; rank 0 alone talks to the servers.

    Args:
        trainer: whose policy is sent. args: of the training.
        servers: on this machine. folder: where weights go.
        half: whether trainer or servers compute in half precision.
        shared: whether the servers are on the GPUs that train, and asleep until they are sent weights.

    Attributes:
        version: rounds that the weights have learned from which the servers hold; None before the first.
        figures: {server: (largest distance a token of its log-probabilities, what rounding explains)}.
    """

    def __init__(
        self,
        trainer: "IterativeDPOTrainer",
        args: Arguments,
        servers: list[Server],
        folder: Path,
        half: bool,
        shared: bool = False,
    ):
        self.trainer, self.args, self.servers, self.folder, self.half = trainer, args, servers, folder, half
        self.shared = shared
        self.version, self.sequences, self.figures = None, [], {}
        self.own, self.served = [], {}  # log-probabilities of `sequences`: the trainer's, and the servers'

    def send(self, version: int, sequences: list[list[int]]):
        """Let the servers have the policy's weights as they are now, and prove by `sequences` that they do.

        Raises:
            UserError: a server does not hold them after two attempts; names it, and how far it is off.
        """
        folder, first = self.folder / f"version_{version:06}", None
        write_weights(self.trainer, self.args, folder)
        for attempt in (1, 2):
            own, moved = own_log_probs(self.trainer, sequences)  # anew: either side may have been wrong
            known = sequences == self.sequences and any(not a.equal(b) for a, b in zip(own, self.own))
            before = self.served if known else {}
            self.make_room()
            served = self.on_main(lambda: self.reload(folder, sequences))
            wrong = self.compare(served, own, moved, before)
            if first:
                say(f"note: {since_first_attempt(*first, own, served)}")
            if not wrong:
                break
            first = own, served
            say(f"note: {wrong}; {'sent once more' if attempt == 1 else 'given up'}")
            self.sleep()
        if wrong:
            raise UserError(
                f"{wrong}, also after a second attempt: nothing is trained on its answers. Start the servers "
                "again and the same command"
            )
        self.version, self.sequences, self.own, self.served = version, sequences, own, served
        if is_main():
            for old in self.folder.iterdir():
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    def reload(self, folder: Path, sequences: list[list[int]]) -> dict[str, Values]:
        if self.shared:
            live_servers.wake(self.servers, live_servers.WEIGHTS)
        live_servers.reload_weights(self.servers, folder)
        if self.shared:
            live_servers.wake(self.servers, live_servers.CACHE)
        return live_servers.log_probs(self.servers, sequences)

    def compare(self, served: dict[str, Values], own: list, moved: list, before: dict[str, Values]) -> str:
        """What is wrong with a server's log-probabilities, in words; empty where they are the trainer's."""
        for url, values in served.items():
            off = [torch.tensor(a, device=b.device) - b for a, b in zip(values, own, strict=True)]
            distance, limit = furthest(off, moved, self.half, self.trainer.args.device)
            self.figures[url] = (distance, limit)
            if not distance <= limit:
                return (
                    f"{url} does not hold the weights that were sent: its log-probabilities differ by "
                    f"{distance:.2g} a token from the trainer's ({limit:.2g} is rounding)"
                )
            if before.get(url) == values:
                return f"{url} still holds the weights that it had before, digit by digit"
        return ""

    def still_held(self) -> str:
        """Whether the servers still hold what was sent last: empty, or in words which one does not (it was
        started again meanwhile).
        """
        found = live_servers.log_probs(self.servers, self.sequences)
        for url, values in found.items():
            worst = apart(values, self.served[url])
            if not worst <= ROUNDING[self.half]:
                return f"{url} lost its weights while it sampled (log-probabilities moved by {worst:.2g})"
        return ""

    def sleep(self):
        """Have servers that share GPUs give back their memory, before the trainer takes it."""
        if self.shared:
            self.on_main(lambda: live_servers.sleep(self.servers))

    def make_room(self):
        """Give back what the trainer has of shared GPUs and does not use, before the servers wake."""
        if self.shared:
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without a GPU
            self.trainer.accelerator.wait_for_everyone()

    def check_there(self):
        """Refuse to go on without one of the servers."""
        self.on_main(lambda: live_servers.check_there(self.servers))

    def on_main(self, action: Callable) -> Any:
        """What `action()` returns on rank 0, on all ranks; its UserError too."""
        told = [None]
        if is_main():
            try:
                told = [(action(), "")]
            except UserError as error:
                told = [(None, str(error))]
        broadcast_object_list(told, 0)
        value, error = told[0]
        if error:
            raise UserError(error)
        return value

    def remove(self):
        """Delete the weights that were sent; the servers hold them in their own memory."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
