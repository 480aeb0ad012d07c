"""The settings of an online run, resolved: what run_online.sh needs of them, and RUN/loop.yaml.

    python loop/online_plan.py values CONFIG [--key value …]   KEY<TAB>VALUE lines for the driver
    python loop/online_plan.py check  CONFIG [--key value …]   check all that can be known; writes nothing
    python loop/online_plan.py write  CONFIG [--key value …]   the same, then RUN/loop.yaml, which the
                                                               commands of a run read

Policy 0 is the start, policy I what is trained in I × `evaluate_every` rounds. All but the training is as in
loop/plan.py, so that a loop, an online run and PPO can be compared. The section `online` of RUN/loop.yaml has
the complete arguments of dpo_iteration/run_online.py.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common.cli import UserError, arg, build, count, run, shaping_defaults
from common.devices import gpu_memory
from dpo_iteration import arguments as dpo
from dpo_iteration import fitting, memory, online_arguments
from dpo_iteration.online_arguments import OWN, memory_folder
from generation import gen_hf
from loop import changes, estimates, machines
from loop import check as checks
from loop.plan import Plan, one_per_gpu
from loop.plan import main as plan_main
from loop.prompt_sets import check_prompts
from loop.servers import SERVED, server_variables
from loop.settings import (
    DPOSettings,
    LoopSettings,
    complete,
    gpu_groups,
    gpus_of_an_engine,
    keys_of_section,
)

# Of a GPU's memory, for a server beside the weights and states that the trainer keeps there; TRL's trainers
# have the same. Assumed, not measured here.
SHARED_UTILIZATION = 0.3
STAGES = ("train", "evaluate")  # of a policy; the start is evaluated only
DECIDED = (  # keys of run_online.py that the run decides
    *("model_name_or_path", "reward_name_or_path", "dataset_name_or_path", "output_dir", "rounds_dir"),
    *("generation", "annotation", "training_args", "until_round", "seed", "share_gpus"),
    *("heldout_prompts", "heldout"),
    *gen_hf.ClientArguments.__dataclass_fields__,
)


def visible(gpus: list[str]) -> list[str]:
    """What starts a command that sees these GPUs alone."""
    return ["env", f"CUDA_VISIBLE_DEVICES={','.join(gpus)}"]


@dataclasses.dataclass(kw_only=True)
class OnlineSettings(DPOSettings):
    prompts: list[str] = arg(help="prompt sets; rounds take from all of them, over and over")
    online: dict = arg({}, "arguments of dpo_iteration/run_online.py; --online.staleness 1")
    evaluate_every: int = arg(50, "rounds between policies that are measured and kept")
    sampling_gpus: int | None = arg(
        None, "GPUs for the servers, the others train; None: half of those there are"
    )
    share_gpus: bool | None = arg(
        None,
        "all GPUs sample and train, in turns, with servers that sleep meanwhile; None: on one GPU alone",
    )

    sections = DPOSettings.sections | {"online": online_arguments.Arguments}
    elsewhere = dict.fromkeys(
        LoopSettings.__dataclass_fields__.keys() - DPOSettings.__dataclass_fields__.keys(), "bash run_loop.sh"
    ) | dict.fromkeys(("backend", "ppo", "openrlhf"), "bash run_ppo.sh")

    @property
    def iterations(self) -> int:
        """Policies that are trained."""
        rounds = self.online.get("rounds", online_arguments.Arguments.rounds)
        return -(-int(rounds) // max(1, self.evaluate_every))


class OnlinePlan(Plan):
    """One online run: its resolved settings and what each script is told."""

    Settings = OnlineSettings
    default = "configs/online_llama3_8b.yaml"
    example = "bash run_online.sh configs/online_tiny.yaml"
    counted = False
    plain = tuple(k for k in Plan.plain if k in OnlineSettings.__dataclass_fields__ or k == "iterations")

    def all_stages(self) -> list[str]:
        later = [f"{i}.{name}" for i in range(1, self.settings.iterations + 1) for name in STAGES]
        return ["0.evaluate", *later]

    def expected(self) -> str:
        return f"POLICY.STAGE was expected, with STAGE train or evaluate, up to {self.all_stages()[-1]}"

    # ---- GPUs and servers ---------------------------------------------------------------------------------

    def sampling_groups(self) -> list[str]:
        """CUDA_VISIBLE_DEVICES of each server; one empty string per server on the CPU."""
        groups, gpus = gpu_groups(self.settings), machines.gpus_of(self.settings)
        if not gpus or self.shares_gpus():
            return groups
        size = gpus_of_an_engine(self.settings)
        asked = self.settings.sampling_gpus or len(gpus) // 2 // size * size
        return groups[: asked // size]

    def shares_gpus(self) -> bool:
        """Whether servers and trainer take turns on the same GPUs."""
        given = self.settings.share_gpus
        return len(machines.gpus_of(self.settings)) == 1 if given is None else given

    def training_gpus(self) -> list[str]:
        if self.shares_gpus():
            return machines.gpus_of(self.settings)
        used = {gpu for group in self.sampling_groups() for gpu in group.split(",")}
        return [gpu for gpu in machines.gpus_of(self.settings) if gpu not in used]

    def training_processes(self) -> int:
        return len(self.training_gpus()) or self.settings.num_processes or 1

    def ports(self) -> list[int]:
        return [self.settings.server_port + k for k in range(len(self.sampling_groups()))]

    def server_lists(self) -> dict[str, list]:
        """Commands that start and stop the servers, and what run_online.py is told of them.

        What stops them also deletes the weights in memory, which nobody else needs: it runs whatever happens.
        """
        script, folder, groups = "generation/register_server.sh", self.folder.path / "servers", self.ports()
        variables = server_variables(self) | {"state_dir": folder, "log_dir": folder / "logs"}
        variables |= {"servers": len(groups), "VLLM_SERVER_DEV_MODE": 1}
        gpus = ",".join(filter(None, self.sampling_groups()))
        variables |= {"gpus": gpus} if gpus else {}
        if gpus and self.shares_gpus():  # without a GPU a server takes the calls, and refuses this
            more = self.generation()["engine_args"] or {}
            variables["engine_args"] = json.dumps(more | {"enable_sleep_mode": True})
        start = ["env", *(f"{key}={value}" for key, value in variables.items()), "bash", script]
        end = f'bash {script} stop "$0" && rm -rf -- "$1"'
        stop = ["bash", "-c", end, folder, memory_folder(self.folder.online)]
        asked = ["--ports", *groups]
        for key, value in self.settings.servers.items():
            asked += [f"--{key}", value]
        asked += ["--share_gpus", "true"] if self.shares_gpus() else []
        if self.settings.heldout_prompts is not None and self.servers_stay():
            asked += ["--heldout", f"{self.folder.settings}:heldout"]
            asked += ["--heldout_prompts", self.settings.heldout_prompts]
        return {"start_servers": start, "stop_servers": stop, "ask_servers": asked}

    def servers_stay(self) -> bool:
        """Whether servers live as long as the run and answer the held-out prompts, if there are any: not
        where `heldout` wants another engine than `generation`.
        """
        ours, theirs = self.generation(), self.heldout()
        return self.settings.heldout_prompts is None or all(ours[key] == theirs[key] for key in SERVED)

    def each_gpu(self) -> list:
        """As a loop's, but only on the GPUs that train where servers live on the others."""
        gpus = self.training_gpus()
        if not gpus or self.shares_gpus() or not self.servers_stay():
            return super().each_gpu()
        return [*visible(gpus), *one_per_gpu(len(gpus), ["--num_machines", 1])]

    # ---- What the scripts are told ------------------------------------------------------------------------

    def generation(self) -> dict:
        """Complete arguments of get_hf2.py but for what the run decides; on shared GPUs with less of their
        memory, unless they say how much.
        """
        found = super().generation()
        shared = self.shares_gpus() and machines.gpus_of(self.settings)
        if shared and "gpu_memory_utilization" not in self.settings.generation:
            found["gpu_memory_utilization"] = SHARED_UTILIZATION
        return found

    def online(self) -> dict:
        """Complete arguments of run_online.py but for what the run decides."""
        return complete(online_arguments.Arguments, self.settings.online, DECIDED, "online")

    def until(self, i: int) -> int:
        """Rounds that policy i has learned from."""
        return min(i * self.settings.evaluate_every, int(self.online()["rounds"]))

    def training(self) -> dict:
        return {key: value for key, value in super().training().items() if key not in OWN}

    def training_of(self, i: int) -> dict:
        online = self.online()
        own = {"train_dir": [str(self.folder.online)], "eval_fraction": 0.0}
        own["save_steps"] = online["save_every"] * online["sync_every"]
        return super().training_of(i) | own

    def arguments(self) -> online_arguments.Arguments:
        """The arguments of run_online.py as it will read them, checked by their numbers.

        Raises:
            UserError: what cannot work.
        """
        given = dict.fromkeys(("generation", "annotation", "training_args", "output_dir", "rounds_dir"), "-")
        given |= {"model_name_or_path": self.settings.model_name_or_path, "share_gpus": self.shares_gpus()}
        given |= {"dataset_name_or_path": self.settings.prompts}
        args = build(online_arguments.Arguments, self.online() | given, "online")
        with keys_of_section("online", online_arguments.Arguments):
            online_arguments.check(args)
        return args

    def trained(self) -> dict:
        return super().trained() | {"online": self.online()}

    def shaping_training(self, section: str) -> dict:
        return shaping_defaults(online_arguments.Arguments if section == "online" else dpo.Arguments)

    def values(self, stages: list[str]) -> list[tuple[str, object]]:
        gpus = self.training_gpus()
        lists = self.server_lists() | {"prompt_sets": self.settings.prompts}
        lists["trainer_env"] = visible(gpus) if gpus else []
        return [
            *super().values(stages),
            ("training_processes", self.training_processes()),
            ("servers_stay", self.servers_stay()),
            *((f"until.{i}", self.until(i)) for i in range(1, self.settings.iterations + 1)),
            *((f"{key}[]", value) for key, values in lists.items() for value in values),
        ]

    def refuse_early(self):
        settings, gpus = self.settings, machines.gpus_of(self.settings)
        if settings.evaluate_every < 1:
            raise UserError(f"evaluate_every {settings.evaluate_every} must be at least 1")
        if settings.generation_backend != "engine":
            raise UserError("generation_backend: an online run evaluates by the engine; leave it out")
        if machines.machine_count(settings) > 1 or machines.on_ray(settings):
            raise UserError("an online run is for one machine: several are not built yet")
        if len(gpus) == 1 and not self.shares_gpus():
            raise UserError("share_gpus false: of one GPU there is nothing to share out; leave it out")
        if self.shares_gpus() and settings.sampling_gpus:
            raise UserError(
                f"sampling_gpus {settings.sampling_gpus}: all GPUs sample where they are shared; leave it out"
            )
        for key in ("hosts", "ports", "start", "stop"):
            if key in settings.servers:
                raise UserError(f"servers.{key}: an online run starts its own servers, on this machine")
        size = gpus_of_an_engine(settings)
        if gpus and (settings.sampling_gpus or size) % size:
            raise UserError(
                f"sampling_gpus {settings.sampling_gpus} do not divide by tensor_parallel_size {size}"
            )
        if gpus and (not self.training_gpus() or not self.sampling_groups()):
            raise UserError(
                f"sampling_gpus {settings.sampling_gpus} of {len(gpus)} GPUs, tensor_parallel_size {size}: "
                "some must sample and some must train"
            )

    def check(self, left: bool):
        check(self, left)


