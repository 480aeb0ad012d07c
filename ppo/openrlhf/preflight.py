"""What would end an OpenRLHF run after minutes, or never, looked at first: each a line with what to do."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from common import chat
from common.cli import UserError
from common.devices import gpu_memory, visible_gpus
from common.models import read_json
from dpo_iteration.memory import GIB
from ppo.openrlhf.arguments import Arguments
from ppo.openrlhf.command import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-ppo.txt"
NEWER_TOO = ("vllm", "flash-attn")  # OpenRLHF asks for these at least; of the others for one version
PARTS = (
    ("user", "A question, with 3 numbers?"),
    ("assistant", "An answer."),
    ("user", "Another one."),
    ("assistant", "Yes: so it is.\n\n- done"),
)


@functools.cache
def pins() -> dict[str, str]:
    """Package → version, of requirements-ppo.txt."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_versions():
    """Refuse other versions than those that the flags were written for; see NEWER_TOO."""

    def parts(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:3] if part.isdigit()]

    for package, pin in pins().items():
        found = installed(package)
        if found is None:
            how = "source envs.sh; make_envs ppo_train; use_env ppo_train"
            if package == "flash-attn":
                how = f"pip install flash-attn=={pin} --no-build-isolation"
            raise UserError(f"{package} is not installed in {sys.executable}: {how}")
        found = found.split("+")[0]
        if found != pin and not (package in NEWER_TOO and parts(found) > parts(pin)):
            raise UserError(
                f"{package} {found} is installed, {pin} is needed (ppo/requirements-ppo.txt): pip install "
                f"{package}=={pin}"
            )


def cluster_gpus(address: str) -> list[int]:
    """GPUs of each node of a running Ray cluster, asked in a process of its own."""
    code = (
        "import json, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        "print(json.dumps([int(n['Resources'].get('GPU', 0)) for n in ray.nodes() if n['Alive']]))"
    )
    asked = [sys.executable, "-c", code, address]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]
        raise UserError(
            f"ray_address {address}: no Ray cluster answers there ({reason}); start one (`ray start --head`) "
            "or leave ray_address out"
        ) from None


def count_gpus(args: Arguments) -> tuple[int, int, float | None]:
    """(GPUs, GPUs of a node, bytes of the smallest or None) that this run may take.

    Raises:
        UserError: more than there are, or nodes that are not alike.
    """
    size = args.gpu_memory_gib * GIB if args.gpu_memory_gib else None
    if args.dry_run and args.num_gpus and size and not visible_gpus():  # a plan for another machine
        return args.num_gpus, args.gpus_per_node or min(args.num_gpus, 8), size
    if args.ray_address:
        if args.num_gpus and args.gpus_per_node:
            return args.num_gpus, args.gpus_per_node, size
        nodes = [count for count in cluster_gpus(args.ray_address) if count]
        if not nodes:
            raise UserError(f"ray_address {args.ray_address}: its nodes have no GPU")
        if len(set(nodes)) > 1 and not args.gpus_per_node:
            raise UserError(
                f"the cluster's nodes have {', '.join(map(str, nodes))} GPUs, OpenRLHF wants nodes alike: "
                "give num_gpus and gpus_per_node"
            )
        there, a_node, where = sum(nodes), min(nodes), f"of the Ray cluster {args.ray_address}"
    else:
        there = a_node = len(visible_gpus())
        size, where = size or (gpu_memory() or 0) * GIB or None, "visible"
        if not there:
            raise UserError(
                "no GPU is visible: OpenRLHF needs one; without, take the small backend (ppo/train_ppo.py, "
                "backend: small). With dry_run, num_gpus and gpu_memory_gib it plans for GPUs that are "
                "elsewhere"
            )
    wanted = args.num_gpus or there
    if wanted > there:
        raise UserError(f"num_gpus {wanted}, but {there} GPUs are {where}; set num_gpus {there}")
    return wanted, args.gpus_per_node or a_node, size


