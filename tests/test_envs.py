"""envs.sh: an environment is made once, beside what is there, and nothing whole is ever altered or removed.

Conda cannot be had on the project's machines. `CONDA` stands in for it with conda's calling convention as
documented, and edits PATH as the real one (26.7) was seen to: its new environment takes the place of its last
one. `PYTHON` stands in for `python -m venv` and pip, so that an environment takes milliseconds; one test
makes a real one. nvidia-smi and nvcc are stand-ins.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import devices

ROOT = Path(__file__).resolve().parents[1]
PYTHON = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
    printf 'export VIRTUAL_ENV=%q\nPATH="$VIRTUAL_ENV/bin:$PATH"\n' "$3" >"$3/bin/activate" ;;
  "-m pip") echo "${FLASH_ATTN_CUDA_ARCHS-} $*" >>"$FOLDER/pip"
    requirements="$*"; requirements="${requirements##* -r }"
    ! grep -qs slow "$requirements" || { touch "$FOLDER/begun"; exec sleep 60; }
    ! grep -qs no-such "$requirements" || { echo "ERROR: no matching distribution"; exit 1; } ;;
  "-c import os, sysconfig"*) [ -z "${NO_HEADERS-}" ] ;;
esac
"""
CONDA = r"""#!/usr/bin/env bash
set -e
root="$FOLDER/conda"; mkdir -p "$root/envs" "$root/bin"
case "$1 $2" in
  "env list") printf '# conda environments:\n#\n# * -> active\nbase                 * %s\n' "$root"
    for d in "$root"/envs/*/; do [ ! -d "$d" ] || printf '%-22s%s\n' "$(basename "$d")" "${d%/}"; done ;;
  "create -y") [ "$3" = -n ] && [[ "$5" = python=* ]] && [ ! -e "$root/envs/$4" ]
    refusal="CondaToSNonInteractiveError: Terms of Service have not been accepted"
    [ -z "${TERMS-}" ] || { echo "$refusal"; exit 1; }
    "$PYTHON" -m venv "$root/envs/$4" ;;
  "env remove") [ "$3" = -y ] && [ "$4" = -n ] && rm -rf "$root/envs/$5" ;;
  "shell.bash hook") cat <<HOOK
conda() {
  [ "\$1" = activate ] || { command conda "\$@"; return; }
  case ":\$PATH:" in
    *":\${CONDA_PREFIX:-none}/bin:"*)
      PATH=":\$PATH:"; PATH="\${PATH/":\$CONDA_PREFIX/bin:"/":$root/envs/\$2/bin:"}"
      PATH="\${PATH#:}" PATH="\${PATH%:}" ;;
    *) PATH="$root/envs/\$2/bin:\$PATH" ;;
  esac
  export PATH CONDA_PREFIX="$root/envs/\$2"
}
HOOK
  ;;
  *) echo "unknown: $*" >&2; exit 1 ;;
esac
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Shell:
    """Runs bash lines with envs.sh sourced, in a folder of their own."""

    def __init__(self, manager, folder):
        self.manager, self.folder, self.bin = manager, folder, folder / "bin"
        self.requirements = folder / "requirements.txt"
        self.requirements.write_text("# nothing\n")
        self.envs = folder / "conda/envs" if manager == "conda" else folder / "envs"
        self.marks = folder / "home/.conda/online-rlhf" if manager == "conda" else folder / "envs"
        hidden = ("CONDA", "VIRTUAL_ENV", "CUDA", "LD_LIBRARY_PATH", "CC")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)} | {
            "FOLDER": str(folder),
            "HOME": str(folder / "home"),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "envs_dir": str(folder / "envs"),
            "env_manager": manager,
            "vllm_requirements": str(self.requirements),
            "PYTHON": str(program(self.bin / "python-of-ours", PYTHON)),
        }
        if manager == "conda":
            program(self.bin / "conda", CONDA)

    def command(self, lines):
        return ["bash", "-c", f"set -euo pipefail\nsource {ROOT}/envs.sh\n{lines}"]

    def __call__(self, lines, **more):
        return subprocess.run(
            self.command(lines), env=self.env | more, capture_output=True, text=True, timeout=60, check=False
        )

    def gpus(self, driver="580.65.06", capability="9.0"):
        """From now on nvidia-smi lists three GPUs."""
        program(
            self.bin / "nvidia-smi",
            f"""#!/bin/sh
