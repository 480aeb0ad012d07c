"""Arguments: YAML below the command line, types, and errors that say what to do."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common.cli import UserError, arg, count, existing_file, parse, parse_jobs, read_yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(kw_only=True)
class Arguments:
    model: str = arg(help="the model")
    lr: float = arg(1e-3, "step size")
    steps: int = arg(10, "how many; 100% of them")
    packed: bool = arg(False, "pack rows")
    ports: list[int] = arg([8000], "ports")
    limit: int | None = arg(None, "or none")
    more: dict = arg({}, "more settings")
    mode: str = arg("a", "which", choices=["a", "b"])


def args(*argv):
    return parse(Arguments, "what it does", list(argv))


def refusal(*argv):
    with pytest.raises(UserError) as caught:
        args(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_then_yaml_then_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\nlr: 5e-7\nsteps: 3\nports: [1, 2]\nmore: {x: 1}\npacked: yes\nlimit: null\n")
    got = args(str(config), "--steps", "4")
    assert got == Arguments(model="m", lr=5e-7, steps=4, ports=[1, 2], more={"x": 1}, packed=True)
    assert type(got.lr) is float  # PyYAML itself reads 5e-7 as a string
    assert args("--model", "m").ports is not args("--model", "m").ports


@pytest.mark.parametrize(
    "argv, field, value",
    [
        ("--lr 1", "lr", 1.0),
        ("--steps -1", "steps", -1),
        ("--steps=7", "steps", 7),
        ("--packed", "packed", True),
        ("--packed 0", "packed", False),
        ("--ports 1 2", "ports", [1, 2]),
        ("--ports", "ports", []),
        ("--ports [1,2]", "ports", [1, 2]),
        ("--limit 5", "limit", 5),
        ("--limit none", "limit", None),
        ('--more {"a":false}', "more", {"a": False}),
    ],
)
def test_types(argv, field, value):
    got = getattr(args("--model", "m", *argv.split()), field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--model m --lr fast", "--lr: 'fast' is not a number"),
        ("--model m --steps 1.5", "--steps: '1.5' is not a whole number"),
        ("--model m --packed perhaps", "is not true or false"),
        ("--model m --ports a", "--ports: 'a' is not a whole number"),
        ("--model m --more [1]", "is not a mapping"),
        ("--model m --more {", "is not a mapping"),
        ("--model m --mode c", "'c' is not one of a, b"),
        ("--model m --stepz=3", "unknown argument --stepz, did you mean '--steps'"),
        ("--model m --zzzzzz 3", "unknown argument --zzzzzz"),
        ("--model m --steps", "--steps"),
        ("--model m no_such.yaml", "no such YAML file: no_such.yaml"),
        ("", "missing --model: the model"),
    ],
)
def test_refusals(argv, told):
    assert told in refusal(*argv.split())


@dataclasses.dataclass(kw_only=True)
class Training:
    beta: float = arg(0.1, "tie to the reference")
    way: str = arg("new", "which", choices=["new", "all"])


@dataclasses.dataclass(kw_only=True)
class Sampling:
    K: int = arg(8, "responses per prompt")
    train_dir: list[str] = arg([], "files", metavar="FILE")


@dataclasses.dataclass(kw_only=True)
class Settings:
    rounds: int = arg(1, "rounds")
    generation: dict = arg({}, "of sampling")
    heldout: dict = arg({}, "of sampling, too")
    training_args: dict = arg({}, "of training")

    sections = {"generation": Sampling, "heldout": Sampling, "training_args": Training}


OPTION = "--training_args.beta"


@pytest.mark.parametrize(
    "text, argv, told",
    [
        ("", f"{OPTION}ta 1", f"unknown argument {OPTION}ta, did you mean '{OPTION}'?"),
        ("", '--training_args {"beta_":1}', f"unknown argument {OPTION}_, did you mean '{OPTION}'?"),
        ("training_args: {betta: 1}", "", "unknown key 'betta' in training_args of {}, did you mean 'beta'?"),
        ("", f"{OPTION} small", f"{OPTION}: 'small' is not a number"),
        ("training_args: {way: old}", "", "training_args.way in {}: 'old' is not one of new, all"),
        ("generation: {k: 4}", "", "unknown key 'k' in generation of {}, did you mean 'K'?"),
        (
            "generation: {beta: 4}",
            "",
            "unknown key 'beta' in generation of {}, did you mean training_args.beta?",
        ),
        ("heldout: {rounds: 4}", "", "unknown key 'rounds' in heldout of {}, did you mean rounds?"),
        ("heldout: {zzz: 4}", "", "unknown key 'zzz' in heldout of {}"),
    ],
)
def test_what_is_wrong_in_a_section_is_said_where_it_was_written(tmp_path, text, argv, told):
    config = tmp_path / "c.yaml"
    config.write_text(text + "\nrounds: 3\n")
    got = parse(Settings, "", [str(config), *argv.split()])
    assert got.problems == [told.format(config)]
    assert (got.rounds, got.generation, got.heldout, got.training_args) == (3, {}, {}, {})


def test_all_that_is_wrong_in_sections_is_told_and_what_is_right_is_kept(tmp_path):
    got = parse(Settings, "", f"--generation.k 4 --generation.K 2 {OPTION}ta 1 {OPTION} 0.2".split())
    assert len(got.problems) == 2 and got.generation == {"K": 2} and got.training_args == {"beta": 0.2}


@pytest.mark.parametrize(
    "key, meant", [("k", "{}generation.K"), ("Beta", "{}training_args.beta"), ("Rounds", "'{}rounds'")]
)
def test_a_key_outside_its_section_is_told_the_section(tmp_path, key, meant):
    config = tmp_path / "c.yaml"
    config.write_text(f"{key}: 4\n")
    for argv, lead in (([str(config)], ""), ([f"--{key}", "4"], "--")):
        with pytest.raises(UserError) as caught:
            parse(Settings, "", argv)
        assert str(caught.value).endswith(f", did you mean {meant.format(lead)}?")


LOOP = """
rounds: 2
heldout: {K: 4, train_dir: null, dtype: float32}
generation: {K: 8, dtype: float32}
wrong: {k: 8}
"""


@dataclasses.dataclass(kw_only=True)
class Engine:
    K: int = arg(8, "responses per prompt")
    dtype: str = arg("auto", "of the engine")
    output_dir: str | None = arg(None, "where to")
    limit: int | None = arg(None, "or none")
    train_dir: list[str] = arg([], "files")

    per_job = ("K", "output_dir")


@dataclasses.dataclass(kw_only=True)
class Client(Sampling):
    ports: list[int] = arg([8000], "ports")

    shares_section = Engine


@pytest.fixture
def loop_yaml(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(LOOP)
    return str(path)


def test_a_section_of_a_yaml_is_read_as_a_file(loop_yaml):
    assert parse(Engine, "", [f"{loop_yaml}:heldout", "--dtype", "auto"]) == Engine(K=4)
    assert parse(Client, "", [f"{loop_yaml}:heldout"]) == Client(K=4)  # dtype is the engine's
    whole = Path(f"{loop_yaml}:heldout")  # a file of that name is no section
    whole.write_text("K: 1\n")
    assert parse(Engine, "", [str(whole)]) == Engine(K=1)


@pytest.mark.parametrize(
    "cls, sections, told",
    [
        (Engine, "helduot", "has no section 'helduot', did you mean 'heldout'?; its sections: heldout, gen"),
        (Engine, "rounds", "has no section 'rounds'"),
        (Engine, "wrong", "unknown key 'k' in .*loop.yaml:wrong, did you mean 'K'?"),
        (Sampling, "heldout", "unknown key 'dtype' in .*loop.yaml:heldout"),
        (Engine, "heldout,generation", "names 2 sections, this script takes one"),
    ],
)
def test_refused_sections(loop_yaml, cls, sections, told):
    with pytest.raises(UserError, match=told.replace("?", "[?]")):
        parse(cls, "", [f"{loop_yaml}:{sections}"])
    with pytest.raises(UserError, match="no such YAML file: .*lop.yaml; there is .*loop.yaml"):
        parse(cls, "", [f"{loop_yaml.replace('loop.yaml', 'lop.yaml')}:{sections}"])


def test_one_value_for_all_jobs_or_one_per_job(loop_yaml):
    def jobs(*argv):
        return [(job.K, job.dtype, job.output_dir) for job in parse_jobs(Engine, "", argv)]

    assert jobs() == [(8, "auto", None)]
    assert jobs("--output_dir", "a", "b", "--K=4") == [(4, "auto", "a"), (4, "auto", "b")]
    both = jobs(f"{loop_yaml}:heldout,generation", "--output_dir", "a", "b")
    assert both == [(4, "float32", "a"), (8, "float32", "b")]
    assert jobs(f"{loop_yaml}:heldout", "--K", "4", "1") == [(4, "float32", None), (1, "float32", None)]
    for argv, told in (
        (["--K", "1", "2", "--output_dir", "a", "b", "c"], "--K gives 2 and --output_dir 3"),
        ([f"{loop_yaml}:heldout,heldout", "--K", "1", "2", "3"], "heldout,heldout gives 2 and --K 3"),
        (["--K", "1", "x"], "--K: 'x' is not a whole number"),
    ):
        with pytest.raises(UserError, match=told):
            jobs(*argv)


@pytest.mark.parametrize(
    "text, told",
    [
        ("stepz: 3\n", "unknown key 'stepz' in {}, did you mean 'steps'?"),
        ("model: m\nsteps: 1.5\n", "steps in {}: 1.5 is not a whole number"),
        ("- a\n", "it holds a list"),
        ("model: [\n", "not valid YAML"),
        ("model: m\nlr: true\n", "lr in {}: True is not a number"),
        ("model: m\nsteps: [1]\n", "steps in {}: [1] is not a whole number"),
        ("model: m\nsteps: null\n", "steps in {} needs a value"),
        ("model: {a: 1}\n", "model in {}"),
    ],
)
def test_yaml_refusals(tmp_path, text, told):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert told.format(config) in refusal(str(config))


def test_an_empty_yaml_is_no_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "c.yaml") == {}


SCRIPT = textwrap.dedent("""
    import dataclasses, os, signal
    from common.cli import UserError, arg, parse, run
    @dataclasses.dataclass(kw_only=True)
    class Arguments:
        how: str = arg("well", "50% of it")
        kind: str = arg("plain", "which", ("plain", "other"))
    def main():
        how = parse(Arguments, "Ends as told.").how
        if how == "refused": raise UserError("no; do that")
        if how == "full": raise OSError(28, "No space left on device")
        if how == "stopped": raise KeyboardInterrupt
        if how == "bug": raise OSError("a bug")
        print("x" * 200_000)
    run(main)
