"""The settings of a run, resolved: what run_loop.sh needs of them, and RUN/loop.yaml.

    python loop/plan.py values CONFIG [--key value …]   KEY<TAB>VALUE lines for the driver; looks at nothing
                                                        but the YAML, and at the Ray cluster if there is one
    python loop/plan.py check  CONFIG [--key value …]   check all that can be known now; writes nothing
    python loop/plan.py write  CONFIG [--key value …]   the same, then RUN/loop.yaml, which the commands of a
                                                        run read

`--stage I.STAGE` and `--stop_stage I.STAGE` leave stages out; `--left ""` says that nothing is left to do, so
that only changed settings are looked for.

RUN/loop.yaml holds every setting, those that were not given too: its sections `generation`, `heldout`,
`annotation`, `eval_annotation` and `training_args` are complete arguments of the scripts that read them.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from annotate_data.arguments import Arguments as RewardArguments
from common.chat import TemplateArguments, parse_date
from common.cli import Parser, UserError, build, parse, read_yaml, run, shaping_defaults
from common.devices import none_visible
from common.manifest import write_yaml
from common.run_folder import RunFolder, read_object
from dpo_iteration import arguments as dpo
from generation import get_hf2, mixture, sampling
from loop import changes, machines
from loop.settings import (
    DECIDED,
    LoopSettings,
    complete,
    gpu_groups,
    gpus_of_an_engine,
    keys_of_section,
    processes,
    refuse_other_kind,
)

STAGES = ("generate", "annotate", "train", "evaluate")  # of an iteration; the start is evaluated only
ONE_PER_GPU = "accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no".split()


def one_per_gpu(many: int, machines_of: list) -> list:
    """What starts a script as `many` processes, a GPU each; `machines_of`: what accelerate is told of
    machines.
    """
    return ["python"] if many == 1 else [*ONE_PER_GPU, *machines_of, "--num_processes", many]


class Plan:
    """One run of the loop: its resolved settings and what each script is told. ppo/run.py has that of PPO."""

    Settings = LoopSettings
    default = "configs/loop_llama3_8b.yaml"
    example = "bash run_loop.sh configs/loop_tiny.yaml"  # what a machine without GPUs can do
    counted = True  # whether there may be more iterations

    def __init__(self, settings, planning: bool = False):
        self.settings, self.planning = settings, planning
        self.folder = RunFolder(settings.run_dir)
        self.before = read_yaml(self.folder.settings) if self.folder.settings.is_file() else {}
        settings.date = settings.date or self.before.get("date") or str(parse_date(None))

    def all_stages(self) -> list[str]:
        """Names such as 2.train, in their order, those that are left out too."""
        later = [f"{i}.{name}" for i in range(1, self.settings.iterations + 1) for name in STAGES]
        return ["0.evaluate", *later]

    def stages(self, first: str | None, last: str | None) -> list[str]:
        """The stages from `first` to `last`; without held-out prompts nothing is evaluated.

        Raises:
            UserError: there is no such stage, or `first` comes behind `last`.
        """
        names = self.all_stages()
        begin = 0 if first is None else self.position(first, "--stage")
        end = len(names) - 1 if last is None else self.position(last, "--stop_stage")
        if begin > end:
            raise UserError(f"--stage {first} comes behind --stop_stage {last}")
        measured = self.settings.heldout_prompts is not None
        return [name for name in names[begin : end + 1] if measured or not name.endswith("evaluate")]

    def position(self, asked: str, flag: str) -> int:
        """Where a stage stands in `all_stages`: 2.train, 2.3, or the name alone, which is iteration 1's."""
        names = self.all_stages()
        iteration, _, stage = asked.rpartition(".")
        if stage in ("1", "2", "3", "4"):
            stage = STAGES[int(stage) - 1]
        name = f"{int(iteration) if iteration.isdecimal() else iteration or 1}.{stage}"
        if name in names:
            return names.index(name)
        beyond = iteration.isdecimal() and int(iteration) > self.settings.iterations
        if beyond and f"{self.settings.iterations}.{stage}" in names and self.counted:
            if flag == "--stop_stage":  # to the end
                return len(names) - 1
            raise UserError(f"{flag} {asked}: there are {self.settings.iterations} iterations")
        raise UserError(f"{flag} {asked}: {self.expected()}")

    def expected(self) -> str:
        return (
            "ITERATION.STAGE was expected, with STAGE 1 generate, 2 annotate, 3 train or 4 evaluate, for "
            "example 2.3; 0.4 evaluates the start"
        )

    def prompts(self, i: int) -> str:
        """The prompt set of iteration i: they are taken in turn."""
        return self.settings.prompts[(i - 1) % len(self.settings.prompts)]

    # ---- What the scripts are told ------------------------------------------------------------------------

    def generation(self) -> dict:
        """Complete arguments of get_hf2.py but for what the run decides."""
        given = {"date": self.settings.date} | self.settings.generation
        return complete(get_hf2.Arguments, given, DECIDED["generation"], "generation")

    def heldout(self) -> dict:
        """The same for the held-out prompts, whose answers are all the policy's, sampled in one way: of a
        mixture, as its first part.
        """
        given = self.generation()
        if first := self.first_part():
            given |= {key: getattr(first, key) for key in ("temperature", "top_p", "top_k")} | {
                "mixture": None
            }
        given |= self.settings.heldout
        found = complete(get_hf2.Arguments, given, DECIDED["generation"], "heldout")
        if found["mixture"] or isinstance(found["temperature"], list):
            raise UserError("heldout: held-out answers are sampled at one temperature, not from a mixture")
        return found

    def generation_job(self) -> get_hf2.Arguments:
        """The arguments of get_hf2.py for the responses of the first iteration."""
        return self.job(self.generation(), self.prompts(1), self.folder.generated(1))

    def first_part(self) -> mixture.Part | None:
        """The policy's first part of the mixture that responses are of; None where there is no mixture."""
        job = self.generation_job()
        with keys_of_section("generation", get_hf2.Arguments):
            return mixture.own_parts(job)[0] if mixture.is_mixed(job) else None

    def models(self) -> list[str]:
        """What responses are sampled from, by the names that a mixture has for models."""
        job = self.generation_job()
        with keys_of_section("generation", get_hf2.Arguments):
            return mixture.models_of(job)

    def models_of(self, i: int) -> list[list[str]]:
        """The same of iteration i, the names of each model, the policy's first: before policy 1 there is the
        start alone.
        """
        policies, found = {"policy": i - 1, "previous": max(i - 2, 0), "start": 0}, {}
        for name in self.models():
            found.setdefault(policies[name], []).append(name)
        return list(found.values())

    def kept_iterates(self) -> int | None:
        """How many of the last iterates keep their weights: `keep_iterates`, and no fewer than the next
        responses are sampled from.
        """
        kept = getattr(self.settings, "keep_iterates", None)
        return kept and max(kept, 1 + ("previous" in self.models()))

    def annotation(self, given: dict, where: str) -> dict:
        """Complete arguments of get_rewards.py but for what the run decides."""
        return complete(RewardArguments, {"date": self.settings.date} | given, DECIDED[where], where)

    def training(self) -> dict:
        """Complete arguments of run_dpo.py but for what the run decides: the YAML, then `training_args`, then
        how generation writes prompts.

        Raises:
            UserError: training would write prompts otherwise than generation.
        """
        given = read_yaml(self.settings.training) | self.settings.training_args
        sampled = self.settings.generation
        # the records tell their date
        template = [key for key in TemplateArguments.__dataclass_fields__ if key != "date"]
        for key in template:
            if given.get(key) and given[key] != sampled.get(key):
                raise UserError(
                    f"training has {key} {given[key]!r} and generation {sampled.get(key)!r}: give it once, "
                    "in generation"
                )
        shared = (*template, "revision", "trust_remote_code")
        given |= {key: sampled[key] for key in shared if sampled.get(key) and not given.get(key)}
        given = {key: value for key, value in given.items() if key not in DECIDED["training_args"]}
        found = dpo.resolve(given, where=self.settings.training)
        return {key: value for key, value in found.items() if key not in DECIDED["training_args"]}

    def training_of(self, i: int) -> dict:
        """All arguments of the training of iteration i, as the driver gives them; for the checks."""
        return self.training() | {
            "model_name_or_path": self.settings.model_name_or_path,
            "ref_model_name_or_path": self.settings.model_name_or_path,
            "train_dir": [str(self.folder.rewarded(i))],
            "output_dir": str(self.folder.model(i)),
            "pairs_path": str(self.folder.pairs(i)),
            "seed": self.settings.seed,
        }

    def job(self, section: dict, prompts: str, output: Path, **more: object) -> get_hf2.Arguments:
        """The arguments of get_hf2.py for one job."""
        decided = {
            "model_name_or_path": self.settings.model_name_or_path,
            "dataset_name_or_path": prompts,
            "output_dir": str(output),
            "seed": self.settings.seed,
        }
        return build(get_hf2.Arguments, section | decided | more, "generation")

    def jobs(self) -> list:
        """Sampling of one turn, for the checks: responses, and the held-out answers where there are any."""
        return [self.generation_job(), *self.heldout_jobs()]

    def heldout_jobs(self) -> list:
        if self.settings.heldout_prompts is None:
            return []
        section, prompts = self.heldout(), self.settings.heldout_prompts
        return [
            self.job(section, prompts, self.folder.heldout(0, kind), **decided)
            for kind, decided in sampling.HELDOUT.items()
        ]

    def resolved(self) -> dict:
        """What RUN/loop.yaml holds."""
        values = dataclasses.asdict(self.settings)
        values["generation"] = self.generation()
        values["heldout"] = self.heldout() if self.settings.heldout_prompts is not None else {}
        values["annotation"] = self.annotation(self.settings.annotation, "annotation")
        if self.settings.eval_reward_model:
            values["eval_annotation"] = self.annotation(self.settings.eval_annotation, "eval_annotation")
        return values | self.trained()

    def trained(self) -> dict:
        """The part of RUN/loop.yaml that tells how policies are trained."""
        return {"training_args": self.training()}

    # ---- What the driver is told --------------------------------------------------------------------------

    def values(self, stages: list[str]) -> Iterator[tuple[str, object]]:
        """(key, value) pairs for the driver; a key with [] is an element of a list."""
        settings, many = self.settings, processes(self.settings)
        groups, size = gpu_groups(settings), gpus_of_an_engine(settings)
        yield from ((key, getattr(settings, key)) for key in self.plain)
        yield from {"stages": " ".join(stages), "num_processes": many, "stale": self.stale()}.items()
        by_ray = settings.num_gpus is None and machines.on_ray(settings)
        yield "machines", machines.machine_count(settings)
        yield "sharing", machines.machine_count(settings) + by_ray  # files; the driver's may be none of Ray's
        yield "gpus", len(machines.gpus_of(settings))
        yield "ray", " ".join(map(str, machines.cluster())) if by_ray else None
        yield "num_shards", machines.machine_count(settings) * len(groups)
        yield from ((f"prompts.{i}", self.prompts(i)) for i in range(1, settings.iterations + 1))
        if len(self.models()) > 1:
            for i in range(1, settings.iterations + 1):
                yield f"parts.{i}", " ".join(map(",".join, self.models_of(i)))
        yield "keep_iterates", self.kept_iterates()
        generation, heldout = self.generation(), self.heldout()
        for name, section in (("generation", generation), ("heldout", heldout)):
            several = (
                section["temperature"]
                if isinstance(section["temperature"], list)
                else [section["temperature"]]
            )
            yield from {f"{name}.K": section["K"], f"{name}.temperature": ",".join(map(str, several))}.items()
        yield "elsewhere", bool(settings.num_gpus or settings.gpu_memory_gib)  # a plan for other machines
        yield "divergence", settings.divergence and heldout["temperature"] > 0
        lists = {
            "gpu_groups": groups,
            "everywhere": machines.everywhere(settings, 1, "all", ends=True),
            "of_machines": machines.of_accelerate(settings),
            "shards_everywhere": machines.everywhere(settings, len(groups), str(size), ends=False),
            "each_gpu": self.each_gpu(),
            "reward_models": settings.reward_name_or_path or [],
            "judges": settings.eval_reward_model or [],
        }
        if settings.generation_backend == "servers":
            from loop.servers import server_commands

            lists |= server_commands(self)
        yield from ((f"{key}[]", value) for key, values in lists.items() for value in values)

    def each_gpu(self) -> list:
        """What starts a script that computes once a GPU: annotation and divergence."""
        settings = self.settings
        launched = machines.of_accelerate(settings) or ["--num_machines", 1]
        everywhere = machines.everywhere(settings, 1, "all", ends=True)
        return [*everywhere, *one_per_gpu(processes(settings), launched)]

    plain = (
        *("run_dir", "setup_command", "model_name_or_path", "iterations", "heldout_prompts", "seed"),
        *("generation_backend", "gold_function", "report", "reference", "train_on", "accelerate_config"),
        "stop_when",
    )

    def stale(self) -> str:
        """Numbers of the policies whose figures are of another gold function, or want the second judge's."""
        found = []
        for i in range(self.settings.iterations + 1):
            metrics = read_object(self.folder.metrics(i))  # {} where it is damaged
            judged = "judge" in metrics or not self.settings.eval_reward_model
            fresh = judged and metrics.get("gold_function", "") == self.settings.gold_function
            if not fresh and self.folder.metrics(i).exists():
                found.append(str(i))
        return " ".join(found)

    # ---- Checks -------------------------------------------------------------------------------------------

    def shaping(self, section: str) -> dict:
        """{key: default} of the keys of a section that shape what is made with it."""
        scripts = {"annotation": RewardArguments, "eval_annotation": RewardArguments}
        scripts |= {"generation": get_hf2.Arguments, "heldout": get_hf2.Arguments}
        if section in scripts:
            return shaping_defaults(scripts[section])
        return self.shaping_training(section)

    def shaping_training(self, section: str) -> dict:
        """The same of the section that tells how policies are trained."""
        return shaping_defaults(dpo.Arguments)

    def refuse_early(self):
        """What a kind of run refuses besides, by its settings alone."""

    def check(self, left: bool):
        """Refuse what cannot work, all of it at once, and print what was found."""
        from loop import check  # what it imports is not needed to resume a run

        check.check(self, left)


