"""Shell scripts: syntax, safety habits, and what set-up decides, with stand-ins for every outside command."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import PATIENCE_S
from stand_ins import executable

from vexact.config import load_config
from vexact.prepare import PREPARERS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scripts", "examples", "submodules")
SCRIPTS = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.sh") if ".venv" not in path.parts]
    + [ROOT / ".ci" / "run"]
)
names = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))


@names
def test_syntax_and_habits(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=PATIENCE_S)
    text = script.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert text.startswith("#!/usr/bin/env bash\n")
    assert script.stat().st_mode & stat.S_IXUSR
    assert len(lines) <= 2 or "set -euo pipefail" in lines
    assert [line for line in lines if re.search(r"(?<!\")\$[@*]|\$[@*](?!\")", line)] == [], "unquoted arguments"
    assert re.search(r"\b(pkill|killall|rm -rf|sudo|curl|wget)\b", text) is None


def test_ci_runs_exactly_the_test_script_and_the_bridges() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    here = '"$(dirname "${BASH_SOURCE[0]}")/..'
    assert commands == [
        "set -euo pipefail",
        f'bash {here}/scripts/browser.sh"',
        f'bash {here}/scripts/test.sh"',
        f'bash {here}/submodules/ci.sh" all',
    ]


def test_the_wheel_carries_the_whole_hydra_tree() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'package_dir={"vexact.configs": "configs"}' in setup
    patterns = re.search(r'"vexact.configs": \[(.*?)\]', setup)
    assert patterns is not None
    globs = re.findall(r'"([^"]+)"', patterns[1])
    shipped = {path for pattern in globs for path in (ROOT / "configs").glob(pattern)}
    assert shipped == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}


def test_the_wheel_carries_the_page_of_the_report() -> None:
    patterns = re.search(r'"vexact.report.html": \[(.*?)\]', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert patterns is not None
    there = {path.name for path in (ROOT / "vexact" / "report" / "html").iterdir() if path.suffix != ".py"}
    assert set(re.findall(r'"([^"]+)"', patterns[1])) == there - {"__pycache__"}


def test_set_up_names_only_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    target = re.search(r"\$root\[\$extras,([\w,]+)\]", (ROOT / "scripts" / "setup.sh").read_text())
    assert target is not None
    assert {*target[1].split(","), "tested", "gpu"} <= set(extras)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_hold_every_package_of_every_extra_and_leave_torch_alone(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(text for texts in project["optional-dependencies"].values() for text in texts),
    ]
    lines = (ROOT / "constraints" / f"{python}.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == [], "one exact version a line"
    held = {line.split("==")[0]: line.split("==")[1] for line in lines}
    wanted = {Requirement(text).name: Requirement(text).specifier for text in declared}
    assert set(wanted) - set(held) == {"torch", "triton"}
    assert [name for name, version in held.items() if name in wanted and version not in wanted[name]] == []
    assert [name for name in held if re.match(r"torch|triton|nvidia|cuda", name)] == []


FAKE_PYTHON = r"""
case "$*" in
  *"{}/constraints"*) echo "${@: -1}/constraints/3.12.txt" ;;
  *importlib.metadata*) echo "torch==2.11.0+cu128" ;;
  *version_info*) exit 0 ;;
  *torch.version.cuda*) exit "${FAKE_NO_CUDA:-0}" ;;
  *find_spec*) echo "$FAKE_ABSENT" ;;
  *"-m venv"*) echo "venv $*" >>"$FAKE_LOG"; mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"
    lent=false; [[ "$*" != *system-site* ]] || lent=true
    echo "include-system-site-packages = $lent" >"${@: -1}/pyvenv.cfg"
    exit "${FAKE_VENV_CODE:-0}" ;;
  *"pip install"*--dry-run*) exit "${FAKE_INDEX_CODE:-0}" ;;
  *"pip install"*) echo "install $*" >>"$FAKE_LOG"; exit "${FAKE_INSTALL_CODE:-0}" ;;
  *"pip config"*) ;;
  *) echo "unexpected: $*" >>"$FAKE_LOG"; exit 9 ;;