def check_cores(args: Arguments, gpus: int):
    """Refuse fewer cores than Ray places a run on: one for each GPU, one for the trainer, one for Ray itself.
    It would wait for ever.
    """
    cores = len(os.sched_getaffinity(0))
    if not args.ray_address and cores < gpus + 2:
        raise UserError(
            f"OpenRLHF on {gpus} GPUs needs {gpus + 2} CPU cores and this process may use {cores}: ask for "
            "more (Slurm: --cpus-per-task), or set num_gpus to fewer"
        )


def check_ray(args: Arguments) -> list[str]:
    """Refuse a Ray cluster that the environment names and the settings do not: OpenRLHF would join it,
    whoever's it is.

    Returns:
        notes, of a cluster that a file of `ray start` names: it may be long dead.
    """
    address = os.environ.get("RAY_ADDRESS")
    if args.ray_address:
        return []
    if address:
        raise UserError(
            f"RAY_ADDRESS is {address}: OpenRLHF would join that cluster; set ray_address {address} to "
            "use it, or unset RAY_ADDRESS"
        )
    found = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if not found.exists():
        return []
    return [f"{found} names a Ray cluster, which OpenRLHF would join: `ray stop` ends it if nobody needs it"]


def machine_memory(args: Arguments) -> float | None:
    """Bytes of a node's main memory; None where it is another machine's and not given."""
    if args.machine_memory_gib:
        return args.machine_memory_gib * GIB
    here = visible_gpus() and not args.ray_address
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if here else None


def check_address(url: str):
    """Refuse an address of a reward server that nobody listens at, or that is none."""
    parts = urlparse(url)
    if not parts.hostname or "," in url:
        raise UserError(f"reward_url {url}: http://HOST:PORT/get_reward was expected")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"reward_url {url}: nobody answers ({error}); start it there: python -m openrlhf.cli.serve_rm … "
            "or python ppo/openrlhf/serve_reward.py --host ADDRESS …"
        ) from None


def has_value_head(name: str, head: str) -> bool | None:
    """Whether a local reward model has the weights of its head; None for one that is not at hand."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return f"{head}.weight" in read_json(index)["weight_map"]
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if f"{head}.weight" in json.loads(file.read(size)):
                return True
    return False


def differs(policy: "PreTrainedTokenizerBase", reward: "PreTrainedTokenizerBase") -> str | None:
    """Why a reward model cannot read the policy's token ids as they are, in words; None where it can.

    OpenRLHF's own reward model gets the policy's ids, in the policy's template. Both must be what
    get_rewards.py would have made with the reward model's tokenizer and template.

    Args:
        policy, reward: loaded tokenizers.
    """
    mine, other = policy.get_vocab(), reward.get_vocab()
    apart = [token for token, i in mine.items() if other.get(token) != i and i != policy.pad_token_id]
    if apart:
        return (
            f"{len(apart)} tokens of the policy have another id or none in the reward model's vocabulary "
            f"(such as {sorted(apart)[0]!r})"
        )
    turns = [{"role": role, "content": content} for role, content in PARTS]
    for count in (2, 4):
        given, text = chat.encode(policy, turns[:count], False), chat.render(reward, turns[:count], False)
        if given != reward(text, add_special_tokens=False)["input_ids"]:
            return "the chat templates of policy and reward model write the same turns differently"
        if given != chat.encode_for_classifier(reward, text):
            return (
                "the reward model reads other special tokens in front or behind than the policy's "
                "template writes (BOS, CLS, EOS, SEP)"
            )
    if len(chat.turn_suffix(policy)) != 1:
        return (
            "the template writes more behind a turn than the token that ends it, and the reward model "
            "reads its reward there"
        )
    return None


def notes_on_machine(placement: Placement) -> list[str]:
    """What may stop a run here that cannot be known for certain."""
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        scope = 0
    if not placement.colocate or not scope:
        return []
    return [
        f"kernel.yama.ptrace_scope is {scope}: if the first hand-over of weights to vLLM ends in "
        "`pidfd_getfd`, set it to 0 (OpenRLHF issue 1349)"
    ]