def check(plan: OnlinePlan, left: bool):
    """Print findings about an online run and refuse what cannot work.

    Args:
        left: whether anything is left to do.

    Raises:
        UserError: all problems, a line each.
    """
    settings, found = plan.settings, checks.Findings()
    checks.check_models(plan, found)
    if found.attempt(plan.models):
        found.attempt(online_arguments.check_responses, plan.generation_job())
    for key in settings.training_args:
        if key in OWN:
            found.problems.append(f"training_args.{key}: an online run decides it; give {OWN[key]}")
    for key in settings.online:
        if key in DECIDED:
            found.problems.append(f"online.{key} is what the run itself decides: leave it out")
    online = found.attempt(plan.arguments) if not found.problems else None
    method = found.attempt(memory.method_of, settings.accelerate_config)
    args = checks.check_training(plan, method, found) if not found.problems else None
    if args:
        found.attempt(online_arguments.check_training, args)
    if not found.problems:
        found.notes.extend(found.attempt(changes.refuse, plan, plan.resolved()) or [])
    sets = check_prompts(plan, found)
    gpus, size = checks.check_gpus(plan, found)
    if online and args and not found.problems:
        describe(plan, online, args, sets, size, found)
        if gpus and size:
            estimates.check_memory_online(plan, size, method, args, found)
            asked = online.rounds, online.prompts_per_round, online.staleness
            found.notes.append(estimates.hours_online(plan, size, *asked, args.loss_type))
    summary = f"{count(len(plan.ports()), 'server')}, {count(plan.training_processes(), 'training process')}"
    checks.conclude(plan, left, found, f"{summary}, {'GPUs' if gpus else 'CPU'}")