esac
"""


class Machine:
    """A machine whose Python, pip and nvidia-smi only write down what they are asked."""

    def __init__(self, folder: Path, gpu: bool) -> None:
        self.folder, self.log = folder, folder / "log"
        self.system = executable(folder / "bin" / "python3", FAKE_PYTHON)
        if gpu:
            executable(folder / "bin" / "nvidia-smi", "exit 0")
        self.log.touch()

    def set_up(self, *arguments: str, code: int = 0, **variables: str) -> tuple[str, str, str]:
        """Run scripts/setup.sh; returns (the Python it names, what was asked for, its messages)."""
        self.log.write_text("")
        environment = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "HOME": str(self.folder),
            "FAKE_LOG": str(self.log),
            "VEXACT_VENV": str(self.folder / "venv"),
            **variables,
        }
        script = ROOT / "scripts" / "setup.sh"
        result = subprocess.run(
            ["bash", script, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert result.returncode == code, result.stderr
        return result.stdout.strip(), self.log.read_text(), result.stderr


@pytest.fixture
def cpu(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpu=False)


@pytest.fixture
def gpu(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpu=True)


def test_fresh_cpu_machine_gets_a_venv_once(cpu: Machine) -> None:
    python, asked, _ = cpu.set_up(FAKE_ABSENT="torch hydra")
    assert python == f"{cpu.folder}/venv/bin/python"
    assert asked.count("venv") >= 1
    assert "[tested,dev,wandb,tensorboard,report,tasks,serve,smollm2,ray]" in asked
    assert "--system-site-packages" not in asked
    again, asked, messages = cpu.set_up(FAKE_ABSENT="torch hydra")
    assert (again, asked, messages) == (python, "", "")


@pytest.mark.parametrize(("name", "arguments"), [("venv", ()), ("venv-newest", ("--newest",))])
def test_an_environment_whose_making_was_interrupted_is_made_anew(
    cpu: Machine, name: str, arguments: tuple[str, ...]
) -> None:
    if arguments:
        cpu.set_up()
    _, asked, _ = cpu.set_up(*arguments, code=1, FAKE_VENV_CODE="1")
    assert asked.count("-m venv") == 1
    assert (cpu.folder / name / "bin" / "python").exists()
    left = executable(cpu.folder / name / "left", "")
    assert cpu.set_up(*arguments)[1].count("-m venv") == 1
    assert not left.exists()
    assert "-m venv" not in cpu.set_up(*arguments)[1]


def test_offline_gpu_machine_with_everything_installs_nothing(gpu: Machine) -> None:
    python, asked, messages = gpu.set_up(FAKE_ABSENT="")
    assert (python, asked) == (str(gpu.system), "")
    assert "which has all required packages" in messages


def test_gpu_machine_lends_its_torch(gpu: Machine) -> None:
    _, asked, _ = gpu.set_up(FAKE_ABSENT="hydra")
    assert "--system-site-packages" in asked
    assert "[gpu,dev," in asked, "no version of torch is asked for"


def test_gpu_machine_without_torch_gets_the_tested_one(gpu: Machine) -> None:
    _, asked, _ = gpu.set_up(FAKE_ABSENT="torch", FAKE_NO_CUDA="1")
    assert "--system-site-packages" not in asked
    assert "[gpu,tested,dev," in asked


def test_active_environment_with_everything_is_left_alone(cpu: Machine) -> None:
    active = cpu.folder / "active"
    executable(active / "bin" / "python", FAKE_PYTHON)
    python, asked, _ = cpu.set_up(VIRTUAL_ENV=str(active), FAKE_ABSENT="")
    assert (python, asked) == (f"{active}/bin/python", "")


def test_failed_install_names_what_is_missing(cpu: Machine) -> None:
    _, _, messages = cpu.set_up(code=1, FAKE_ABSENT="torch hydra", FAKE_INSTALL_CODE="1")
    assert "still missing: torch hydra" in messages
    assert "setup.log" in messages


def test_uv_is_used_where_present(cpu: Machine) -> None:
    executable(cpu.folder / "bin" / "uv", 'echo "uv $*" >>"$FAKE_LOG"')
    _, asked, _ = cpu.set_up(FAKE_ABSENT="torch")
    assert f"uv pip install -q --python {cpu.folder}/venv/bin/python -c {ROOT}/constraints/3.12.txt -e {ROOT}[" in asked


def test_uv_leaves_a_lent_torch_to_pip(gpu: Machine) -> None:
    """uv does not see the packages of the system's Python, so it would fetch another torch."""
    executable(gpu.folder / "bin" / "uv", 'echo "uv $*" >>"$FAKE_LOG"')
    _, asked, _ = gpu.set_up(FAKE_ABSENT="hydra")
    assert "uv pip" not in asked
    assert "install -m pip install" in asked


def test_what_is_installed_has_the_tested_versions(cpu: Machine) -> None:
    _, asked, _ = cpu.set_up(FAKE_ABSENT="torch")
    assert f"-c {ROOT}/constraints/3.12.txt -e" in asked


def test_changed_constraints_are_installed_again(cpu: Machine) -> None:
    cpu.set_up(FAKE_ABSENT="torch")
    stamp = cpu.folder / "venv" / ".vexact-setup"
    before = stamp.read_text()
    stamp.write_text("tested 1 1\n")
    _, asked, _ = cpu.set_up(FAKE_ABSENT="")
    assert "install" in asked
    assert stamp.read_text() == before


def test_the_newest_packages_get_an_environment_of_their_own_and_torch_stays(cpu: Machine) -> None:
    cpu.set_up(FAKE_ABSENT="torch")
    for _ in range(2):  # brought up to date every time
        python, asked, _ = cpu.set_up("--newest", FAKE_ABSENT="")
        assert python == f"{cpu.folder}/venv-newest/bin/python"
        assert f"--upgrade --upgrade-strategy eager -c {cpu.folder}/venv-newest/kept.txt -e {ROOT}[" in asked
        assert "/constraints/" not in asked
    assert (cpu.folder / "venv-newest" / "kept.txt").read_text() == "torch==2.11.0+cu128\n"


