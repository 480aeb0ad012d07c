"""The settings of a PPO run, resolved: what run_ppo.sh needs of them, and RUN/loop.yaml.

    python ppo/run.py values CONFIG [--key value …]   KEY<TAB>VALUE lines for the driver
    python ppo/run.py check  CONFIG [--key value …]   check all that can be known now; writes nothing
    python ppo/run.py write  CONFIG [--key value …]   the same, then RUN/loop.yaml, which the commands of a
                                                      run read
    python ppo/run.py plan   CONFIG [--key value …]   what OpenRLHF would do on GPUs that need not be here:
                                                      --openrlhf.num_gpus 8 --openrlhf.gpu_memory_gib 80

A PPO run has two policies: the start, and what PPO makes of it. All but the training is as in loop/plan.py,
so that both kinds of runs can be compared. The section `ppo` of RUN/loop.yaml has the complete arguments of
the backend that trains.
"""

import dataclasses
import importlib
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common.cli import UserError, arg, build, parse, refuse, run, shaping_defaults
from common.devices import none_visible
from common.manifest import read_manifest
from common.records import PromptArguments
from loop import changes, estimates
from loop import check as checks
from loop.machines import gpus_of, machine_count, on_ray
from loop.plan import Plan, own_flags, with_config
from loop.plan import main as plan_main
from loop.prompt_sets import check_prompts
from loop.settings import LoopSettings, RunSettings, complete, processes
from ppo import train_ppo
from ppo.openrlhf import arguments as openrlhf_arguments
from ppo.openrlhf.arguments import OWN

Arguments = train_ppo.Arguments | openrlhf_arguments.Arguments
BACKENDS = {"openrlhf": "ppo.openrlhf.run_openrlhf", "small": "ppo.train_ppo"}
# What `generation` and `annotation` say for evaluation holds for training too, unless `ppo` says otherwise:
# key there → key of a backend.
SHARED = {
    "generation": {
        key: key
        for key in (
            *PromptArguments.__dataclass_fields__,
            *"trust_remote_code max_input_length max_new_tokens temperature top_p".split(),
        )
    },
    "annotation": {
        "reward_type": "reward_type",
        "reward_function": "reward_function",
        "reward_weights": "reward_weights",
        "chat_template": "reward_chat_template",
        "max_length": "reward_max_length",
    },
}
# Of the run, and of the backend that places models on GPUs.
OF_PLAN = ("model_size_b", "num_gpus", "gpu_memory_gib")
# What would make training's prompts or rewards others than evaluation's: refused where a backend has no such
# key.
NEEDED = {
    "generation": (
        *PromptArguments.__dataclass_fields__,
        "eos_ids",
        "top_k",
        "mixture",
        "sampling_args",
        "revision",
    ),
    "annotation": ("chat_template", "template_kwargs", "revision"),
}


def of_either(*backends: type) -> type:
    """What `ppo` may hold, as a dataclass: every key of a backend, with the values that any of them takes.

    A key or value that is not the chosen backend's is refused where its own arguments are built, with the
    reason.
    """
    found = {}
    for backend in backends:
        for name, hint in typing.get_type_hints(backend).items():
            choices = backend.__dataclass_fields__[name].metadata["choices"]
            other, others = found.get(name, (hint, choices))
            both = [*dict.fromkeys([*others, *choices])] if others and choices else None
            found[name] = other if hint == other else other | hint, both
    fields = [(name, hint, arg(None, choices=choices)) for name, (hint, choices) in found.items()]
    return dataclasses.make_dataclass("OfEither", fields, kw_only=True)


@dataclasses.dataclass(kw_only=True)
class PPOSettings(RunSettings):
    prompts: list[str] = arg(help="prompt sets; PPO trains on all of them together")
    backend: str = arg(
        "auto",
        "openrlhf (GPUs), small (ppo/train_ppo.py) or auto: openrlhf where GPUs are visible, else small",
        ["auto", *BACKENDS],
    )
    ppo: dict = arg({}, "arguments of the algorithm; --ppo.kl_coef 0.1")
    openrlhf: dict = arg(
        {}, "more arguments of ppo/openrlhf/run_openrlhf.py, for placement on the GPUs; not for backend small"
    )

    iterations = 1  # not a setting: what PPO trains is iterate 1
    job = "configs/ppo.slurm"
    sections = RunSettings.sections | {
        "ppo": of_either(train_ppo.Arguments, openrlhf_arguments.Arguments),
        "openrlhf": openrlhf_arguments.Arguments,
    }
    elsewhere = dict.fromkeys(
        LoopSettings.__dataclass_fields__.keys() - RunSettings.__dataclass_fields__.keys(), "bash run_loop.sh"
    )