def own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the driver's own flags, the words that are left)."""
    flags = Parser(add_help=False, allow_abbrev=False)
    for name in ("--stage", "--stop_stage", "--left"):
        flags.add_argument(name)
    return flags.parse_known_args(argv)


def read(kind: type[Plan], argv: list[str], planning: bool) -> tuple[Plan, list[str], argparse.Namespace]:
    """The plan of a command line, the names of its stages, and the driver's own flags.

    Raises:
        UserError: all that the settings alone show to be wrong.
    """
    own, rest = own_flags(argv)
    settings = parse(kind.Settings, __doc__, with_config(rest, kind.default))
    if not settings.run_dir.strip():
        raise UserError("run_dir is empty; name a folder, for example --run_dir runs/mine")
    for line in (settings.run_dir, settings.setup_command, settings.gold_function, *settings.prompts):
        if line and set(line) & {"\n", "\t"} and line != settings.setup_command:
            raise UserError(f"{line!r}: no line break and no tab may stand in a name")
    if settings.iterations < 1 or not settings.prompts:
        raise UserError("iterations must be at least 1 and prompts name at least one set")
    plan = kind(settings, planning)
    refuse_other_kind(settings, plan.before)
    if not settings.without_gpu and not machines.gpus_of(settings):
        raise UserError(
            f"this run needs GPUs and {none_visible()}{machines.on_login_node(settings)}: `without_gpu: "
            "true` in its YAML (or --without_gpu true) lets it use the CPU, which is for small models; to "
            "plan it for GPUs elsewhere: --check --num_gpus 8 --gpu_memory_gib 80; the same on tiny models: "
            f"{kind.example}"
        )
    plan.refuse_early()
    return plan, plan.stages(own.stage, own.stop_stage), own