def describe(
    plan: OnlinePlan,
    online: online_arguments.Arguments,
    args: dpo.Arguments,
    sets: dict,
    size: float | None,
    found: checks.Findings,
):
    """Tell how often prompts are used, what shared GPUs and the disk must hold; `size`: parameters of the
    policy.
    """
    settings = plan.settings
    asked = online.rounds * online.prompts_per_round
    told = f"{count(online.rounds, 'round')} of {online.prompts_per_round} prompts"
    if None not in sets.values():
        there = sum(len(sets[name]) for name in settings.prompts)
        if there < online.prompts_per_round:
            found.problems.append(f"{told}: the prompt sets hold {there}; lower online.prompts_per_round")
        told += f": each of {there} is used {asked / max(there, 1):.1f} times"
    if size and plan.shares_gpus() and machines.gpus_of(settings):
        check_shared_memory(plan, args, size, found)
    steps = online.rounds * online.sync_every
    found.notes.append(f"{told}; {steps} optimizer steps, new weights every {online.sync_every}")
    if size:
        kept = plan.kept_iterates() or settings.iterations
        room = kept * (2 if machines.gpus_of(settings) else 4) * size
        room += memory.checkpoint_bytes(args, estimates.trained_parameters(plan, size, args))
        what = f"{count(kept, 'trained model')} and {args.save_total_limit + 1} checkpoints"
        estimates.check_disk(plan, found, room / 2**30, what, "see keep_iterates and save_total_limit")


