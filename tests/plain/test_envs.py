"""envs.sh: made once, remade when cut off or changed, foreign ones left alone; by venv and by a stand-in for conda.

Conda cannot be had on the project's machines. `CONDA` below stands in for it with conda's calling convention as documented
(`conda env list`, `conda create -y -n`, `conda env remove -y -n`, `conda shell.bash hook`, `conda activate`); it makes
virtual environments underneath. No real conda has run these commands.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONDA = r"""#!/usr/bin/env bash
set -e
root="$STAND_IN_CONDA"; mkdir -p "$root/envs"
echo "conda $*" >>"$root/calls"
case "$1 $2" in
  "env list") printf '# conda environments:\n#\nbase                 * %s\n' "$root"
    for d in "$root"/envs/*/; do [ -d "$d" ] && printf '%-22s%s\n' "$(basename "$d")" "${d%/}"; done ;;
  "create -y") [ "$3" = -n ] && [[ "$5" = python=* ]] && "$REAL_PYTHON" -m venv "$root/envs/$4" ;;
  "env remove") [ "$3" = -y ] && [ "$4" = -n ] && rm -rf "$root/envs/$5" ;;
  "shell.bash hook") cat <<HOOK
conda() { if [ "\$1" = activate ]; then . "$root/envs/\$2/bin/activate"; else command conda "\$@"; fi; }
HOOK
  ;;
  *) echo "unknown: $*" >&2; exit 1 ;;
esac
exit 0
"""


@pytest.fixture(params=["venv", "conda"])
def shell(request, tmp_path):
    """Run bash lines with envs.sh sourced, in a folder of their own; returns the finished process."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CONDA", "VIRTUAL_ENV"))}
    env |= {"envs_dir": str(tmp_path / "envs"), "vllm_requirements": str(requirements), "PATH": f"{bin_dir}:{env['PATH']}",
            "PIP_NO_INDEX": "1", "REAL_PYTHON": sys.executable, "PYTHON": sys.executable, "env_manager": request.param,
            "STAND_IN_CONDA": str(tmp_path / "conda")}
    if request.param == "conda":
        (bin_dir / "conda").write_text(CONDA)
        (bin_dir / "conda").chmod(0o755)

    def run(lines, **more):
        command = f"set -euo pipefail\nsource {ROOT}/envs.sh\n{lines}"
        return subprocess.run(["bash", "-c", command], env=env | more, capture_output=True, text=True, timeout=300, check=False)

    run.requirements, run.bin = requirements, bin_dir
    run.prefix = (tmp_path / "conda" / "envs" if request.param == "conda" else tmp_path / "envs") / "vllm"
    run.manager, run.folder = request.param, tmp_path
    return run


def test_made_once_then_used(shell):
    made = shell("make_envs vllm; use_env vllm; command -v python")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == str(shell.prefix / "bin" / "python")
    mark = shell.prefix / "mark"
    mark.touch()
    again = shell("make_envs vllm")
    assert again.returncode == 0 and again.stdout == "" and mark.exists()


def test_changed_requirements_and_cut_off_installs_are_made_again(shell):
    assert shell("make_envs vllm").returncode == 0
    mark = shell.prefix / "mark"
    mark.touch()
    shell.requirements.write_text("no-such-package-of-ours==99.0\n")
    failed = shell("make_envs vllm")
    assert failed.returncode != 0 and "environment vllm could not be made" in failed.stderr and "vllm.log" in failed.stderr
    assert not mark.exists() and shell.prefix.exists() and not (shell.prefix / ".rlhf-stamp").exists()
    (shell.prefix / "half").touch()
    shell.requirements.write_text("# nothing again\n")
    assert shell("make_envs vllm").returncode == 0
    assert not (shell.prefix / "half").exists() and (shell.prefix / ".rlhf-stamp").exists()


def test_an_environment_of_somebody_else_is_left_alone(shell):
    (shell.prefix / "bin").mkdir(parents=True)
    (shell.prefix / "bin" / "activate").write_text("export THEIRS=yes\n")
    before = sorted(p for p in shell.prefix.rglob("*"))
    refused = shell("make_envs vllm")
    assert refused.returncode == 2 and "was not made by this project" in refused.stderr and "own_envs=yes" in refused.stderr
    used = shell('make_envs vllm; use_env vllm; echo "$THEIRS"', own_envs="yes")
    assert used.returncode == 0 and used.stdout.strip() == "yes"
    assert sorted(p for p in shell.prefix.rglob("*")) == before


def test_two_at_once_make_it_once(shell):
    both = shell("make_env vllm & a=$!; make_env vllm & b=$!; wait $a; wait $b")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("making environment") == 1


def test_unknown_names_and_unmade_environments(shell):
    unknown = shell("make_envs vlm || exit $?")
    assert unknown.returncode == 2 and "no environment is called vlm" in unknown.stderr
    absent = shell("use_env vllm || exit $?")
    assert absent.returncode == 2 and "there is no environment vllm" in absent.stderr


@pytest.mark.parametrize("visible, count", [(None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("GPU-aaaa", 1)])
def test_gpus_are_counted_as_cuda_would(shell, visible, count):
    if shell.manager == "conda":
        return  # counting does not depend on it
    fake = shell.bin / "nvidia-smi"
    fake.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: Stand-in (UUID: GPU-$i)"; done\n')
    fake.chmod(0o755)
    more = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    answer = shell("count_gpus; env_requirements rlhflow", **more)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == [str(count), f"{ROOT}/requirements-train.txt"]
    own = shell("env_requirements vllm; env_requirements lm_eval", vllm_requirements="", **more)
    assert own.stdout.split() == [f"{ROOT}/requirements-{name}{'' if count else '-cpu'}.txt" for name in ("vllm", "eval")]


def test_requirements_that_others_include_are_in_their_stamp(shell):
    """An environment is as old as the files that its requirements take in; without any the stamp is that of the file alone."""
    (shell.folder / "more.txt").write_text("-r requirements.txt\n# more\n")
    stamps = []
    for text in ("# nothing\n", "# something else\n", "# nothing\n"):
        shell.requirements.write_text(text)
        both = shell(f"env_stamp {shell.requirements}; env_stamp {shell.folder}/more.txt; sha256sum <{shell.requirements}").stdout.split()
        assert both[0] == both[4] and both[1::2][:2] == ["requirements.txt", "more.txt"]
        stamps.append(both[2])
    assert stamps[0] == stamps[2] != stamps[1]


def test_flash_attn_comes_between_vllm_and_openrlhf(shell):
    """It compiles against the torch that vllm brings, and OpenRLHF's requirements find it built. pip is a stand-in that writes down its calls."""
    python = shell.bin / "python-of-ours"
    python.write_text('#!/bin/sh\ncase "$2" in venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; *) echo "$@" >>"$CALLS";; esac\n')
    python.chmod(0o755)
    calls = shell.folder / "calls"
    done = shell(
        f"find_python() {{ echo {python}; }}; install_env ppo_train {ROOT}/ppo/requirements-ppo.txt", CALLS=str(calls), REAL_PYTHON=str(python)
    )
    assert done.returncode == 0, done.stderr
    first, second, last = [line.split("--no-input ")[1] for line in calls.read_text().splitlines()]
    assert first.startswith("vllm==0.29.0 ") and second == "--no-build-isolation flash-attn==2.8.3" and last.endswith("ppo/requirements-ppo.txt")
