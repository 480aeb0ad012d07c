"""What run_ppo.sh needs thought for: the settings of a PPO run, what each stage reads and writes, and what is
left to do.

    python ppo/run.py prepare RUN configs/ppo_tiny.yaml [--key value …] check, write RUN/loop.yaml, print variables
    python ppo/run.py todo RUN ITERATION STAGE                          print the steps left, write their YAML
    python ppo/run.py plan CONFIG --openrlhf.num_gpus 8 --openrlhf.gpu_memory_gib 80    what OpenRLHF would do on GPUs that need not be here

A PPO run is a run of one iteration: `iter0/` holds the held-out answers of the starting policy, `iter1/` the
model that PPO trains, its held-out answers and `train.yaml`, from which either backend can be started by
hand. Evaluation, folders and manifests are those of the loop (loop/run.py), so that evaluation/metrics.py shows
both alike; so is what stands in place of RUN.
"""

import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common.cli import UserError, arg, build, nearest, parse, refuse, run
from common.devices import none_visible
from loop import preflight
from loop.run import Run, is_planning, load, settle, setup, todo
from loop.settings import LoopSettings, RunSettings, gpus_of, processes
from ppo import arguments, train_ppo
from ppo.openrlhf import arguments as openrlhf_arguments

BACKENDS = {"openrlhf": "ppo.openrlhf.run_openrlhf", "small": "ppo.train_ppo"}
# What `generation` and `annotation` say for evaluation holds for training too, unless `ppo` says otherwise:
# key there → key of a backend.
SHARED = {
    "generation": {
        key: key
        for key in (
            "dataset_key",
            "dataset_split",
            "bad_prompts",
            "chat_template",
            "template_kwargs",
            "system_prompt",
            "date",
            "trust_remote_code",
            "max_input_length",
            "max_new_tokens",
            "temperature",
            "top_p",
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
OF_PLAN = (
    "model_size_b",
    "num_gpus",
    "gpu_memory_gib",
)  # of the run, and of the backend that places models on GPUs
# What would make training's prompts or rewards others than evaluation's: refused where a backend has no such
# key.
NEEDED = {
    "generation": ("system_prompt", "template_kwargs", "eos_ids", "top_k", "revision"),
    "annotation": ("chat_template", "template_kwargs", "revision"),
}


def of_either(*backends):
    """What `ppo` may hold, as a dataclass: every key of a backend, with the values that any of them takes.

    A key or value that is not the chosen backend's is refused where its own arguments are built, with the
    reason.
    """
    found = {}
    for backend in backends:
        hints = typing.get_type_hints(backend)
        for name, field in backend.__dataclass_fields__.items():
            hint, choices = hints[name], field.metadata["choices"]
            if name in found:
                other, others = found[name]
                hint, choices = (
                    hint if hint == other else other | hint,
                    [*dict.fromkeys([*others, *choices])] if others and choices else None,
                )
            found[name] = hint, choices
    return dataclasses.make_dataclass(
        "OfEither",
        [(name, hint, arg(None, choices=choices)) for name, (hint, choices) in found.items()],
        kw_only=True,
    )


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
        {},
        "more arguments of ppo/openrlhf/run_openrlhf.py: placement on the GPUs; the small backend takes no notice",
    )

    iterations = 1  # not a setting: what PPO trains is iterate 1
    sections = RunSettings.sections | {
        "ppo": of_either(train_ppo.Arguments, openrlhf_arguments.Arguments),
        "openrlhf": openrlhf_arguments.Arguments,
    }
    elsewhere = dict.fromkeys(
        LoopSettings.__dataclass_fields__.keys() - RunSettings.__dataclass_fields__.keys(), "bash run_loop.sh"
    )


class PPORun(Run):
    """Paths, arguments and state of one PPO run."""

    Settings = PPOSettings
    example = "bash run_ppo.sh configs/ppo_tiny.yaml"

    @property
    def backend(self):
        """openrlhf or small."""
        if self.settings.backend != "auto":
            return self.settings.backend
        return "openrlhf" if gpus_of(self.settings) else "small"

    @property
    def module(self):
        """The backend's module, with `Arguments`, `arguments(values, where)` and `shaping(args)`; imports
        nothing heavy.
        """
        return importlib.import_module(BACKENDS[self.backend])

    def stages(self, i):
        return {0: ("evaluate",), 1: ("train", "evaluate")}.get(i, ())

    def jobs(self, i):
        return self.heldout_jobs(i)

    def training(self, i):
        """Flat arguments of the backend: `ppo`, `openrlhf` where it is that, then what the run decides."""
        settings = self.settings
        chosen = settings.ppo | (settings.openrlhf if self.backend == "openrlhf" else {})
        decided = {
            "model_name_or_path": self.iterate(0),
            "reward_name_or_path": settings.reward_name_or_path,
            "dataset_name_or_path": settings.prompts,
            "output_dir": self.path(i, "model"),
            "seed": settings.seed,
        }
        for key in decided:
            if key in chosen:
                raise UserError(
                    f"ppo: {key} is the run's own; give "
                    f"{'prompts' if key.startswith('dataset') else 'run_dir' if key == 'output_dir' else key}"
                )
        known = self.module.Arguments.__dataclass_fields__
        for other in BACKENDS.keys() - {self.backend}:
            foreign = [
                key
                for key in settings.ppo
                if key not in known
                and key in importlib.import_module(BACKENDS[other]).Arguments.__dataclass_fields__
            ]
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
        if "date" in known:
            shared.setdefault("date", settings.date)
        shared |= {key: value for key in OF_PLAN if key in known and (value := getattr(settings, key))}
        return decided | shared | chosen

    def left_out(self):
        """(section, key) of what evaluation would use and the backend could not."""
        known = self.module.Arguments.__dataclass_fields__
        for name, keys in NEEDED.items():
            given = getattr(self.settings, name) | (self.settings.heldout if name == "generation" else {})
            yield from ((name, key) for key in keys if given.get(key) and SHARED[name].get(key) not in known)

    def arguments(self):
        """The backend's arguments as it reads them, checked as far as can be before anything is loaded."""
        return self.ask(self.module.arguments, self.training(1), self.where)

    @property
    def where(self):
        """The sections that hold the backend's arguments, for messages."""
        return "ppo and openrlhf" if self.backend == "openrlhf" else "ppo"

    def ask(self, function, *args):
        """What a function of the backend returns; where it refuses and names its flags (`--offload`), those
        of run_ppo.sh instead.
        """
        own = {"dataset_name_or_path": "prompts", "output_dir": "run_dir"}
        sections = {ours: f"{name}.{key}" for name, keys in SHARED.items() for key, ours in keys.items()}

        def name(match):
            key = own.get(match[1], match[1])
            if (
                key in PPOSettings.__dataclass_fields__
                or key not in self.module.Arguments.__dataclass_fields__
            ):
                return f"--{key}"
            section = "ppo" if key in train_ppo.Arguments.__dataclass_fields__ else "openrlhf"
            return f"--{sections.get(key, f'{section}.{key}')}"

        try:
            return function(*args)
        except UserError as error:
            refuse(
                [re.sub(r"--(\w+)", name, problem) for problem in getattr(error, "problems", [str(error)])]
            )

    def is_trained(self, i):
        args = self.arguments()
        return self.is_done(args.output_dir, *self.module.shaping(args))


def check(current):
    """Print findings about a PPO run and refuse what cannot work.

    Returns:
        the stages that have something left, as `Run.stages_left` names them.

    Raises:
        UserError: all problems, a line each.
    """
    settings, found = current.settings, preflight.Findings()
    if not settings.prompts:
        raise UserError("prompts name at least one set")
    preflight.check_models(current, found)
    for name, key in current.left_out():
        found.problems.append(
            f"{name}: PPO (backend {current.backend}) would train without {key}, which evaluation uses; "
            "leave it out"
        )
    # What has the right types is looked at further, so that all that is wrong is told at once.
    args = found.attempt(lambda: build(current.module.Arguments, current.training(1), current.where))
    before = len(found.problems)
    if args:
        found.attempt(
            current.ask,
            current.module.check,
            args,
            *([processes(settings)] if current.backend == "small" else []),
        )
    right = args is not None and len(found.problems) == before
    left = None if found.problems else found.attempt(current.stages_left)
    sets = preflight.check_prompts(current, found)
    there = None if None in sets.values() else sum(len(sets[name]) for name in settings.prompts)
    check_rollouts(current, args, there, found)
    if right and (left is None or "1.train" in left):
        check_backend(current, args, found)
    _, count = preflight.check_gpus(current, found)
    if count and args and current.backend == "small":
        # The model; while training, checkpoints of policy and value model with Adam's two states, in 4 bytes
        # each.
        kept = args.save_total_limit + 1 if args.save_steps else 0
        preflight.check_disk(
            current,
            found,
            (4 + 24 * kept) * count / 2**30,
            "the model and checkpoints",
            "see ppo.save_total_limit",
        )
    elif (
        count and args
        # OpenRLHF's of policy and value model, 14 bytes a parameter each; old ones go before a new one is
        # written
    ):
        kept = 2 * 14 * args.save_total_limit if args.save_steps and not args.lora_r else 0
        preflight.check_disk(
            current,
            found,
            (4 + kept) * count / 2**30,
            "the model and checkpoints",
            "see ppo.save_total_limit",
        )
    preflight.conclude(
        current,
        left,
        found,
        "" if found.problems else f"{preflight.summary(current)}, backend {current.backend}",
    )
    return left


def check_rollouts(current, args, prompts, found):
    """Refuse fewer prompts than a rollout takes, with sizes that fit together in place of what was said of
    the sizes without them.
    """
    if args is None or prompts is None or not 0 <= prompts < args.rollout_batch_size:
        return
    if current.backend == "openrlhf":  # its sizes follow from where it is placed, see its plan
        found.problems.append(
            f"{prompts} prompts are fewer than a rollout takes: lower --ppo.rollout_batch_size "
            f"{args.rollout_batch_size}, or give more"
        )
        return

    def sizes(*given):
        return current.ask(lambda: refuse(arguments.check_batches(args, processes(current.settings), *given)))

    before = preflight.Findings()
    before.attempt(sizes)
    found.problems = [problem for problem in found.problems if problem not in before.problems]
    found.attempt(sizes, prompts)


def check_backend(current, args, found):
    """What the backend itself refuses before it loads anything, on as many processes as will be started."""
    if (
        current.backend == "openrlhf"
    ):  # as its dry run: what its environment holds is looked at when that is made
        args = dataclasses.replace(args, dry_run=True)
        planned = found.attempt(current.ask, current.module.plan, args)
        found.notes.extend(current.module.describe(args, planned) if planned else [])
        return
    found.attempt(current.ask, current.module.check_paths, args)
    limit = preflight.positions(args.model_name_or_path)
    if limit and args.max_input_length + args.max_new_tokens > limit:
        found.problems.append(
            f"the policy has {limit} positions: generation.max_input_length {args.max_input_length} + "
            "generation.max_new_tokens "
            f"{args.max_new_tokens} are more"
        )


def prepare(settings_dir, argv):
    """Check everything that can be known now, write loop.yaml, and print what run_ppo.sh needs as shell
    variables.
    """
    settings = parse(PPOSettings, __doc__, argv)
    current = PPORun(settings, planning=is_planning(settings, settings_dir))
    settle(current, check(current), settings_dir)


def plan(argv):
    """Print where OpenRLHF would put what, and its command; on a machine without GPUs, for so many as are
    asked for.
    """
    settings = parse(PPOSettings, __doc__, argv)
    refuse(settings.problems)
    settings.backend = "openrlhf"
    current = PPORun(settings)
    module, args = current.module, dataclasses.replace(current.arguments(), dry_run=True)
    current.ask(module.show_plan, args)


def main():
    commands = {"prepare": 1, "setup": 1, "todo": 4, "plan": 1}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in commands:
        raise UserError(f"unknown command {name!r}{nearest(name, commands)}; see the top of ppo/run.py")
    elif name == "prepare":
        settings_dir, *rest = (
            sys.argv[2:] if sys.argv[2:3] not in ([], ["-h"], ["--help"]) else ["", "--help"]
        )
        prepare(settings_dir, rest)
    elif name == "plan":
        plan(sys.argv[2:])
    elif name == "setup":
        current = PPORun(setup(PPORun, __doc__, sys.argv[2:]))
        if current.backend == "openrlhf" and not gpus_of(current.settings):
            raise UserError(
                f"backend openrlhf needs GPUs and {none_visible()}; --backend small, or on tiny models: "
                + PPORun.example
                + "; for a plan only: python ppo/run.py plan …"
            )
        print(f"backend={current.backend}")
    else:
        todo(load(sys.argv[2], PPORun), int(sys.argv[3]), sys.argv[4], sys.argv[2])


if __name__ == "__main__":
    run(main)
