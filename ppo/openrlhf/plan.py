"""What a run will do: on which GPUs, who gives the rewards, and where all goes. Nothing is written.

Looked at here is what would end an OpenRLHF run only after minutes, or never.
"""

import dataclasses
import os
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse

from common.chat import ChatTemplate, TemplateArguments, encode_for_classifier
from common.cli import UserError, one_line
from common.devices import gpu_memory, gpu_name, prepare_threads, visible_gpus
from common.models import check_model, check_policy, load_tokenizer, local_config
from dpo_iteration import memory
from dpo_iteration.memory import GIB
from ppo.openrlhf.arguments import Arguments
from ppo.openrlhf.command import Placement
from ppo.openrlhf.placement import Machine, place, waits_for_rewards

OPENRLHF = "0.11.2"  # whose flags and checkpoints are known here
TURNS = (
    {"role": "user", "content": "A question, with 3 numbers?"},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "Another one."},
    {"role": "assistant", "content": "Yes: so it is.\n\n- done"},
)


@dataclasses.dataclass
class Plan:
    """A run worked out.

    `kind` of reward: local (OpenRLHF's own model), server (ours), or url. `critic`: where the value model
    starts, None: at the policy. `template`: of the policy, None where a dry run cannot reach it.
    """

    placement: Placement
    kind: str
    critic: str | None
    notes: list[str]
    template: ChatTemplate | None


def plan(args: Arguments) -> Plan:
    """Look at GPUs, models and reward, and decide where all goes.

    Raises:
        UserError: what cannot work, with what would.
    """
    check_policy(args.model_name_or_path, "model_name_or_path")
    for name in args.reward_name_or_path or []:
        check_model(name, "reward_name_or_path")
    notes = [] if args.dry_run else check_installed()
    machine = machine_of(args)
    if not args.dry_run:
        check_surroundings(args, machine)
    prepare_threads()
    template, kind, same = with_templates(args, notes)
    shapes = shapes_of(args, kind)
    served = shapes.pop("server")
    shared = 2 * served + 2 * GIB if served else 0
    placement, note = place(args, machine, shapes, shared)
    if served:
        notes.append("our reward server shares one of the GPUs that train")
        notes += waits_for_rewards(args, placement, shapes["actor"], served, gpu_name())
    critic = args.critic_name_or_path or (args.reward_name_or_path[0] if same else None)
    critic = None if critic == args.model_name_or_path else critic
    return Plan(placement, kind, critic, [*notes, note], template)


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_installed() -> list[str]:
    """Refuse an environment without OpenRLHF, or without flash-attn, which it imports whatever the attention;
    returns a note on another version.
    """
    for package in ("openrlhf", "flash-attn"):
        if installed(package) is None:
            raise UserError(
                f"{package} is not installed in {sys.executable}: source envs.sh; make_envs ppo_train; "
                "use_env ppo_train"
            )
    found = installed("openrlhf")
    return [] if found == OPENRLHF else [f"warning: openrlhf {found} is installed, this is for {OPENRLHF}"]


def machine_of(args: Arguments) -> Machine:
    """The GPUs that this run may take.

    Raises:
        UserError: more than there are, or nodes that are not alike.
    """
    gpu, node = (gib and gib * GIB for gib in (args.gpu_memory_gib, args.machine_memory_gib))
    if args.dry_run and args.num_gpus and gpu and not visible_gpus():  # a plan for another machine
        return Machine(args.num_gpus, args.gpus_per_node or min(args.num_gpus, 8), gpu, node)
    if visible_gpus() and not (args.ray_address and gpu):  # a cluster's: this machine is one of its alike
        gpu = gpu or (gpu_memory() or 0) * GIB or None
        node = node or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    given = args.num_gpus and args.gpus_per_node
    if args.ray_address and given and (args.dry_run or args.other_cluster):  # nothing is left to ask it
        return Machine(args.num_gpus, args.gpus_per_node, gpu, node)
    if args.ray_address:
        address = cluster_address(args)
        nodes, where = cluster_gpus(address), f"of the Ray cluster {address}"
        if len(set(nodes)) > 1 and not args.gpus_per_node:
            raise UserError(
                f"the cluster's nodes have {', '.join(map(str, nodes))} GPUs, OpenRLHF wants nodes alike: "
                "give num_gpus and gpus_per_node"
            )
    else:
        nodes, where = [len(visible_gpus())], "visible"
    if not sum(nodes):
        raise UserError(
            f"no GPUs are {where}: OpenRLHF needs one; without, take the small backend (ppo/train_ppo.py, "
            "backend: small). With dry_run, num_gpus and gpu_memory_gib it plans for GPUs that are elsewhere"
        )
    wanted = args.num_gpus or sum(nodes)
    if wanted > sum(nodes):
        raise UserError(f"num_gpus {wanted}, but {sum(nodes)} GPUs are {where}; set num_gpus {sum(nodes)}")
    return Machine(wanted, args.gpus_per_node or min(nodes), gpu, node)