def test_the_newest_packages_keep_a_lent_torch(gpu: Machine) -> None:
    gpu.set_up(FAKE_ABSENT="hydra")
    _, asked, _ = gpu.set_up("--newest", FAKE_ABSENT="")
    assert "--system-site-packages" in asked


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ("FAKE_INDEX_CODE", "no package index can be reached"),
        ("FAKE_INSTALL_CODE", "installing the newest versions failed"),
    ],
)
def test_newest_packages_that_cannot_be_had_are_a_failure(cpu: Machine, failing: str, expected: str) -> None:
    cpu.set_up(FAKE_ABSENT="torch")
    _, _, messages = cpu.set_up("--newest", code=1, FAKE_ABSENT="", **{failing: "1"})
    assert expected in messages


def test_unknown_argument_is_refused(cpu: Machine) -> None:
    _, asked, messages = cpu.set_up("--newst", code=1)
    assert (asked, messages) == ("", "setup: unknown argument --newst; there is --newest\n")


def test_newest_is_left_out_only_where_the_user_says_that_there_is_no_network() -> None:
    script = ROOT / "scripts" / "newest.sh"
    for variable in ("PIP_NO_INDEX", "UV_OFFLINE"):
        environment = {"PATH": "/usr/bin:/bin", variable: "1"}
        result = subprocess.run(
            ["bash", script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        assert "not run: PIP_NO_INDEX or UV_OFFLINE says that there is no network" in result.stderr


ANSWERS = 'case "$*" in *"{}/constraints"*) echo /dev/null; exit;; *version_info*|*find_spec*) exit 0;; esac'
FAKE_RUN = 'if [[ "$*" == *vexact* ]]; then printf "%s\\n" "$*" "--" >>"$FAKE_LOG"; else exit 9; fi'


EXAMPLES = {  # script: recipe of its model, what is prepared without one, and the recipe of that
    "getting_started/run_qwen3_1b7.sh": ("qwen3_1b7", "tiny", "tiny_arithmetic"),
    "moe/run_qwen3_30b_a3b.sh": ("qwen3_30b_a3b", "tiny_moe", "tiny_moe"),
    "moe/run_moonlight.sh": ("moonlight", "tiny_moonlight", "tiny_moonlight"),
}
examples = pytest.mark.parametrize("example", EXAMPLES)


def started(tmp_path: Path, example: str, *arguments: str, **variables: str) -> list[str]:
    """What a script of examples/ runs, from a foreign working directory."""
    venv = tmp_path / "venv"
    python = executable(venv / "bin" / "python", f"{ANSWERS}\n{FAKE_RUN}")
    log = tmp_path / "log"
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(venv),
        "FAKE_LOG": str(log),
        "VEXACT_CACHE": str(tmp_path / "cache"),
        **variables,
    }
    subprocess.run(
        ["bash", ROOT / "examples" / example, *arguments],
        cwd=elsewhere,
        env=environment,
        check=True,
        timeout=PATIENCE_S,
    )
    assert python.exists()
    return log.read_text().split("--\n")[:-1]


@examples
def test_an_example_without_a_model_prepares_and_trains_the_tiny_one(tmp_path: Path, example: str) -> None:
    _, name, recipe = EXAMPLES[example]
    prepare, train = started(tmp_path, example, "trainer.experiment_name=two words")
    folder = tmp_path / "cache" / name
    assert prepare == f"-m vexact prepare {name} --out {folder}\n"
    assert train.startswith(f"-m vexact train recipe={recipe} actor_rollout_ref.model.path={folder}/model ")
    assert train.endswith("trainer.experiment_name=two words\n")
    assert name in PREPARERS


@examples
def test_an_example_with_a_model_trains_it(tmp_path: Path, example: str) -> None:
    (train,) = started(tmp_path, example, "trainer.seed=1", model_dir="/m", train_path="/t.parquet")
    assert train == f"-m vexact train --from_env recipe={EXAMPLES[example][0]} trainer.seed=1\n"


@examples
def test_the_recipes_of_an_example_can_be_read(example: str) -> None:
    recipe, _, tiny = EXAMPLES[example]
    names = [load_config([f"recipe={name}"], checked=False).trainer.experiment_name for name in (recipe, tiny)]
    assert names == [recipe, tiny]


STUCK = """import ctypes

def test_stuck():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_test_that_hangs_in_c_code_is_named_and_ends_the_suite(tmp_path: Path) -> None:
    (tmp_path / "test_stuck.py").write_text(STUCK)
    for script in ("test.sh", "newest.sh"):
        parallel = re.search(r"-n auto( --[a-z-]+[ =]\w+)+", (ROOT / "scripts" / script).read_text(encoding="utf-8"))
        assert parallel is not None
        assert "--max-worker-restart=0" in parallel[0]
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", *parallel[0].replace("auto", "1").split()]
    command += ["-o", "timeout=0", "-o", "faulthandler_timeout=1", "--rootdir", tmp_path, tmp_path]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1, done.stdout
    assert re.search(r"worker 'gw0' crashed while running '.*test_stuck\.py::test_stuck'", done.stdout), done.stdout