case "$*" in
  -L) for i in 0 1 2; do echo "GPU $i: Stand-in (UUID: GPU-$i)"; done ;;
  --query-gpu=driver_version*) echo {driver}; echo {driver} ;;
  --query-gpu=compute_cap*) for one in {capability}; do echo $one; done ;;
esac
""",
        )

    def made(self):
        return sorted(path.name for path in self.envs.glob("*/") if path.is_dir())


def good(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["venv", "conda"])
def shell(request, tmp_path):
    return Shell(request.param, tmp_path)


@pytest.fixture
def venv(tmp_path):
    return Shell("venv", tmp_path)


@pytest.fixture
def conda(tmp_path):
    return Shell("conda", tmp_path)


def test_another_shell_is_told():
    told = subprocess.run(
        ["sh", "-c", f". {ROOT}/envs.sh; echo $?"], capture_output=True, text=True, check=False
    )
    if "bash" not in os.path.realpath("/bin/sh"):
        assert told.stdout == "2\n" and told.stderr == "error: envs.sh is for bash: start bash first\n"


def test_made_once_then_used(shell):
    assert (
        good(shell("make_envs vllm; use_env vllm; command -v python")).splitlines()[-1]
        == f"{shell.envs}/vllm/bin/python"
    )
    assert good(shell("make_envs vllm; env_prefix vllm")) == f"{shell.envs}/vllm\n"
    assert not list(shell.marks.glob("*.making"))


def test_a_real_virtual_environment_in_a_folder_with_a_space(venv):
    """Without pip, whose installation takes seconds; an empty package stands in for it."""
    real = program(
        venv.bin / "real",
        f'#!/bin/sh\n[ "$2" != venv ] || exec {sys.executable} -m venv --without-pip "$3"\nexec '
        f'{sys.executable} "$@"\n',
    )
    program(venv.folder / "packages/pip/__main__.py", "")
    more = {
        "PYTHON": str(real),
        "PYTHONPATH": str(venv.folder / "packages"),
        "envs_dir": f"{venv.folder}/my envs",
    }
    out = good(venv('make_envs vllm; use_env vllm; python -c "import sys; print(sys.prefix)"', **more))
    assert out.splitlines()[-1] == f"{venv.folder}/my envs/vllm"


def test_changed_requirements_are_made_beside(shell):
    """What is whole stays, for what uses it; each checkout finds the one of its own requirements."""
    good(shell("make_envs vllm"))
    mark = shell.envs / "vllm/mark"
    mark.touch()
    shell.requirements.write_text("# changed\n")
    absent = shell("use_env vllm")
    assert absent.returncode == 2 and "make_envs vllm" in absent.stderr
    out = good(shell("make_envs vllm; use_env vllm; command -v python"))
    new = Path(out.splitlines()[-1]).parents[1]
    assert shell.made() == ["vllm", new.name] and new.name.startswith("vllm.") and mark.exists()
    assert (
        "vllm is of older requirements and kept" in out
        and ("conda env remove -n vllm" if shell.manager == "conda" else "rm -rf ") in out
    )
    shell.requirements.write_text("# nothing\n")
    assert good(shell("make_envs vllm; env_prefix vllm")) == f"{shell.envs}/vllm\n"
    # A run keeps to what it began with, whatever becomes of the requirements.
    changed = f"make_envs vllm; echo '# again' >{shell.requirements}; use_env vllm; command -v python"
    assert good(shell(changed)) == f"{shell.envs}/vllm/bin/python\n"


def test_a_failed_install_leaves_what_was_there(shell):
    good(shell("make_envs vllm"))
    shell.requirements.write_text("no-such-package-of-ours==99.0\n")
    failed = shell("make_envs vllm")
    assert failed.returncode != 0 and "ERROR: no matching distribution" in failed.stderr
    assert "environment vllm could not be made" in failed.stderr and "vllm.log" in failed.stderr
    assert shell.made() == ["vllm"] and not list(shell.marks.glob("*.making"))
    program(
        shell.bin / "df",
        "#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho /dev/x 100 100 0 100% /\n",
    )
    assert "is full" in shell("make_envs vllm").stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_install_that_was_cut_off_is_cleared_away(shell, how):
    shell.requirements.write_text("slow\n")
    process = subprocess.Popen(
        shell.command("make_envs vllm"),
        env=shell.env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (shell.folder / "begun").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    if (
        how == signal.SIGINT
    ):  # at the terminal, all of the foreground group gets it; the installs have groups of their own
        os.killpg(process.pid, how)
    else:
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), how)
    process.communicate(timeout=10)
    assert (shell.envs / "vllm").is_dir() and (shell.marks / "vllm.making").exists()
    (shell.envs / "vllm/half").touch()
    shell.requirements.write_text("# nothing\n")
    good(shell("make_envs vllm"))
    assert (
        shell.made() == ["vllm"]
        and not (shell.envs / "vllm/half").exists()
        and not (shell.marks / "vllm.making").exists()
    )


def quoted(path):
    """As bash's `printf %q` writes it."""
    return str(path).replace(" ", "\\ ")


