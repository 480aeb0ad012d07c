"""What run_loop.sh needs thought for: what each stage of a run reads and writes, and what is left to do.

    python loop/run.py prepare RUN configs/loop_tiny.yaml [--key value …]  check, write RUN/loop.yaml, print variables
    python loop/run.py todo RUN ITERATION STAGE                           print the steps left, write their YAML
    python loop/run.py prune RUN ITERATION                                delete weights that `keep_iterates` lets go

A run's folder holds `loop.yaml` (the settings, resolved), `iter0/` (held-out answers of the starting policy)
and `iter1/`, `iter2/`, …: `generated.jsonl`, `rewarded.jsonl`, `pairs.jsonl`, `model/`, `heldout_*.jsonl`,
`metrics.json`, `logs/`, and one YAML per stage, from which each command can be run by hand. The evaluation of
an iterate also samples the next iteration's responses, since both need the same engine.

For a dry run another folder stands in place of RUN above: what is written goes there, and nothing into the
run. With '' in its place `prepare` only checks.
"""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from annotate_data import get_rewards
from common.chat import parse_date
from common.cli import UserError, build, nearest, parse, read_yaml, run
from common.devices import none_visible
from common.manifest import difference, read_manifest, write_yaml
from dpo_iteration import arguments as dpo
from evaluation import divergence
from generation import gen_hf, get_hf2
from generation.sampling import check_sampling, context_length
from loop import preflight
from loop.settings import CLIENT, LoopSettings, gpu_groups, gpus_of, processes, refuse_other_kind

STAGES = ("generate", "annotate", "train", "evaluate")