def cluster_address(args: Arguments) -> str:
    """HOST:PORT of the Ray cluster.

    Raises:
        UserError: it is to be one for this training, and none was started.
    """
    if not args.own_cluster:
        return args.ray_address
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    raise UserError(
        "ray_address own: start this by ppo/openrlhf/ray_cluster.py on each machine, as sbatch "
        "configs/ppo.slurm does, or leave ray_address out"
    )


def cluster_gpus(address: str) -> list[int]:
    """GPUs of each node of a running Ray cluster that has some."""
    try:
        import ray

        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        found = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        ray.shutdown()
    except Exception as error:
        raise UserError(
            f"ray_address {address}: no Ray cluster answers there ({one_line(error)}); start one (`ray start "
            "--head`), or give num_gpus and gpus_per_node too, or leave ray_address "
            "out"
        ) from None
    return [count for count in found if count]


def check_surroundings(args: Arguments, machine: Machine):
    """Refuse too few cores, somebody's Ray cluster, and a reward server that nobody listens at.

    Ray waits for ever for a core for each GPU, one for the trainer, and one for itself. OpenRLHF would join
    the cluster that RAY_ADDRESS or Ray's own note names, whoever's it is.
    """
    cores, address = len(os.sched_getaffinity(0)), os.environ.get("RAY_ADDRESS")
    if not args.ray_address and cores < machine.gpus + 2:
        raise UserError(
            f"OpenRLHF on {machine.gpus} GPUs needs {machine.gpus + 2} CPU cores and this process may use "
            f"{cores}: ask for more (Slurm: --cpus-per-task), or set num_gpus to fewer"
        )
    if not args.ray_address and address:
        raise UserError(
            f"RAY_ADDRESS is {address}: OpenRLHF would join that cluster; set ray_address {address} to "
            "use it, or unset RAY_ADDRESS"
        )
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    left = Path(folder, "ray", "ray_current_cluster")  # by `ray start`; ray.init looks there, too
    if not args.ray_address and left.is_file() and (found := left.read_text(encoding="utf-8").strip()):
        raise UserError(
            f"{left} names a Ray cluster at {found}: OpenRLHF would join it; set ray_address {found} to use "
            "it. Otherwise end it (ray stop), delete that file where the cluster is gone, or give this run "
            "a RAY_TMPDIR of its own"
        )
    for url in args.reward_url or []:
        parts = urlparse(url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=10).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"reward_url {url}: nobody answers ({error}); start it there: python -m "
                "openrlhf.cli.serve_rm … or python ppo/openrlhf/serve_reward.py --host ADDRESS …"
            ) from None


def with_templates(args: Arguments, notes: list[str]) -> tuple[ChatTemplate | None, str, bool]:
    """(the policy's template, kind of reward, whether the reward model reads its tokens). A dry run does
    without those of hub models.
    """
    names = args.reward_name_or_path or []
    try:
        tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        template = ChatTemplate(tokenizer, args)
        template.need()
        return template, *choose_reward(args, why_not_local(args, template) if names else None, notes)
    except UserError:
        if not args.dry_run or all(Path(name).is_dir() for name in [args.model_name_or_path, *names]):
            raise
    notes.append(
        "tokenizers on the hub are not at hand: that policy and reward model share tokens and template is "
        "assumed"
    )
    return None, *choose_reward(args, None, notes)