def children(pid):
    """Process ids below a process, itself not included."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return below + [deeper for child in below for deeper in children(child)]


def test_what_another_machine_makes_is_left_to_it(shell):
    """A shared folder: the processes there cannot be seen from here."""
    (shell.envs / "vllm").mkdir(parents=True)
    shell.marks.mkdir(parents=True, exist_ok=True)
    (shell.marks / "vllm.making").write_text("another-machine 1b4e28ba pid:[1] 1\n")
    made = shell("make_envs vllm; env_prefix vllm")
    assert "vllm." in good(made) and "being made elsewhere (another-machine)" in made.stderr
    assert len(shell.made()) == 2 and not list((shell.envs / "vllm").iterdir())


def test_an_environment_of_somebody_else_is_left_alone(shell):
    (shell.envs / "vllm/bin").mkdir(parents=True)
    (shell.envs / "vllm/bin/activate").write_text(f'PATH="{shell.envs}/vllm/bin:$PATH"\n')
    program(shell.envs / "vllm/bin/python", "#!/bin/sh\n")
    before = sorted(path for path in shell.envs.rglob("*"))
    for lines in ("make_envs vllm", "use_env vllm"):
        refused = shell(lines)
        assert (
            refused.returncode == 2
            and "was not made by this project" in refused.stderr
            and "own_envs=yes" in refused.stderr
        )
    assert (
        good(shell("make_envs vllm; use_env vllm; command -v python", own_envs="yes"))
        == f"{shell.envs}/vllm/bin/python\n"
    )
    assert sorted(path for path in shell.envs.rglob("*")) == before


def test_two_at_once_make_it_once(shell):
    both = good(shell("make_env vllm & a=$!; make_env vllm & b=$!; wait $a; wait $b"))
    assert both.count("making environment") == 1 and shell.made() == ["vllm"]


def test_waiting_for_another_process_is_told(venv):
    held = '(flock 9; touch "$FOLDER/held"; sleep 0.5) 9>>"$envs_dir/vllm.lock"'
    waited = venv(
        f'mkdir -p "$envs_dir"; {held} & while [ ! -e "$FOLDER/held" ]; do sleep 0.02; done; make_envs vllm'
    )
    assert (
        "making environment vllm" in good(waited)
        and waited.stderr.count("waiting for another process, which makes environment vllm") == 1
    )


def test_two_at_once_where_the_file_system_has_no_locks(shell):
    """Lustre without -o flock. Two may be made then, and each is whole."""
    program(shell.bin / "flock", "#!/bin/sh\necho 'flock: 9: Function not implemented' >&2\nexit 65\n")
    good(shell("make_env vllm & a=$!; make_env vllm & b=$!; wait $a; wait $b"))
    assert all((shell.envs / name / ".rlhf-stamp").is_file() for name in shell.made())


def test_gpus_make_another_environment(shell):
    """A machine with GPUs and one without share the folder: neither takes the other's."""
    mine = {"vllm_requirements": ""}
    good(shell("make_envs vllm lm_eval rlhflow", **mine))
    assert shell.made() == ["lm_eval-cpu", "rlhflow", "vllm-cpu"]
    shell.gpus()
    assert shell("use_env vllm", **mine).returncode == 2
    good(shell("make_envs vllm lm_eval rlhflow; use_env vllm", **mine))
    both = ["lm_eval", "lm_eval-cpu", "rlhflow", "vllm", "vllm-cpu"]
    assert shell.made() == both
    for visible, name in (("", "vllm-cpu"), ("0", "vllm")):
        assert (
            good(shell("make_envs vllm lm_eval; env_prefix vllm", CUDA_VISIBLE_DEVICES=visible, **mine))
            == f"{shell.envs}/{name}\n"
        )
    assert shell.made() == both