def with_config(argv: list[str], default: str) -> list[str]:
    """`argv` with the config in front: the first word, if it is no flag; else the word behind a flag's value
    that is a YAML file. A relative path is from the folder that the driver was started in, if it is there,
    else from the project's.
    """
    words, before = list(argv), ["", *argv]
    free = [k for k in range(len(words)) if not before[k].startswith("--") or "=" in before[k]]
    named = [k for k in free if words[k].endswith((".yaml", ".yml")) and not words[k].startswith("--")]
    if words and not words[0].startswith("--"):
        named.append(0)
    if not named:
        return [default, *words]
    config, caller = words.pop(named[0]), Path(os.environ.get("RLHF_CALLER", "."))
    elsewhere = caller.resolve() != Path.cwd() and (caller / config).is_file()
    return [str(caller / config) if elsewhere else config, *words]


def main(kind: type[Plan] = Plan, description: str = __doc__):
    name, argv = (sys.argv[1] if len(sys.argv) > 1 else "-h"), sys.argv[2:]
    if name in ("-h", "--help") or {"-h", "--help"} & {*argv}:
        print(description)
        if {"-h", "--help"} & {*argv}:
            parse(kind.Settings, description, ["--help"])
        return
    if name not in ("values", "check", "write"):
        raise UserError(
            f"unknown command {shlex.quote(name)}: values, check or write was expected, see --help"
        )
    plan, stages, own = read(kind, argv, planning=name != "write")
    if name == "values":
        for key, value in plan.values(stages):
            if isinstance(value, bool) or value is None:
                value = "yes" if value else ""
            print(f"{key}\t{value}")
        for problem in plan.settings.problems:
            print(f"problems[]\t{problem}")
        return
    if name == "write" and (plan.settings.num_gpus or plan.settings.gpu_memory_gib):
        raise UserError(
            "num_gpus and gpu_memory_gib are for --check and --dry_run: a run takes the GPUs that it sees "
            "(CUDA_VISIBLE_DEVICES)"
        )
    if name == "check" or own.left != "":
        plan.check(own.left != "")
    if name == "write":
        resolved = plan.resolved()
        if own.left == "":
            for line in changes.refuse(plan, resolved):
                print(f"note: {line}", file=sys.stderr)
        if resolved != plan.before:
            plan.folder.path.mkdir(parents=True, exist_ok=True)
            write_yaml(plan.folder.settings, resolved)


if __name__ == "__main__":
    run(main)
