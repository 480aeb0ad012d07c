"""What OpenRLHF's launches die of, looked at before anything is loaded: each a line with what to do."""

import argparse
import ast
import importlib.util
import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse

from common import chat
from common.cli import UserError, nearest, no_room
from common.devices import gpu_memory, visible_gpus
from common.models import read_json
from dpo_iteration.memory import GIB

# requirements-ppo.txt has the reasons.
PINS = {
    "openrlhf": "0.11.2",
    "vllm": "0.29.0",
    "ray": "2.55.0",
    "deepspeed": "0.19.6",
    "transformers": "5.15.0",
    "flash-attn": "2.8.3",
}
PARTS = (
    ("user", "A question, with 3 numbers?"),
    ("assistant", "An answer."),
    ("user", "Another one."),
    ("assistant", "Yes: so it is.\n\n- done"),
)


def installed(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_versions():
    """Refuse other versions than those the command was held against; vLLM and flash-attn may be newer."""
    for package, pin in PINS.items():
        found = installed(package)
        if found is None:
            how = (
                "pip install flash-attn==2.8.3 --no-build-isolation"
                if package == "flash-attn"
                else "source envs.sh; make_envs ppo_train; use_env ppo_train"
            )
            raise UserError(f"{package} is not installed in {sys.executable}: {how}")
        numbers = [
            [int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()]
            for version in (found, pin)
        ]
        newer = package in ("vllm", "flash-attn") and numbers[0] > numbers[1]
        if found.split("+")[0] != pin and not newer:
            raise UserError(
                f"{package} {found} is installed, {pin} is needed (ppo/requirements-ppo.txt): pip install "
                f"{package}=={pin}"
            )
    if installed("torch") is None:
        raise UserError("torch is not installed here: source envs.sh; make_envs ppo_train; use_env ppo_train")


def parser_of(source):
    """OpenRLHF's argument parser, built from the text of its command's module: the statements that make it,
    nothing that runs.

    The parser sits behind `if __name__ == "__main__":`, so it cannot be imported.
    """
    main = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    )
    end = next(
        i
        for i, node in enumerate(main.body)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "args"
    )
    from datetime import datetime

    names = {"argparse": argparse, "datetime": datetime, "os": os}
    exec(compile(ast.Module(main.body[:end], []), "train_ppo_ray.py", "exec"), names)
    return names["parser"]


def check_command(arguments):
    """Refuse a command that the installed OpenRLHF's parser does not take, whole option names compared."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "openrlhf is not installed here: source envs.sh; make_envs ppo_train; use_env ppo_train"
        )
    path = Path(list(spec.submodule_search_locations)[0]) / "cli" / "train_ppo_ray.py"
    try:
        parser = parser_of(path.read_text(encoding="utf-8"))
    except (OSError, StopIteration, KeyError):
        raise UserError(
            f"{path} holds no argument parser known here: openrlhf {PINS['openrlhf']} is needed"
        ) from None
    check_options(parser, arguments)


def check_options(parser, arguments):
    """`check_command` against a given parser.

    Returns:
        the parsed arguments.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    for word in arguments:
        if word.startswith("--") and word not in known:
            raise UserError(f"OpenRLHF has no flag {word}{nearest(word, known)}")

    def error(message):
        raise UserError(f"OpenRLHF's parser refuses the command: {message}")

    parser.error = error
    return parser.parse_args(arguments)


def cluster_gpus(address):
    """GPUs of each node of a running Ray cluster, asked in a process of its own."""
    code = (
        "import json, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        "print(json.dumps([int(n['Resources'].get('GPU', 0)) for n in ray.nodes() if n['Alive']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=120, check=False
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]
        raise UserError(
            f"ray_address {address}: no Ray cluster answers there ({reason}); start one (`ray start --head`) "
            "or leave ray_address out"
        ) from None


def count_gpus(args):
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
        there, a_node = sum(nodes), min(nodes)
        if len(set(nodes)) > 1 and not args.gpus_per_node:
            raise UserError(
                f"the cluster's nodes have {', '.join(map(str, nodes))} GPUs, OpenRLHF wants nodes alike: "
                "give num_gpus and gpus_per_node"
            )
        where = f"of the Ray cluster {args.ray_address}"
    else:
        there = a_node = len(visible_gpus())
        size = size or (gpu_memory() * GIB if gpu_memory() else None)
        where = "visible"
        if not there:
            raise UserError(
                "no GPU is visible: OpenRLHF needs one; without, take the small backend (ppo/train_ppo.py, "
                "backend: small). "
                "With dry_run, num_gpus and gpu_memory_gib it plans for GPUs that are elsewhere"
            )
    wanted = args.num_gpus or there
    if wanted > there:
        raise UserError(f"num_gpus {wanted}, but {there} GPUs are {where}; give --num_gpus {there}")
    return wanted, args.gpus_per_node or a_node, size


def check_cores(args, gpus):
    """Refuse fewer cores than Ray places a run on: one for each GPU and one for the trainer, or it waits for
    ever; one for Ray itself.
    """
    cores = len(os.sched_getaffinity(0))
    if not args.ray_address and cores < gpus + 2:
        raise UserError(
            f"OpenRLHF on {gpus} GPUs needs {gpus + 2} CPU cores and this process may use {cores}: ask for "
            "more (Slurm: --cpus-per-task), "
            "or give --num_gpus fewer"
        )


def check_ray(args):
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
            f"RAY_ADDRESS is {address}: OpenRLHF would join that cluster; give --ray_address {address} to "
            "use it, or unset RAY_ADDRESS"
        )
    found = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return (
        [
            f"{found} names a Ray cluster on this machine, which OpenRLHF would join: `ray stop` ends it if "
            "nobody needs it"
        ]
        if found.exists()
        else []
    )


def machine_memory(args):
    """Bytes of a node's main memory; None where it is another machine's and not given."""
    if args.machine_memory_gib:
        return args.machine_memory_gib * GIB
    here = visible_gpus() and not args.ray_address
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if here else None


def check_writable(folder):
    """Refuse a folder that cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {no_room(error) or error.strerror}; give another --output_dir"
        ) from None


def check_address(url):
    """Refuse an address of a reward server that nobody listens at, or that is none."""
    parts = urlparse(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "," in url:
        raise UserError(f"reward_url {url}: http://HOST:PORT/get_reward was expected")
    try:
        socket.create_connection(
            (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=10
        ).close()
    except (OSError, ValueError) as error:
        how = "start it there: python -m openrlhf.cli.serve_rm … or python ppo/openrlhf/serve_reward.py --host ADDRESS …"
        raise UserError(f"reward_url {url}: nobody answers ({error}); {how}") from None


def has_value_head(name, head):
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


def differs(policy, reward):
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


def notes_on_machine(placement):
    """What may stop a run here that cannot be known for certain."""
    notes = []
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        scope = 0
    if placement.colocate and scope > 0:
        notes.append(
            f"kernel.yama.ptrace_scope is {scope}: if the first hand-over of weights to vLLM ends in "
            "`pidfd_getfd`, set it to 0 (OpenRLHF issue 1349)"
        )
    return notes
