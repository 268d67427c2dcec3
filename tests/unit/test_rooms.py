"""The rooms of the house: which way imports point, what a light import brings in, where code may not stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("diffusion", "replay", "services", "actors", "trainer")
FILES = sorted(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))
LIGHT = [
    *(f"{room}.config" for room in ROOMS),
    "services.rest.schemas",
    "services.scorers.registry",
    "services.scorers.settings",
    "trainer.cli.main",
    "trainer.plan.planner",
    "trainer.run.environment",
]
HEAVY = ("torch", "ray", "redis")


def imported(file: Path) -> set[str]:
    """Every module that `file` imports anywhere in its text, absolute names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module))
    return found


def test_the_arrows_of_the_design_hold() -> None:
    """import-linter on the contracts of pyproject.toml."""
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_import_brings_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.stdout == "[]\n"


def test_processes_that_only_hand_the_training_on_do_without_torch() -> None:
    """The task that makes the trainer and Ray Train's controller; Ray Train brings torch, the learner's code must not bring more."""
    code = "import sys, trainer.learn.entry, trainer.run.training; print([m for m in ('torch', 'trainer.learn.loop', 'actors.rollout') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("diffusion", {"ray", "redis", "httpx", "fastapi"}), ("replay", {"ray", "torch", "httpx", "fastapi"}), ("services", {"redis", "torch", "diffusers"})],
)
def test_a_room_does_not_reach_for_what_is_not_its_own(room: str, forbidden: set[str]) -> None:
    """Imports inside functions count too."""
    found = {str(f.relative_to(ROOT)): {m.split(".")[0] for m in imported(f)} & forbidden for f in FILES if f.is_relative_to(ROOT / room)}
    assert len(found) > 3
    assert {name: names - allowed(name) for name, names in found.items() if names - allowed(name)} == {}


def allowed(file: str) -> set[str]:
    """The two exceptions: jobs live in Redis; some scorers are torch models."""
    if file == "services/jobs/store.py":
        return {"redis"}
    return {"torch"} if file.startswith("services/scorers/") else set()


def test_pure_cores_import_neither_ray_nor_torch() -> None:
    cores = [
        *(f"trainer/plan/{name}.py" for name in ("memory", "storage", "work", "fit", "planner", "gpus", "published")),
        *(f"trainer/doctor/{name}.py" for name in ("facts", "finding", "judge_machine", "judge_software", "judge_recipe", "judge_trial", "render")),
        *("trainer/learn/advantages.py", "trainer/learn/plan.py", "trainer/report/tail.py", "trainer/report/summary.py"),
        *("diffusion/engine/scheduler.py", "diffusion/kernel_names.py", "replay/policy.py", "replay/records.py", "services/client/retry.py"),
    ]
    for name in cores:
        assert not {m.split(".")[0] for m in imported(ROOT / name)} & {"ray", "torch", "redis"}, name


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=lambda f: str(f.parent.relative_to(ROOT)))
def test_a_package_init_is_a_docstring(file: Path) -> None:
    """A room's own always; a package inside a room may gather the names of its modules, and do nothing else."""
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    if file.parent.parent == ROOT:
        assert len(tree.body) == 1
    own = ".".join(file.parent.relative_to(ROOT).parts)
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").startswith(own + ".")
        else:
            assert isinstance(node, ast.Assign)
            assert ast.unparse(node.targets[0]) == "__all__"


def test_every_module_says_what_it_is() -> None:
    silent = [str(f.relative_to(ROOT)) for f in FILES if not ast.get_docstring(ast.parse(f.read_text())) and f.name != "__main__.py"]
    assert silent == []


def test_every_folder_with_code_is_a_package() -> None:
    assert {f.parent for f in FILES if not (f.parent / "__init__.py").exists()} == set()