class PPOPlan(Plan):
    """One PPO run: its resolved settings and what each script is told."""

    Settings = PPOSettings
    default = "configs/ppo_llama3_8b.yaml"
    example = "bash run_ppo.sh configs/ppo_tiny.yaml"
    counted = False
    plain = tuple(key for key in Plan.plain if key in PPOSettings.__dataclass_fields__ or key == "iterations")
    DECIDED = ("model_name_or_path", "reward_name_or_path", "dataset_name_or_path", "output_dir", "seed")

    @property
    def backend(self) -> str:
        """openrlhf or small."""
        if self.settings.backend != "auto":
            return self.settings.backend
        return "openrlhf" if gpus_of(self.settings) else "small"

    @property
    def own_cluster(self) -> bool:
        """Whether the machines of this run start a Ray cluster for the training."""
        given = (self.settings.ppo | self.settings.openrlhf).get("ray_address")
        elsewhere = on_ray(self.settings) or machine_count(self.settings) > 1
        return self.backend == "openrlhf" and elsewhere and given in (None, OWN)

    @property
    def module(self) -> ModuleType:
        """The backend's module, with `Arguments`, `arguments(values, where)` and `shaping(args)`; imports
        nothing heavy.
        """
        return importlib.import_module(BACKENDS[self.backend])

    def all_stages(self) -> list[str]:
        return ["0.evaluate", "1.train", "1.evaluate"]

    def expected(self) -> str:
        return "one of 0.evaluate, 1.train and 1.evaluate was expected"

    def jobs(self) -> list:
        return self.heldout_jobs()

    def training(self) -> dict:
        """Complete arguments of the backend but for what the run decides: what evaluation says of prompts and
        rewards, then `ppo`, and `openrlhf` where it is that.

        Raises:
            UserError: a key is the run's own, or the other backend's.
        """
        settings = self.settings
        chosen = settings.ppo | (settings.openrlhf if self.backend == "openrlhf" else {})
        for key in self.DECIDED:
            if key in chosen:
                own = {"dataset_name_or_path": "prompts", "output_dir": "run_dir"}.get(key, key)
                raise UserError(f"ppo: {key} is the run's own; give {own}")
        known = self.module.Arguments.__dataclass_fields__
        for other in BACKENDS.keys() - {self.backend}:
            others = importlib.import_module(BACKENDS[other]).Arguments.__dataclass_fields__
            foreign = [key for key in settings.ppo if key not in known and key in others]
            if foreign:
                raise UserError(
                    f"ppo: {', '.join(foreign)} for backend {other} alone; leave that out with backend "
                    f"{self.backend}"
                )
        shared = {
            ours: value
            for name, keys in SHARED.items()
            for key, value in getattr(settings, name).items()
            if (ours := keys.get(key)) in known
        }
        if isinstance(several := self.generation()["temperature"], list):
            raise UserError(f"generation.temperature {several}: PPO samples at one temperature, give one")
        if "date" in known:
            shared.setdefault("date", settings.date)
        shared |= {key: value for key in OF_PLAN if key in known and (value := getattr(settings, key))}
        if self.own_cluster:
            gpus = len(gpus_of(settings))
            all_gpus = machine_count(settings) * gpus
            shared |= {"ray_address": OWN, "num_gpus": all_gpus, "gpus_per_node": gpus}
        return complete(self.module.Arguments, shared | chosen, self.DECIDED, self.where)

    def training_of(self, i: int) -> dict:
        settings = self.settings
        return self.training() | {
            "model_name_or_path": settings.model_name_or_path,
            "reward_name_or_path": settings.reward_name_or_path,
            "dataset_name_or_path": settings.prompts,
            "output_dir": str(self.folder.model(i)),
            "seed": settings.seed,
        }

    def trained(self) -> dict:
        return {"ppo": self.training()}

    def shaping_training(self, section: str) -> dict:
        return shaping_defaults(self.module.Arguments)

    def values(self, stages: list[str]) -> list[tuple[str, object]]:
        return [
            *super().values(stages),
            ("backend", self.backend),
            ("own_cluster", self.own_cluster),
            *(("prompt_sets[]", name) for name in self.settings.prompts),
        ]

    def left_out(self) -> Iterator[tuple[str, str]]:
        """(section, key) of what evaluation would use and the backend could not."""
        known = self.module.Arguments.__dataclass_fields__
        for name, keys in NEEDED.items():
            given = getattr(self.settings, name) | (self.settings.heldout if name == "generation" else {})
            yield from ((name, key) for key in keys if given.get(key) and SHARED[name].get(key) not in known)

    def arguments(self) -> Arguments:
        """The backend's arguments as it reads them, checked as far as can be before anything is loaded."""
        return self.ask(self.module.arguments, self.training_of(1), self.where)

    @property
    def where(self) -> str:
        """The sections that hold the backend's arguments, for messages."""
        return "ppo and openrlhf" if self.backend == "openrlhf" else "ppo"

    def ask(self, function: Callable, *args: object) -> Any:
        """What a function of the backend returns; its refusals, which name its keys, say where they stand."""
        try:
            return function(*args)
        except UserError as error:
            refuse([f"ppo: {problem}" for problem in error.problems])

    def is_trained(self) -> bool:
        held = read_manifest(self.folder.model(1))
        return bool(held and held.get("complete"))

    def refuse_early(self):
        if self.backend == "openrlhf" and not gpus_of(self.settings):
            raise UserError(
                f"backend openrlhf needs GPUs and {none_visible()}; --backend small, or on tiny models: "
                f"{self.example}; for a plan only: --dry_run --num_gpus 8 --gpu_memory_gib 80"
            )

    def check(self, left: bool):
        check(self, left)