def why_not_local(args: Arguments, policy: ChatTemplate) -> str | None:
    """Why OpenRLHF cannot hold the first reward model itself, in words; None where it can.

    It is given the policy's token ids, in the policy's template, and reads the reward at the last one. Both
    must be what get_rewards.py would have made with the reward model's tokenizer and template.
    """
    name = args.reward_name_or_path[0]
    reward = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    scored = ChatTemplate(reward, TemplateArguments(chat_template=args.reward_chat_template, date=args.date))
    mine, other = policy.tokenizer.get_vocab(), reward.get_vocab()
    apart = sorted(
        token for token, i in mine.items() if other.get(token) != i and i != policy.tokenizer.pad_token_id
    )
    if apart:
        return (
            f"{len(apart)} tokens of the policy have another id or none in its vocabulary (such as "
            f"{apart[0]!r})"
        )
    for turns in (list(TURNS[:2]), list(TURNS)):
        wanted = encode_for_classifier(reward, scored.render(turns, False))
        if policy.encode(turns, False) != wanted:
            return "of the same turns it reads other tokens than the policy's template writes"
    if len(policy.turn_suffix()) != 1:
        return "the policy's template writes more behind a turn than the token that ends it"
    kinds = (local_config(name) or {}).get("architectures")
    if kinds and "SequenceClassification" not in str(kinds):
        return "it is no classifier with one label"
    head = args.extra_flags.get("ds.value_head_prefix", "score")
    if Path(name).is_dir() and f"{head}.weight" not in weight_names(name):
        return f"it has no weights {head}.weight (ds.value_head_prefix)"
    return None


def weight_names(folder: str) -> set[str]:
    """Names of the weights in a model's folder."""
    from safetensors import safe_open

    found = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= set(stored.keys())
    return found


def choose_reward(args: Arguments, why: str | None, notes: list[str]) -> tuple[str, bool]:
    """(kind of reward, whether the first reward model reads the policy's tokens).

    Args:
        why: OpenRLHF cannot hold the reward model itself; None: it can, or there is none.

    Raises:
        UserError: OpenRLHF's own was asked for and cannot read the policy's tokens.
    """
    names = args.reward_name_or_path or []
    same = bool(names) and why is None
    if args.reward_url:
        return "url", same
    if len(names) != 1 or args.reward_function or args.reward_weights or args.reward_backend == "server":
        return "server", same
    if why is None:
        return "local", True
    if args.reward_backend == "local" or args.other_cluster:
        raise UserError(
            f"OpenRLHF's own reward model cannot be {names[0]}: {why}; take reward_backend server (on a Ray "
            "cluster start ppo/openrlhf/serve_reward.py --host … by hand and give reward_url)"
        )
    notes.append(f"the reward model runs in our server: {why}")
    return "server", False


def shapes_of(args: Arguments, kind: str) -> dict:
    """Role → Shape (or None) of the models that OpenRLHF holds; `server`: parameters of all models in our
    reward server.

    Raises:
        UserError: the policy's size is not known.
    """

    def shape(name: str, billions: float | None) -> memory.Shape | None:
        if Path(name).is_dir():
            return memory.shape_of(name, trust_remote_code=args.trust_remote_code)
        return memory.shape_like(billions) if billions else None

    policy = shape(args.model_name_or_path, args.model_size_b)
    if policy is None:
        raise UserError(
            f"model_name_or_path {args.model_name_or_path}: its size is not known here; set model_size_b"
        )
    rewards, size = args.reward_name_or_path or [], args.reward_size_b or args.model_size_b
    models = [shape(name, size) for name in rewards]
    start = args.critic_name_or_path or (rewards or [args.model_name_or_path])[0]
    value = policy if start == args.model_name_or_path else shape(start, size)
    return {
        "actor": policy,
        "ref": policy if args.kl_coef else None,
        "critic": (value or policy) if "critic" in args.learners else None,
        "reward": models[0] if kind == "local" else None,
        "server": sum(model.parameters for model in models if model) if kind == "server" else 0,
    }


def describe(args: Arguments, found: Plan) -> Iterator[str]:
    """What was decided, for a reader: lines."""
    p = found.placement
    reward = {"local": "OpenRLHF's own reward model", "server": "our reward server"}
    reward["url"] = ", ".join(args.reward_url or [])
    where = "all roles on all of them"
    if not p.colocate:
        where = f"{p.gpus} for the policy, {p.gpus} for value and reward model"
    rows = f"packed to {p.max_tokens_per_gpu} tokens" if p.max_tokens_per_gpu else "padded rows"
    yield (
        f"{p.all_gpus} GPUs on {'one node' if p.nodes == 1 else f'{p.nodes} nodes'}, {where}; {p.engines} "
        f"engines × {p.tensor_parallel} GPUs, ZeRO-{p.zero_stage}, {rows}; reward: {reward[found.kind]}"
    )
    yield from found.notes
