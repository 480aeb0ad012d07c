"""Arguments: YAML below the command line, types, and errors that say what to do."""

import dataclasses
import subprocess
import sys
import textwrap

import pytest

from common.cli import UserError, arg, existing_file, parse, read_yaml


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


@pytest.mark.parametrize("argv, field, value", [
    (["--lr", "5e-7"], "lr", 5e-7), (["--lr", "1"], "lr", 1.0), (["--steps", "-1"], "steps", -1), (["--steps=7"], "steps", 7),
    (["--packed"], "packed", True), (["--packed", "false"], "packed", False), (["--packed", "0"], "packed", False),
    (["--ports", "1", "2"], "ports", [1, 2]), (["--ports"], "ports", []), (["--ports", "[1, 2]"], "ports", [1, 2]), (["--limit", "5"], "limit", 5),
    (["--limit", "none"], "limit", None), (["--more", '{"a": false}'], "more", {"a": False}), (["--mode", "b"], "mode", "b"),
])  # fmt: skip
def test_types(argv, field, value):
    got = getattr(args("--model", "m", *argv), field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv, words", [
    (["--lr", "fast"], ["--lr", "'fast'", "float"]), (["--steps", "1.5"], ["--steps", "whole number"]),
    (["--packed", "perhaps"], ["true or false"]), (["--ports", "a"], ["--ports", "'a'"]), (["--more", "[1]"], ["mapping"]),
    (["--more", "{"], ["mapping"]), (["--mode", "c"], ["'c'", "a, b"]), (["--step", "3"], ["--step", "did you mean '--steps'"]),
    (["--stepz=3"], ["--stepz", "'--steps'"]), (["--zzzzzz", "3"], ["unknown argument --zzzzzz"]), (["--steps"], ["--steps"]),
    (["no_such.yaml"], ["no_such.yaml"]),
])  # fmt: skip
def test_refusals(argv, words):
    message = refusal("--model", "m", *argv)
    for word in words:
        assert word in message


def test_a_missing_argument_says_what_it_is():
    assert "--model" in refusal() and "the model" in refusal()


@pytest.mark.parametrize("text, words", [
    ("stepz: 3\n", ["'stepz'", "'steps'"]), ("model: m\nsteps: 1.5\n", ["steps", "whole number"]), ("- a\n", ["list"]),
    ("model: [\n", ["not valid YAML", "line"]), ("model: m\nlr: true\n", ["lr"]), ("model: m\nsteps: null\n", ["steps in", "needs a value"]),
    ("model: m\nmode: z\n", ["a, b"]), ("model: {a: 1}\n", ["model"]),
])  # fmt: skip
def test_yaml_refusals(tmp_path, text, words):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    message = refusal(str(config))
    for word in words:
        assert word in message


def test_an_empty_yaml_is_no_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "c.yaml") == {}


def test_nearest_file(tmp_path):
    (tmp_path / "training.yaml").write_text("")
    with pytest.raises(UserError, match="training.yaml"):
        existing_file(tmp_path / "trainin.yaml")
    with pytest.raises(UserError, match="folder"):
        existing_file(tmp_path)


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


@pytest.mark.parametrize("how, status, lines", [
    ("well", 0, []), ("refused", 2, ["error: no; do that"]), ("stopped", 130, ["stopped; start the same command again to continue"]),
    ("full", 2, ["error: No space left on device; what is on disk is kept, start the same command again after mending it"]),
])  # fmt: skip
def test_how_a_script_ends(repo, how, status, lines):
    end = subprocess.run([sys.executable, "-c", SCRIPT, "--how", how], cwd=repo, capture_output=True, text=True)
    assert (end.returncode, end.stderr.splitlines()) == (status, lines)


def test_a_bug_keeps_its_traceback_and_other_ranks_are_silent(repo, monkeypatch):
    end = subprocess.run([sys.executable, "-c", SCRIPT, "--how", "bug"], cwd=repo, capture_output=True, text=True)
    assert end.returncode == 1 and "Traceback" in end.stderr
    monkeypatch.setenv("RANK", "1")
    end = subprocess.run([sys.executable, "-c", SCRIPT, "--how", "stopped"], cwd=repo, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (130, "")


@pytest.mark.parametrize("late", [0, 1])
def test_an_error_of_all_ranks_is_told_once_however_late_rank_0_is(repo, tmp_path, late):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(repo)!r})\n"
        "from common import cli\n"
        "def main():\n"
        f"    time.sleep(2 * (os.environ['RANK'] == '{late}'))\n"
        "    raise cli.UserError('no; do that')\n"
        "cli.run(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", script]
    end = subprocess.run(command, capture_output=True, text=True)
    assert end.returncode != 0 and end.stderr.splitlines().count("error: no; do that") == 1


def test_an_error_of_one_rank_alone_is_told_by_it(repo, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    script = SCRIPT.replace("run(main)", "import common.cli; common.cli.ERROR_SECONDS = 0.1; run(main)")
    end = subprocess.run([sys.executable, "-c", script, "--how", "refused"], cwd=repo, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (2, "error: no; do that\n")


def test_help_and_a_closed_pipe(repo):
    end = subprocess.run([sys.executable, "-c", SCRIPT, "--help"], cwd=repo, capture_output=True, text=True)
    assert end.returncode == 0 and "50% of it" in end.stdout and "Ends as told." in end.stdout
    assert "which (plain, other) [plain]" in end.stdout
    command = f"'{sys.executable}' -c \"$0\" | head -c 1; exit ${{PIPESTATUS[0]}}"
    end = subprocess.run(["bash", "-c", command, SCRIPT], cwd=repo, capture_output=True, text=True)
    assert end.returncode == 141 and end.stderr == ""


@pytest.fixture
def repo(request):
    return request.config.rootpath


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