""")


def ended(how, script=SCRIPT, **environment):
    """(exit status, lines on stderr) of the script."""
    command = [sys.executable, "-c", script, "--how", how]
    end = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return end.returncode, end.stderr.splitlines()


def test_how_a_script_ends():
    assert ended("refused") == (2, ["error: no; do that"])
    assert ended("stopped") == (130, ["stopped; start the same command again to continue"])
    status, [line] = ended("full")
    assert status == 2 and line.startswith(
        "error: No space left on device; what is on disk is kept, start the"
    )
    status, lines = ended("bug")
    assert status == 1 and lines[0].startswith("Traceback")


def test_how_another_rank_ends():
    """It is silent where all ranks meet the same; an error of it alone it tells itself."""
    assert ended("stopped", RANK="1") == (130, [])
    script = SCRIPT.replace("run(main)", "import common.errors; common.errors.ERROR_SECONDS = 0.1; run(main)")
    assert ended("refused", RANK="1", script=script) == (2, ["error: no; do that"])


def test_an_error_of_all_ranks_is_told_once_however_late_rank_0_is(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from common import cli\n"
        "def main():\n"
        "    time.sleep(2 * (os.environ['RANK'] == '0'))\n"
        "    raise cli.UserError('no; do that')\n"
        "cli.run(main)\n"
    )
    launcher = "-m torch.distributed.run --nproc_per_node 2 --master_port 0".split()
    end = subprocess.run([sys.executable, *launcher, script], capture_output=True, text=True)
    assert end.returncode != 0 and end.stderr.splitlines().count("error: no; do that") == 1


def test_help_and_a_closed_pipe():
    command = f"'{sys.executable}' -c \"$0\" | head -c 1; exit ${{PIPESTATUS[0]}}"
    end = subprocess.run(["bash", "-c", command, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 141 and end.stderr == ""


@pytest.mark.parametrize("text, named", [
    ("a: 1\nb:\n  - {c: 1, c: 2}\n", "'c' is given twice, in lines 3 and 3"),
    ("a: 1\n'a': 2\n", "'a' is given twice, in lines 1 and 2"),
    ("on: 1\ntrue: 2\n", "True is given twice"),
    ("base: &base {a: 1}\nmine: {<<: *base, a: 2, b: 3}\n", None),
    ("one: {a: 1}\ntwo: {a: 2}\n", None),
    ("{a: 1}: 2\n", "found unhashable key"),
])  # fmt: skip
def test_a_key_given_twice(tmp_path, text, named):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    if named is None:
        assert len(read_yaml(path)) == 2
    else:
        with pytest.raises(UserError, match=f"a.yaml is not valid YAML: .*{named}"):
            read_yaml(path)


def test_a_missing_file_is_offered_what_can_be_meant(tmp_path):
    mine = ["mine/prompts.jsonl", "mine/heldout.jsonl", "mine/notes.txt"]
    for name in [*mine, "other/gen_7_2_all.jsonl", "other/base.yaml"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def refused(name, *besides):
        with pytest.raises(UserError) as caught:
            existing_file(tmp_path / name, besides=besides)
        return str(caught.value).split(str(tmp_path / name), 1)[1].replace(f"{tmp_path}/", "")

    assert refused("mine/heldot.jsonl") == "; there is mine/heldout.jsonl"
    # neither is alike
    assert refused("mine/nothing.jsonl") == "; there are mine/heldout.jsonl, mine/prompts.jsonl"
    assert refused("mine/nothing.jsonl", tmp_path / "mine/prompts.jsonl") == "; there is mine/heldout.jsonl"
    assert refused("mine/prompt.jsonl", tmp_path / "mine/prompts.jsonl") == "; there is mine/heldout.jsonl"
    assert refused("othr/base.yaml") == refused("mine/base.yml") == "; there is other/base.yaml"
    assert refused("data/gen_data.jsonl") == ""
    with pytest.raises(UserError, match="is a folder, a file was expected"):
        existing_file(tmp_path)


def test_values_are_called_by_their_meaning(capsys):
    def said(cls):
        with pytest.raises(SystemExit):
            parse(cls, "Ends\n    as told.", ["--help"])
        return capsys.readouterr().out

    assert "--K N " in said(Sampling) and "--train_dir FILE ..." in said(Sampling)
    shown = said(Arguments)
    assert (
        "Ends\n    as told." in shown
        and "how many; 100% of them [10]" in shown
        and "which (a, b) [a]" in shown
    )
    for option in (
        "--model NAME",
        "--lr X",
        "--packed [true|false]",
        "--ports N ...",
        "--more JSON",
        "--mode a|b",
    ):
        assert f"  {option} " in shown or f"  {option}\n" in shown, shown


def test_help_prints_each_scripts_text_as_it_is_written():
    """A backslash at a line's end would join the lines of an example, were the docstring not raw."""
    for path in sorted(ROOT.glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text and path.parent.name != "tests":
            assert ast.get_docstring(ast.parse(text), clean=False) == text.split('"""')[1], path


def test_counts_agree_with_their_nouns():
    assert [count(n, "response") for n in (0, 1, 2)] == ["0 responses", "1 response", "2 responses"]
    assert count(2, "process") == "2 processes" and count(2, "entry", "entries") == "2 entries"


def test_help_of_the_servers_lists_every_variable_with_its_default():
    script = ROOT / "generation/register_server.sh"
    head = script.read_text(encoding="utf-8").split("root=")[0]
    variables = re.findall(r'^\w+="\$\{(\w+):-(.*?)\}"', head, re.MULTILINE)
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    assert len(variables) > 15
    for name, default in variables:
        assert re.search(rf"^  {name}={re.escape(default)} +\w", done.stdout, re.MULTILINE), name