class Run:
    """Paths, arguments and state of one run of the loop; ppo/run.py has that of PPO."""

    Settings = LoopSettings
    example = "bash run_loop.sh configs/loop_tiny.yaml"  # what a machine without GPUs can do

    def __init__(self, settings, planning=False):
        self.settings, self.folder, self.planning = settings, Path(settings.run_dir), planning
        path = self.folder / "loop.yaml"
        before = read_yaml(path).get("date") if settings.date is None and path.is_file() else None
        settings.date = settings.date or before or str(parse_date(None))

    def stages(self, i):
        """Names of iteration i's stages, in order; none behind the last iteration."""
        if i > self.settings.iterations:
            return ()
        return STAGES if i else ("evaluate",)

    def iterate(self, i):
        """The policy after iteration i; 0 is the start."""
        return self.settings.model_name_or_path if i == 0 else str(self.folder / f"iter{i}" / "model")

    def path(self, i, name):
        return str(self.folder / f"iter{i}" / name)

    def responses_job(self, i):
        """Sampling of iteration i's responses, by the previous iterate."""
        prompts = self.settings.prompts[(i - 1) % len(self.settings.prompts)]
        return {
            "dataset_name_or_path": prompts,
            "output_dir": self.path(i, "generated.jsonl"),
            "iteration": i,
        }

    def heldout_jobs(self, i):
        """Sampled and greedy answers of iterate i to the held-out prompts, which no iteration's seed
        meets.
        """
        common = {
            "dataset_name_or_path": self.settings.heldout_prompts,
            "iteration": -1,
        } | self.settings.heldout
        greedy = common | {"K": 1, "temperature": 0.0}
        return [
            common | {"output_dir": self.path(i, "heldout_sampled.generated.jsonl")},
            greedy | {"output_dir": self.path(i, "heldout_greedy.generated.jsonl")},
        ]

    def jobs(self, i):
        """All sampling that concerns iterate i, for the checks and the servers that do it."""
        return [self.responses_job(max(i, 1)), *self.heldout_jobs(i)]

    def generation(self, i, jobs):
        """Arguments of get_hf2.py for iterate i; `output_dir` of a job is still the merged file."""
        return (
            {"date": self.settings.date}
            | self.settings.generation
            | {"model_name_or_path": self.iterate(i), "seed": self.settings.seed, "jobs": jobs}
        )

    def annotation(self, files):
        """Arguments of get_rewards.py for a list of (generated, rewarded)."""
        models = self.settings.reward_name_or_path
        return (
            {"date": self.settings.date}
            | self.settings.annotation
            | ({"reward_name_or_path": models} if models else {})
            | {
                "dataset_name_or_path": [generated for generated, _ in files],
                "output_dir": [rewarded for _, rewarded in files],
            }
        )

    def judging(self, files):
        """Arguments of get_rewards.py with the second reward models."""
        return (
            {"date": self.settings.date}
            | self.settings.eval_annotation
            | {
                "reward_name_or_path": self.settings.eval_reward_model,
                "dataset_name_or_path": [generated for generated, _ in files],
                "output_dir": [judged for _, judged in files],
            }
        )

    def divergence(self, i):
        """Arguments of evaluation/divergence.py.

        The reference is the start, also where training's is the previous iterate.
        """
        sampled = self.settings.generation | self.settings.heldout
        shared = {
            key: sampled[key]
            for key in ("temperature", "top_p", "chat_template", "template_kwargs", "trust_remote_code")
            if key in sampled
        }
        return shared | {
            "dataset_name_or_path": self.path(i, "heldout_sampled.generated.jsonl"),
            "model_name_or_path": self.iterate(i),
            "ref_model_name_or_path": self.iterate(0),
            "output_dir": self.path(i, "divergence.jsonl"),
        }

    def training(self, i):
        """Arguments of run_dpo.py: the training YAML, then `training_args`, then how prompts are written and
        what the loop decides.
        """
        reference = self.iterate(0 if self.settings.reference == "initial" else i - 1)
        first = 1 if self.settings.train_on == "all" else i
        return self.as_sampled(read_yaml(self.settings.training) | self.settings.training_args) | {
            "model_name_or_path": self.iterate(i - 1),
            "ref_model_name_or_path": reference,
            "train_dir": [self.path(k, "rewarded.jsonl") for k in range(first, i + 1)],
            "output_dir": self.path(i, "model"),
            "pairs_path": self.path(i, "pairs.jsonl"),
            "seed": self.settings.seed,
            "reference_cache": str(
                self.folder / "reference_logps"
            ),  # iterations that share pairs and reference share it
        }

    def as_sampled(self, training):
        """Training's arguments with the template of generation: answers are trained on behind the prompts
        that they were sampled from.
        """
        sampled = self.settings.generation
        for key in ("chat_template", "template_kwargs"):
            if training.get(key) and training[key] != sampled.get(key):
                raise UserError(
                    f"training has {key} {training[key]!r} and generation {sampled.get(key)!r}: give it "
                    "once, in generation"
                )
        shared = ("chat_template", "template_kwargs", "revision", "trust_remote_code")
        return training | {key: sampled[key] for key in shared if sampled.get(key) and not training.get(key)}

    def rewarded_files(self, i, stage):
        """(generated, rewarded) files of a stage."""
        names = (
            ["generated"]
            if stage == "annotate"
            else ["heldout_sampled.generated", "heldout_greedy.generated"]
        )
        return [
            (self.path(i, f"{name}.jsonl"), self.path(i, name.replace("generated", "rewarded") + ".jsonl"))
            for name in names
        ]

    def judged_files(self, i):
        """(generated, judged) held-out files; none without a second reward model."""
        files = self.rewarded_files(i, "evaluate") if self.settings.eval_reward_model else []
        return [(generated, rewarded.replace(".rewarded.", ".judged.")) for generated, rewarded in files]

    def client(self, i, job):
        """Arguments of gen_hf.py for a job of iterate i; what shapes the engine goes to the servers."""
        known = gen_hf.Arguments.__dataclass_fields__
        shared = {
            key: value
            for key, value in ({"date": self.settings.date} | self.settings.generation).items()
            if key in known
        }
        return (
            shared | self.settings.servers | {"tokenizer": self.iterate(i), "seed": self.settings.seed} | job
        )

    def server_variables(self, jobs):
        """Settings of register_server.sh, so that servers answer these jobs as the engine of get_hf2.py
        would.
        """
        args = build(get_hf2.Arguments, self.generation(0, jobs), "generation")
        limit = context_length(args.model_name_or_path, args)  # of the start: later iterates have the same
        needed = max(job.max_input_length + job.max_new_tokens for job in get_hf2.split_jobs(args))
        names = (
            "dtype",
            "kv_cache_gib",
            "gpu_memory_utilization",
            "max_num_seqs",
            "tensor_parallel_size",
            "revision",
        )
        found = {
            "port": self.settings.server_port,
            "servers": len(gpu_groups(self.settings)),
            "max_model_len": min(needed, limit or needed),
        }
        found |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        return found | ({"trust_remote_code": "yes"} if args.trust_remote_code else {})

    def check_sampling(self):
        """Refuse wrong sampling arguments, of the responses and of the held-out answers."""
        jobs = self.jobs(0)
        args = build(get_hf2.Arguments, self.generation(0, jobs), "generation")
        for job in get_hf2.split_jobs(args):
            try:
                check_sampling(job)
            except UserError as error:  # a script's flags are keys of the section here
                raise UserError(re.sub(r"--(\w+)", r"--generation.\1", str(error))) from None
        self.check_servers(jobs)

    def check_servers(self, jobs):
        """Refuse settings of servers and client that cannot work."""
        for key in self.settings.servers:
            if key not in CLIENT:
                raise UserError(
                    f"unknown key {key!r} in servers{nearest(key, CLIENT)}; there are {', '.join(CLIENT)}"
                )
        args = [build(gen_hf.Arguments, self.client(0, job), "servers") for job in jobs][0]
        if args.concurrency < 1 or args.timeout <= 0 or args.retries < 0 or args.give_up_after <= 0:
            raise UserError(
                "servers: concurrency, timeout and give_up_after must be above 0 and retries not negative"
            )
        first, count = self.settings.server_port, len(gpu_groups(self.settings))
        if not 1 <= first <= 65536 - count:
            raise UserError(f"server_port {first}: {count} ports from there on must lie from 1 to 65535")

    def unfinished_jobs(self, model, jobs):
        """The jobs of iterate `model` whose answers are not there, whichever backend made them."""
        args = build(get_hf2.Arguments, self.generation(model, jobs), "generation")
        split = get_hf2.split_jobs(args)
        return [job for job, asked in zip(jobs, split) if not self.is_answer(asked)]

    def is_answer(self, asked):
        """Whether a job's answers are there.

        Those of servers are compared by what their client's manifest holds.
        """
        path, (settings, inputs) = asked.output_dir, get_hf2.shaping(asked)
        manifest = read_manifest(path)
        if manifest is None or manifest.get("script") != "generation/gen_hf.py":
            return self.is_done(path, settings, inputs)
        # The client does not know the dtype of its servers; the settings of the start that they were made in
        # do.
        dtype, begun = self.dtype_before(), Path(path).exists() or Path(f"{path}.partial").exists()
        if begun and dtype not in (None, asked.dtype):
            raise UserError(
                f"{path} was made with other settings: dtype was {dtype!r} and is now {asked.dtype!r}. Start "
                "another run with --run_dir"
            )
        settings = {
            key: value for key, value in settings.items() if key in manifest["settings"] or key != "dtype"
        }
        model = inputs.pop("model_name_or_path")
        return self.is_done(path, settings, inputs | {"tokenizer": model, "model": model})

    def dtype_before(self):
        """The engine's dtype in RUN/loop.yaml, which the last start that passed all checks has left; None
        without one.
        """
        path = self.folder / "loop.yaml"
        return (read_yaml(path).get("generation") or {}).get("dtype", "auto") if path.is_file() else None

    def is_left(self, files, judging=False):
        """Whether the rewards of a (generated, rewarded) pair are not there."""
        args = build(
            get_rewards.Arguments,
            (self.judging if judging else self.annotation)([files]),
            "eval_annotation" if judging else "annotation",
        )
        return not self.is_done(files[1], *get_rewards.shaping(args, files[0]))

    def is_done(self, path, settings, inputs):
        """Whether the output is complete and was made from what would be used now.

        Raises:
            UserError: it was made with other settings or inputs, which are named.
        """
        manifest = read_manifest(path)
        if manifest is None or not manifest.get("complete") or not (Path(path).exists() or self.pruned(path)):
            return False
        # Weights that were pruned cannot be compared; the stage that wrote them has been.
        inputs = {
            key: name for key, name in inputs.items() if not (isinstance(name, str) and self.pruned(name))
        }
        changed = difference(manifest, settings, inputs)
        if changed:
            raise UserError(
                f"{path} was made with other settings: {changed}. Start another run with --run_dir, "
                f"or delete what is to be made anew (this output and what comes after it)"
            )
        return True

    def pruned(self, path):
        """Whether these weights were deleted by `keep_iterates`."""
        return Path(f"{path}.pruned").exists()

    def stages_left(self):
        """Names such as 2.train of the stages that have something left; refuses changed settings that shaped
        what is there.
        """
        return [
            f"{i}.{stage}"
            for i in range(self.settings.iterations + 1)
            for stage in self.stages(i)
            if not self.is_stage_done(i, stage)
        ]

    def is_stage_done(self, i, stage):
        """Whether a stage has nothing left; a UserError as `is_done`."""
        if stage == "generate":
            return self.is_answered(i, stage)
        if stage == "annotate":
            return not self.files_left(i, stage)
        if stage == "train":
            return self.is_trained(i)
        left = self.files_left(i, stage) or self.judged_left(i) or self.divergence_left(i)
        return self.is_answered(i, stage) and not left and self.is_measured(i)

    def is_answered(self, i, stage):
        """Whether the prompts of a stage have their merged answers."""
        return not (
            self.unfinished_jobs(i - 1, [self.responses_job(i)])
            if stage == "generate"
            else self.unfinished_jobs(i, self.heldout_jobs(i))
        )

    def is_measured(self, i):
        """Whether iterate i's metrics are there, with the gold function of now."""
        try:
            metrics = json.loads(Path(self.path(i, "metrics.json")).read_text(encoding="utf-8"))
            return metrics["gold_function"] == self.settings.gold_function and (
                "judge" in metrics or not self.settings.eval_reward_model
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def files_left(self, i, stage):
        """The (generated, rewarded) files of a stage whose rewards are not there."""
        return [files for files in self.rewarded_files(i, stage) if self.is_left(files)]

    def judged_left(self, i):
        """The (generated, judged) files of iterate i that are not there."""
        return [files for files in self.judged_files(i) if self.is_left(files, judging=True)]

    def divergence_left(self, i):
        """Whether iterate i's KL is not there and can be estimated: of sampled answers, by weights that are
        still kept.
        """
        given = self.divergence(i)
        if not self.settings.divergence or self.pruned(self.iterate(i)) or given.get("temperature", 1.0) == 0:
            return False
        args = build(divergence.Arguments, given, "generation")
        return (
            not self.is_done(args.output_dir, *divergence.shaping(args))
            or not divergence.summary_path(args.output_dir).exists()
        )

    def is_trained(self, i):
        """Whether iteration i's model is there."""
        args = dpo.arguments(self.training(i), self.settings.training)
        wanted = dpo.training_of(args, processes(self.settings))
        return self.is_done(args.output_dir, wanted.settings, wanted.inputs)

    def steps(self, i, stage, settings_dir=None):
        """What is left of a stage; writes the YAML of each step into `settings_dir`/iterI, by default the
        run's own folder.

        Returns:
            (steps out of generate, serve, annotate, judge, divergence, train, metrics; list of (shard prefix,
            merged file) to merge, or of (client's YAML, answers) to ask servers for).
        """
        settings_dir = Path(settings_dir or self.folder)
        folder = settings_dir / f"iter{i}"
        folder.mkdir(parents=True, exist_ok=True)
        left, jobs, answers = [], [], []
        ahead = i + 1 if stage == "evaluate" and "generate" in self.stages(i + 1) else None
        if stage in ("generate", "evaluate"):
            model = i - 1 if stage == "generate" else i
            jobs = self.unfinished_jobs(
                model, [self.responses_job(i)] if stage == "generate" else self.heldout_jobs(i)
            )
            if jobs and ahead:
                jobs += self.unfinished_jobs(model, [self.responses_job(ahead)])
        if jobs and self.settings.generation_backend == "servers":
            outputs = [Path(job["output_dir"]) for job in jobs]
            answers = [
                (str(settings_dir / path.parent.name / f"{path.stem}.yaml"), str(path)) for path in outputs
            ]
            for job, (path, _) in zip(jobs, answers):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_yaml(path, self.client(model, job))
            left.append("serve")
        elif jobs:
            world = len(gpu_groups(self.settings))
            answers = [(shard_prefix(job["output_dir"], world), job["output_dir"]) for job in jobs]
            sharded = [job | {"output_dir": prefix} for job, (prefix, _) in zip(jobs, answers)]
            write_yaml(folder / f"{stage}.yaml", self.generation(model, sharded))
            left.append("generate")
        if stage in ("annotate", "evaluate"):
            new = {made for _, made in answers}
            files = self.rewarded_files(i, stage)
            if ahead and self.path(ahead, "generated.jsonl") in new:
                files += self.rewarded_files(ahead, "annotate")
            files = [f for f in files if f[0] in new or self.is_left(f)]
            if files:
                write_yaml(
                    folder / ("annotate.yaml" if stage == "annotate" else "evaluate_rewards.yaml"),
                    self.annotation(files),
                )
                left.append("annotate")
        if stage == "train" and not self.is_trained(i):
            write_yaml(folder / "train.yaml", self.training(i))
            left.append("train")
        if stage == "evaluate":
            self.other_judges(i, folder, {made for _, made in answers}, left)
        if stage == "evaluate" and (left or not self.is_measured(i)):
            left.append("metrics")
        return left, answers

    def other_judges(self, i, folder, new, left):
        """Append the steps judge and divergence to `left` where they are left; `new`: answers that this stage
        makes.
        """
        files = [
            files for files in self.judged_files(i) if files[0] in new or self.is_left(files, judging=True)
        ]
        if files:
            write_yaml(folder / "evaluate_judge.yaml", self.judging(files))
            left.append("judge")
        if self.divergence_left(i):
            write_yaml(folder / "divergence.yaml", self.divergence(i))
            left.append("divergence")


def shard_prefix(merged, world):
    """`iter1/generated.jsonl`, 8 → `iter1/shards/generated.of8.`, to which get_hf2.py adds `0.jsonl`.

    The number of shards is in the name, so that a run that was stopped may go on with other GPUs.
    """
    path = Path(merged)
    return str(path.parent / "shards" / f"{path.stem}.of{world}.")


def load(settings_dir, kind=Run):
    """The run, of class `kind`, whose settings stand in `settings_dir`/loop.yaml: the run's own folder, but
    for a dry run.
    """
    return kind(
        build(
            kind.Settings,
            read_yaml(Path(settings_dir) / "loop.yaml", "run (its loop.yaml)"),
            f"{settings_dir}/loop.yaml",
        )
    )


def setup(kind, description, argv):
    """Print what the driver needs before the checks, which need what the setup command builds."""
    settings = parse(kind.Settings, description, argv)
    if not settings.run_dir.strip():
        raise UserError("run_dir is empty; name a folder, for example --run_dir runs/mine")
    refuse_other_kind(settings)
    if not settings.without_gpu and not gpus_of(settings):
        raise UserError(
            f"this run needs GPUs and {none_visible()}: `without_gpu: true` in its YAML (or --without_gpu "
            "true) lets it use the CPU, which is for "
            "small models; to plan it for GPUs elsewhere: --check --num_gpus 8 --gpu_memory_gib 80; the "
            f"same on tiny models: {kind.example}"
        )
    print(
        f"run_dir={shlex.quote(settings.run_dir)}\nsetup_command={shlex.quote(settings.setup_command or '')}"
    )
    return settings


def settle(current, left, settings_dir):
    """Write `settings_dir`/loop.yaml, now that all checks have passed, and print what the steps of both
    drivers need.
    """
    settings = current.settings
    if settings_dir:
        Path(settings_dir).mkdir(parents=True, exist_ok=True)
        write_yaml(Path(settings_dir) / "loop.yaml", dataclasses.asdict(settings))
    groups = " ".join(shlex.quote(group) for group in gpu_groups(settings))
    print(
        f"judge={'yes' if settings.eval_reward_model else 'no'}\nreport={'yes' if settings.report else 'no'}"
    )
    print(f"trackers=({' '.join(shlex.quote(name) for name in settings.report_to or ())})")
    print(
        f"processes={processes(settings)}\ngpu_groups=({groups})\nleft='{' '.join(left)}'\ngold_function={shlex.quote(settings.gold_function or '')}"
    )


def prepare(settings_dir, argv):
    """Check everything that can be known now, write loop.yaml, and print what run_loop.sh needs as shell
    variables.
    """
    settings = parse(LoopSettings, __doc__, argv)
    current = Run(settings, planning=is_planning(settings, settings_dir))
    settle(current, preflight.check(current), settings_dir)
    print(
        f"iterations={settings.iterations}\nkeep_iterates={'' if settings.keep_iterates is None else settings.keep_iterates}"
    )
    print(f"accelerate_config={shlex.quote(settings.accelerate_config)}")


def is_planning(settings, settings_dir):
    """Whether nothing is to run (--check, --dry_run); refuses other GPUs than those that are here where
    something is.
    """
    planning = not settings_dir or Path(settings_dir).resolve() != Path(settings.run_dir).resolve()
    if not planning and (settings.num_gpus or settings.gpu_memory_gib):
        raise UserError(
            "num_gpus and gpu_memory_gib are for --check and --dry_run: a run takes the GPUs that it sees "
            "(CUDA_VISIBLE_DEVICES)"
        )
    return planning


def todo(current, i, stage, settings_dir):
    """Print what is left of a stage as shell variables."""
    steps, answers = current.steps(i, stage, settings_dir)
    print(f"steps=({' '.join(steps)})")
    print(f"answers=({' '.join(shlex.quote(word) for pair in answers for word in pair)})")
    if "serve" in steps:
        variables = current.server_variables(current.jobs(i))
        print(f"serving={shlex.quote(current.iterate(i - (stage == 'generate')))}")
        print(
            f"server_settings=({' '.join(shlex.quote(f'{name}={value}') for name, value in variables.items())})"
        )
        print(f"ports=({' '.join(str(variables['port'] + k) for k in range(variables['servers']))})")


def prune(run_dir, i):
    """Delete the weights of iterates before the last `keep_iterates`, never the one that training starts
    from.

    Nothing is deleted before iteration i has nothing left to do: until then its stages read the weights
    before.
    """
    current = load(run_dir)
    keep = current.settings.keep_iterates
    if keep is None or any(int(name.split(".")[0]) <= i for name in current.stages_left()):
        return
    for old in range(1, i - keep + 1):
        folder = Path(current.iterate(old))
        if folder.is_dir() and current.settings.model_name_or_path != str(folder):
            Path(f"{folder}.pruned").touch()
            shutil.rmtree(folder)
            print(f"pruned {folder} (keep_iterates {keep})")


def main():
    commands = {"prepare": 1, "setup": 1, "todo": 4, "prune": 3}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in commands:
        raise UserError(f"unknown command {name!r}{nearest(name, commands)}; see the top of loop/run.py")
    if name == "prepare":
        settings_dir, *rest = (
            sys.argv[2:] if sys.argv[2:3] not in ([], ["-h"], ["--help"]) else ["", "--help"]
        )
        prepare(settings_dir, rest)
    elif name == "setup":
        setup(Run, __doc__, sys.argv[2:])
    elif name == "todo":
        todo(load(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[2])
    else:
        prune(sys.argv[2], int(sys.argv[3]))


if __name__ == "__main__":
    run(main)