def test_an_environment_of_the_layout_before(venv):
    """`vllm` was that of any machine: used where its stamp fits, else left as it is."""
    mine = {"vllm_requirements": ""}
    good(venv("make_envs vllm", **mine))
    (venv.envs / "vllm-cpu").rename(venv.envs / "vllm")
    assert good(venv("make_envs vllm; env_prefix vllm", **mine)) == f"{venv.envs}/vllm\n"
    venv.gpus()
    made = Path(good(venv("make_envs vllm; env_prefix vllm", **mine)).splitlines()[-1])
    assert made.name.startswith("vllm.") and venv.made() == ["vllm", made.name]


def test_unknown_names_and_unmade_environments(shell):
    unknown = shell("make_envs vlm || exit $?")
    assert unknown.returncode == 2 and "no environment is called vlm" in unknown.stderr
    absent = shell("use_env vllm || exit $?")
    assert (
        absent.returncode == 2
        and "there is no environment vllm" in absent.stderr
        and "make_envs vllm" in absent.stderr
    )
    assert good(shell("env_prefix vllm")).strip() == ""
    missing = shell("make_envs vllm || exit $?", vllm_requirements="/nowhere.txt")
    assert missing.returncode == 2 and "no such requirements file: /nowhere.txt" in missing.stderr


def test_a_folder_that_cannot_be_written(venv):
    refused = venv("make_envs vllm || exit $?", envs_dir="/dev/null/envs")
    assert (
        refused.returncode == 2
        and "/dev/null/envs cannot be written" in refused.stderr
        and refused.stderr.count("\n") == 1
    )


# ---- conda alone -------------------------------------------------------------------------------------------


def test_conda_is_asked_for_and_not_there(venv):
    for lines in ("make_envs vllm", "use_env vllm", "env_prefix vllm"):
        told = refused(venv, lines, env_manager="conda")
        assert "there is no conda command" in told and "env_manager=venv" in told
    told = refused(venv, f"cd {ROOT}; bash run_loop.sh configs/loop_tiny.yaml --check", env_manager="conda")
    assert told.count("\n") == 1
    assert not venv.envs.exists()


def test_a_virtual_environment_above_base_does_not_win(conda):
    mine = conda.folder / "mine"
    program(mine / "bin/python", "#!/bin/sh\n")
    base = f"{conda.folder}/conda"
    active = {
        "CONDA_PREFIX": base,
        "VIRTUAL_ENV": str(mine),
        "PATH": f"{conda.bin}:{mine}/bin:{base}/bin:{os.environ['PATH']}",
    }
    out = good(conda('make_envs vllm; use_env vllm; command -v python; echo "${VIRTUAL_ENV-none}"', **active))
    assert out.splitlines()[-2:] == [f"{conda.envs}/vllm/bin/python", "none"]


def test_condas_environments_in_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "my conda"
    folder.mkdir()
    shell = Shell("conda", folder)
    good(shell("make_envs vllm"))
    assert (
        good(shell("env_prefix vllm; use_env vllm; command -v python"))
        == f"{shell.envs}/vllm\n{shell.envs}/vllm/bin/python\n"
    )


def test_terms_that_condas_channels_want_accepted(conda):
    refused = conda("make_envs vllm || exit $?", TERMS="yes")
    assert (
        refused.returncode != 0
        and "conda tos accept" in refused.stderr
        and "env_manager=venv" in refused.stderr
    )


