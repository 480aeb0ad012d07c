"""API servers of a run with `generation_backend: servers`: how they are started and stopped, what the client
is told of them, and what is refused.
"""

import json
from typing import TYPE_CHECKING

from common.cli import UserError, build, nearest
from generation import gen_hf
from loop.settings import CLIENT, LoopSettings, gpu_groups, positions

if TYPE_CHECKING:
    from loop.plan import Plan

KNOWN = (*CLIENT, "hosts", "ports", "start", "stop")
ENGINE = (  # arguments of get_hf2.py that are settings of register_server.sh too
    *("dtype", "kv_cache_gib", "gpu_memory_utilization", "max_num_seqs"),
    *("tensor_parallel_size", "revision"),
)
SERVED = (*ENGINE, "engine_args", "trust_remote_code")  # all that servers are started with, but lengths


def listed(value: object) -> list:
    """A key that takes one or several, as the list that the scripts make of it."""
    return value if isinstance(value, list) else [] if value is None else [value]


def ports(settings: LoopSettings) -> list[int]:
    """One for each server: server_port on each machine that is named, else one for each group of GPUs."""
    given, first = settings.servers, settings.server_port
    hosts = listed(given.get("hosts"))
    if given.get("ports") or hosts:
        return listed(given.get("ports")) or [first] * len(hosts)
    return [first + k for k in range(len(gpu_groups(settings)))]


def server_commands(plan: "Plan") -> dict[str, list]:
    """Commands that start and stop the servers of a policy, and what the client is told of them."""
    settings, given = plan.settings, plan.settings.servers
    hosts = listed(given.get("hosts"))
    asked = ["--ports", *ports(settings), *(["--hosts", *hosts] if hosts else [])]
    for key in CLIENT:
        asked += [f"--{key}", given[key]] if key in given else []
    if given.get("start"):  # of servers on other machines: a command that gets the model as its last word
        start = ["bash", "-c", f'{given["start"]} "$@"', "start"]
        stop = ["bash", "-c", given.get("stop") or ":"]
    else:
        script, folder = "generation/register_server.sh", str(plan.folder.path / "servers")
        variables = server_variables(plan) | {"state_dir": folder, "log_dir": f"{folder}/logs"}
        start = ["env", *(f"{key}={value}" for key, value in variables.items()), "bash", script]
        stop = ["bash", script, "stop", folder]
    return {"start_servers": start, "stop_servers": stop, "ask_servers": asked}


def server_variables(plan: "Plan") -> dict:
    """Settings of register_server.sh, so that servers answer as the engine of get_hf2.py would."""
    jobs = plan.jobs()
    args = jobs[0]
    limit = positions(args.model_name_or_path)  # of the start: later policies have the same
    needed = max(job.max_input_length + job.max_new_tokens for job in jobs)
    found = {
        "port": plan.settings.server_port,
        "servers": len(gpu_groups(plan.settings)),
        "max_model_len": min(needed, limit or needed),
    }
    found |= {name: getattr(args, name) for name in ENGINE if getattr(args, name) is not None}
    found |= {"engine_args": json.dumps(args.engine_args)} if args.engine_args else {}
    return found | ({"trust_remote_code": "yes"} if args.trust_remote_code else {})


def check_servers(plan: "Plan"):
    """Refuse settings of servers and client that cannot work."""
    given = plan.settings.servers
    for key in given:
        if key not in KNOWN:
            there = ", ".join(KNOWN)
            raise UserError(f"unknown key {key!r} in servers{nearest(key, KNOWN)}; there are {there}")
    for key in ("start", "stop"):
        if given.get(key) is not None and not isinstance(given[key], str):
            raise UserError(f"servers.{key} must be a command, as one text")
    if given.get("start") and not given.get("stop"):
        raise UserError("servers.start needs servers.stop, the command that ends what it started")
    if given.get("hosts") and not given.get("start"):
        raise UserError(
            "servers.hosts are other machines: servers.start must be the command that starts a model there "
            "(it gets the model as its last word, and returns when they answer), servers.stop the one that "
            "ends them"
        )
    if given.get("ports") and not given.get("start"):
        raise UserError(
            "servers.ports are of servers that servers.start starts; a loop's own begin at server_port"
        )
    client = {key: value for key, value in given.items() if key not in ("start", "stop")}
    client |= {"tokenizer": "-", "ports": ports(plan.settings)}
    try:
        gen_hf.check(build(gen_hf.Arguments, client, "servers"))
    except UserError as error:
        raise UserError(f"servers: {str(error).removeprefix('servers: ').replace('--', '')}") from None
    first, count = plan.settings.server_port, len(gpu_groups(plan.settings))
    if not 1 <= first <= 65536 - count:
        raise UserError(f"server_port {first}: {count} ports from there on must lie from 1 to 65535")