def check(plan: PPOPlan, left: bool):
    """Print findings about a PPO run and refuse what cannot work.

    Args:
        left: whether anything is left to do.

    Raises:
        UserError: all problems, a line each.
    """
    settings, found = plan.settings, checks.Findings()
    checks.check_models(plan, found)
    for name, key in plan.left_out():
        found.problems.append(
            f"{name}: PPO (backend {plan.backend}) would train without {key}, which evaluation uses; "
            "leave it out"
        )
    # What has the right types is looked at further, so that all that is wrong is told at once.
    args = found.attempt(lambda: build(plan.module.Arguments, plan.training_of(1), plan.where))
    if args and not found.problems:
        found.notes.extend(found.attempt(changes.refuse, plan, plan.resolved()) or [])
    sets = check_prompts(plan, found)
    if args:
        prompts = None if None in sets.values() else sum(len(sets[name]) for name in settings.prompts)
        before = len(found.problems)
        found.attempt(plan.ask, plan.module.check, args, processes(settings), prompts)
        if len(found.problems) == before and not plan.is_trained():
            check_backend(plan, args, found)
    _, count = checks.check_gpus(plan, found)
    if count and args:
        check_disk(plan, args, count, found)
    checks.conclude(
        plan,
        left,
        found,
        "" if found.problems else f"{checks.summary(plan)}, backend {plan.backend}",
    )


def check_disk(plan: PPOPlan, args: Arguments, count: float, found: checks.Findings):
    """Hold the model and its checkpoints against the disk. `count`: parameters of the policy."""
    kept = args.save_total_limit if args.save_steps else 0
    if plan.backend == "small":  # policy and value model with Adam's two states, in 4 bytes each
        room = 4 + 24 * (kept + 1 if kept else 0)
    else:  # OpenRLHF's, 14 bytes a parameter each; old ones go before a new one is written
        room = 4 + 2 * 14 * kept
    what = "the model and checkpoints"
    estimates.check_disk(plan, found, room * count / 2**30, what, "see ppo.save_total_limit")


def check_backend(plan: PPOPlan, args: Arguments, found: checks.Findings):
    """What the backend itself refuses before it loads anything, on as many processes as will be started."""
    if plan.backend == "openrlhf":  # as its dry run: its environment is looked at when that is made
        args = dataclasses.replace(args, dry_run=True)
        planned = found.attempt(plan.ask, plan.module.plan, args)
        found.notes.extend(plan.module.describe(args, planned) if planned else [])
        return
    found.attempt(plan.ask, plan.module.check_paths, args)
    limit = checks.positions(args.model_name_or_path)
    if limit and args.max_input_length + args.max_new_tokens > limit:
        found.problems.append(
            f"the policy has {limit} positions: generation.max_input_length {args.max_input_length} + "
            f"generation.max_new_tokens {args.max_new_tokens} are more"
        )


def show_plan(argv: list[str]):
    """Print where OpenRLHF would put what, and its command; on a machine without GPUs, for so many as are
    asked for.
    """
    settings = parse(PPOSettings, __doc__, with_config(own_flags(argv)[1], PPOPlan.default))
    refuse(settings.problems)
    settings.backend = "openrlhf"
    plan = PPOPlan(settings)
    plan.ask(plan.module.show_plan, dataclasses.replace(plan.arguments(), dry_run=True))


def main():
    if sys.argv[1:2] == ["plan"]:
        show_plan(sys.argv[2:])
    else:
        plan_main(PPOPlan, __doc__)


if __name__ == "__main__":
    run(main)