def test_packages_of_the_users_own_are_no_part_of_an_environment(venv):
    """conda's environments have the user's site packages on, as a Python without an environment has."""
    python = Path(sys.base_prefix) / "bin/python3"
    where = "import site; print(site.getusersitepackages())"
    site = Path(
        subprocess.run(
            [python, "-c", where], env=venv.env, capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    assert site.is_relative_to(venv.folder)
    site.mkdir(parents=True)
    (site / "package_of_my_own.py").write_text("")
    assert "No module named" in venv(f"{python} -c 'import package_of_my_own'").stderr


# ---- GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "visible, count",
    [
        (None, 3),
        ("0,2", 2),
        ("", 0),
        ("-1", 0),
        ("GPU-aaaa", 1),
        ("0,9,1", 1),
        ("1,-1,2", 1),
        ("NoDevFiles", 0),
        (" 0 , 1", 2),
        ("MIG-1,2,x,0", 2),
    ],
)
def test_gpus_are_counted_as_cuda_would(venv, monkeypatch, visible, count):
    """By bash and by Python."""
    venv.gpus()
    more = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    lines = "count_gpus; env_requirements vllm; env_requirements lm_eval; env_requirements rlhflow"
    flavour = "" if count else "-cpu"
    files = [f"{ROOT}/requirements-{name}.txt" for name in (f"vllm{flavour}", f"eval{flavour}", "train")]
    assert good(venv(lines, vllm_requirements="", **more)).splitlines() == [str(count), *files]
    monkeypatch.setenv("PATH", venv.env["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for key, value in more.items():
        monkeypatch.setenv(key, value)
    devices.visible_gpus.cache_clear()
    assert len(devices.visible_gpus()) == count
    devices.visible_gpus.cache_clear()


def refused(shell, lines, **more):
    done = shell(f"{lines} || exit $?", **more)
    assert done.returncode == 2 and not shell.made(), done.stderr
    return done.stderr


def test_what_a_machine_with_gpus_lacks_is_said_before_anything_is_installed(shell):
    shell.gpus(driver="570.124.06")
    told = refused(shell, "make_envs vllm rlhflow")
    assert (
        told.count("\n") == 1
        and "driver is 570.124.06" in told
        and "580 or newer" in told
        and "cuda-compat" in told
    )
    good(shell("make_envs vllm", CUDA_VISIBLE_DEVICES=""))  # on the CPU on purpose


def test_compat_libraries_stand_in_for_a_newer_driver(venv):
    venv.gpus(driver="550.54.15")
    for version, enough in (("570.1", False), ("580.65.06", True)):
        folder = venv.folder / version
        folder.mkdir()
        (folder / f"libcuda.so.{version}").touch()
        (folder / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")
        assert (venv("make_envs vllm", LD_LIBRARY_PATH=f"/none:{folder}").returncode == 0) == enough


def test_compiler_and_headers(venv):
    venv.gpus()
    program(venv.bin / "clang", "#!/bin/sh\n")
    good(venv("check_machine vllm", CC="no-such-compiler"))
    (venv.bin / "clang").unlink()
    only = venv.folder / "few"  # a PATH with neither compiler
    only.mkdir()
    for tool in ("bash", "dirname", "awk", "sed", "tr", "readlink", "basename", "cat", "sha256sum", "cut"):
        (only / tool).symlink_to(
            next(path for folder in os.environ["PATH"].split(":") if (path := Path(folder) / tool).exists())
        )
    told = refused(venv, "check_machine vllm", NO_HEADERS="yes", PATH=f"{venv.bin}:{only}")
    assert told.count("\n") == 2 and "no C compiler" in told and "has no Python.h" in told


def test_openrlhf_wants_a_toolkit_of_cuda_13(shell):
    shell.gpus(capability="9.0 8.6 8.0")
    home = shell.folder / "cuda"
    for release in (None, "12.4", "13.0"):
        if release:
            program(
                home / "bin/nvcc",
                f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n",
            )
        if release == "13.0":
            good(shell("make_envs ppo_train", CUDA_HOME=str(home)))
        else:
            told = refused(shell, "make_envs ppo_train", CUDA_HOME=str(home))
            assert ("version 12 is here" if release else "none is here") in told and "CUDA_HOME=" in told
    # flash-attn compiles against the torch that vllm brings, for the GPUs there are, and OpenRLHF's
    # requirements find it built.
    first, second, last = (shell.folder / "pip").read_text().splitlines()
    assert " vllm==0.29.0 " in first and last.endswith("-r " + str(ROOT / "ppo/requirements-ppo.txt"))
    assert second.startswith("80;90 ") and second.endswith("--no-build-isolation flash-attn==2.8.3")


def test_requirements_that_others_include_are_in_their_stamp(venv):
    """An environment is as old as the files that its requirements take in; without any the stamp is that of
    the file alone.
    """
    (venv.folder / "more.txt").write_text("-r requirements.txt\n# more\n")
    stamps = []
    for text in ("# nothing\n", "# something else\n", "# nothing\n"):
        venv.requirements.write_text(text)
        both = venv(
            f"env_stamp '{venv.requirements}'; env_stamp '{venv.folder}/more.txt'; sha256sum "
            f"<'{venv.requirements}'"
        ).stdout.split()
        assert both[0] == both[4] and both[1::2][:2] == ["requirements.txt", "more.txt"]
        stamps.append(both[2])
    assert stamps[0] == stamps[2] != stamps[1]


# ---- What the drivers do -----------------------------------------------------------------------------------

DRIVER = (
    f"cd {ROOT}; source loop/launch.sh; again='the same'; {{}}; plan=([run_dir]=$FOLDER/run [ray]=); "
    "enter_rlhflow; echo $python; "
    'hold "$FOLDER/run"; make_ready {}'
)


def thinking(shell):
    """The Python that a driver thinks with, of an environment whose requirements have changed since."""
    good(shell("make_envs rlhflow"))
    (shell.envs / "rlhflow/.rlhf-stamp").write_text("0ld requirements-train.txt\n")
    return f"{shell.envs}/rlhflow/bin/python"


@pytest.mark.parametrize("mode", ["mode=check", "mode=dry_run"])
def test_check_and_dry_run_make_no_environment(shell, mode):
    assert (
        "there is no environment rlhflow" in refused(shell, DRIVER.format(mode, "vllm rlhflow"))
        and not (shell.folder / "pip").exists()
    )
    python = thinking(shell)
    done = shell(DRIVER.format(mode, "vllm rlhflow"))
    assert good(done).splitlines() == [python] and shell.made() == ["rlhflow"]
    assert ("environment vllm is not made yet, a start makes it from requirements.txt" in done.stderr) == (
        mode == "mode=check"
    )


def test_a_check_says_what_the_machine_lacks(venv):
    thinking(venv)
    venv.gpus(driver="535.1")
    assert "driver is 535.1" in venv(DRIVER.format("mode=check", "vllm rlhflow")).stderr and venv.made() == [
        "rlhflow"
    ]
    # Also where there is no environment yet: before somebody makes one.
    told = venv(DRIVER.format("mode=check", "vllm rlhflow"), envs_dir=f"{venv.folder}/none").stderr
    assert "driver is 535.1" in told and told.splitlines()[-1].startswith(
        "error: there is no environment rlhflow"
    )


def test_a_finished_run_makes_no_environment(shell):
    python = thinking(shell)
    done = shell(DRIVER.format("true", ""))
    assert (
        good(done).splitlines() == [python]
        and "nothing is left to do" in done.stderr
        and shell.made() == ["rlhflow"]
    )
    begun = good(shell(DRIVER.format("true", "vllm rlhflow") + "; echo $python")).splitlines()
    assert begun[0] == python and begun[-1] != python and len(shell.made()) == 3


def test_a_driver_that_is_ended_ends_its_installs(venv):
    """At once, and the run's folder is free again."""
    thinking(venv)
    venv.requirements.write_text("slow\n")
    process = subprocess.Popen(
        venv.command(DRIVER.format("true", "vllm rlhflow")),
        env=venv.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (venv.folder / "begun").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    assert (
        "terminated; to continue: the same" in process.communicate(timeout=30)[1]
        and process.returncode == 143
    )
    assert subprocess.run(["flock", "-n", venv.folder / "run/.lock", "true"], check=False).returncode == 0


def test_a_dry_run_of_the_benchmarks_makes_no_environment(shell):
    told = refused(
        shell, f"bash {ROOT}/evaluation/evaluate_benchmarks.sh --run runs/mine --iterate 1 --dry_run"
    )
    assert "there is no environment lm_eval" in told and "make_envs lm_eval" in told
    shown = shell(f"bash {ROOT}/evaluation/evaluate_benchmarks.sh --help", PYTHON=sys.executable)
    assert "--iterate" in good(shown) and not shell.made()


def test_a_start_from_nothing_makes_both_first(shell):
    out = good(shell(DRIVER.format("true", "vllm rlhflow"))).splitlines()
    assert out[-1] == f"{shell.envs}/rlhflow/bin/python" and shell.made() == ["rlhflow", "vllm"]


def test_dry_runs_print_how_to_enter(shell):
    lines = f"{DRIVER.format('mode=dry_run', 'vllm rlhflow')}; enter rlhflow; enter vllm"
    good(shell("make_envs rlhflow"))
    out = good(shell(lines)).splitlines()
    assert out[1] == (
        "conda activate rlhflow; export PYTHONNOUSERSITE=1"
        if shell.manager == "conda"
        else f"source {quoted(shell.envs)}/rlhflow/bin/activate"
    )
    chosen = f"vllm_requirements={quoted(shell.requirements)}"
    assert out[2] == f"{chosen}; source ./envs.sh; make_envs vllm; use_env vllm"
