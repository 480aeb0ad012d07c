"""Write one HTML page about a run, or several side by side: rewards, win rates, length, drift, training,
time, samples.

In:  the folders of runs (run_loop.sh, run_ppo.sh), finished or not.
Out: one file that opens without a network, in light and dark; what a run has not got is named on it. Beside
     it `….warnings.json`, its warnings.

    python report/make_report.py runs/tiny                   # writes runs/tiny/report/index.html
    python report/make_report.py runs/tiny runs/ppo_tiny --output_dir report/index.html

Files are read line by line and texts are kept of a seeded sample only, so that memory does not follow the
run's size.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError, arg, count
from common.manifest import write_json, write_text
from common.run_folder import RunFolder, warnings_of


@dataclass
class Arguments:
    runs: list[str] | None = arg(None, "folders of the runs; may be given without --runs")
    output_dir: str | None = arg(
        None, "file to write (a file name); None: RUN/report/index.html of a single run"
    )
    gold_function: str | None = arg(None, "FILE.py:NAME; None: the one that the run's metrics were made with")
    use_gold: bool = arg(
        True,
        "call the gold function for intervals of gold; false: take the averages of metrics.json, run no code "
        "of others",
    )
    samples: int = arg(200, "held-out prompts to read in the page, and half as many an iteration of training")
    sample_megabytes: float = arg(6.0, "most that they may take, MB")
    seed: int = arg(0, "seed of the sample")
    bounds: dict = arg({}, "of the warnings, JSON: '{\"length_growth\": 2}'; see report/troubles.py")


def arguments(argv: list[str]) -> Arguments:
    """Arguments of the command line, where the folders stand first, without a name."""
    folders = []
    while argv and not argv[0].startswith("-"):
        folders, argv = [*folders, argv[0]], argv[1:]
    if folders and folders[0].endswith((".yaml", ".yml")) and len(folders) == 1:
        return cli.parse(Arguments, __doc__, folders + argv)
    args = cli.parse(Arguments, __doc__, argv)
    args.runs = folders + (args.runs or [])
    return args


def check(args: Arguments) -> tuple:
    """Refuse what cannot work; returns the file to write and the bounds."""
    from report.troubles import Bounds

    if not args.runs:
        raise UserError("no run was given: python report/make_report.py runs/NAME")
    if len({Path(folder).resolve() for folder in args.runs}) < len(args.runs):
        raise UserError("the same run was given twice")
    if args.output_dir is None and len(args.runs) > 1:
        raise UserError("several runs: say where the page goes, for example --output_dir report/index.html")
    if args.samples < 0 or args.sample_megabytes < 0:
        raise UserError("samples and sample_megabytes must not be negative")
    bounds = cli.build(Bounds, args.bounds, "bounds")
    target = Path(args.output_dir) if args.output_dir else RunFolder(args.runs[0]).page
    if target.is_dir():
        raise UserError(
            f"--output_dir {target} is a folder, a file name was expected (for example {target}/index.html)"
        )
    return target, bounds


def make(args: Arguments) -> tuple:
    """Read the runs, compute, write the page.

    Returns (file, warnings, what is not there), the latter two with the name of the run.
    """
    from common.hide import hidden
    from report import figures, page, run_data, samples, state, troubles

    target, bounds = check(args)
    keep = max(run_data.KEEP_TEXTS, args.samples)
    runs = [
        run_data.read_run(folder, args.gold_function, args.seed, keep, args.use_gold) for folder in args.runs
    ]
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, args.runs):
            run.name = str(folder)
    found = [figures.of_run(run) for run in runs]
    warned = [troubles.find(of, bounds) for of in found]
    shown = samples.collect(runs, args.samples, args.sample_megabytes, args.seed)
    states = [(one.word, hidden(one.detail)) for one in (state.read_state(run.folder) for run in runs)]
    text = page.render(found, warned, shown, states)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a setting or a name may hold half a surrogate pair
    write_text(target, text.encode("utf-8", "replace").decode("utf-8"))
    warned = [(run.name, trouble) for run, listed in zip(runs, warned, strict=True) for trouble in listed]
    write_json(warnings_of(target), [{"run": name} | dataclasses.asdict(trouble) for name, trouble in warned])
    return target, warned, [(run.name, text) for run in runs for text in run.missing]


def main():
    args = arguments(sys.argv[1:])
    check(args)
    target, warned, missing = make(args)
    for name, trouble in warned:
        print(f"warning: {name}, {trouble.where}: {trouble.title.lower()}: {trouble.figure}")
    for name, text in missing:
        print(f"not there: {name}: {text}")
    print(
        f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB) from {count(len(args.runs), 'run')}, "
        f"{count(len(warned), 'warning')}"
    )


if __name__ == "__main__":
    cli.run(main)