def check_shared_memory(plan: OnlinePlan, args: dpo.Arguments, size: float, found: checks.Findings):
    """Tell what a server takes of a GPU beside what the trainer keeps there, and refuse what cannot fit."""
    settings, section = plan.settings, plan.generation()
    there = settings.gpu_memory_gib or gpu_memory()
    shape = estimates.shape_of(settings.model_name_or_path, size)
    method, world = memory.method_of(settings.accelerate_config), plan.training_processes()
    need = memory.need(method, shape, world, 1, args.max_length, **fitting.adapted(args, shape))
    kept = (need.states + need.reference + estimates.reward_models(plan, size)) / memory.GIB
    found.notes.append(
        f"servers and trainer take turns: while a server samples, about {kept:.1f} GiB of its GPU stay the "
        "trainer's (weights, states, reward models, and a reference if the loss has one)"
    )
    if not there:
        return
    share, cache = section["gpu_memory_utilization"], section["kv_cache_gib"]
    weights = 2 * size / gpus_of_an_engine(settings) / memory.GIB
    taken, key = (weights + cache, "kv_cache_gib") if cache else (share * there, "gpu_memory_utilization")
    found.notes[-1] += f", and it may take {taken:.0f} of {there:.0f} GiB"
    if taken <= weights:
        found.problems.append(
            f"generation.gpu_memory_utilization {share:g} of {there:.0f} GiB does not hold the policy, "
            f"{weights:.0f} GiB: give more of it"
        )
    if kept + taken > there:
        found.problems.append(
            f"{kept:.0f} GiB of the trainer and {taken:.0f} of a server are more than a GPU's {there:.0f}: "
            f"train adapters (configs/training_lora.yaml) or a smaller policy, or give generation.{key} less"
        )


def main():
    plan_main(OnlinePlan, __doc__)


if __name__ == "__main__":
    run(main)
