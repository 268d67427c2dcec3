"""Commands and examples of the README and the docs: what stands there runs.

Python examples are executed. Shell commands are sorted by what they are: `make` targets are dry-run, `ddrl config` and
`ddrl train` are checked against the command line and the recipe here, and run whole, at reduced size, in the long tests;
`ddrl plan` and `ddrl doctor` run as they stand; `ddrl replay` runs on a small ledger; the options of scripts are looked up in their help.
A command of a kind that is not listed here fails the test: add a way to run it.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from tests.mixed_pictures import write_folder
from tests.pipeline import REDUCED, ROOT, command, settings
from trainer.cli.main import app
from trainer.config.load import load_config
from trainer.run.folder import RunFolder

RUN_ELSEWHERE = {"rest.md": "tests/e2e/test_rest_docs.py", "add-a-model.md": "tests/e2e/test_add_a_model.py"}
PAGES = sorted(p for p in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")] if ".venv" not in p.parts and p.name not in RUN_ELSEWHERE)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


COMMANDS = sorted({line.strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line.strip() and not line.startswith("#")})
EXAMPLES = [(page, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]
NEEDS_A_CLUSTER = ("ray ", "curl ", "export ", "redis-server ")
"""Starts of commands for somebody else's cluster or a running service: their form is checked by other tests."""


def test_there_are_commands() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        done = subprocess.run([*words, "-n"], cwd=ROOT, text=True, capture_output=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
    elif words[:2] == [".venv/bin/ddrl", "replay"]:
        run_replay(words[1:], tmp_path)
    elif words[:2] == [".venv/bin/ddrl", "plan"]:
        result = CliRunner().invoke(app, words[1:])  # itself: it starts nothing
        assert result.exit_code == 0, result.output
    elif words[:2] == [".venv/bin/ddrl", "doctor"]:
        result = CliRunner().invoke(app, words[1:])  # itself; the exit status is this machine's
        assert result.exit_code in (0, 1), result.output
        assert "redis-server" in result.output
    elif words[0] == ".venv/bin/ddrl":
        check_ddrl(words[1:])
    elif words[0] == ".venv/bin/python":
        check_script(words[1:])
    else:
        assert line.startswith(NEEDS_A_CLUSTER), f"no test runs commands like {line!r}"


def check_ddrl(words: list[str]) -> None:
    """Every option is one of the command's; settings of `train` resolve with its recipe."""
    named = words[:2] if words[0] == "data" else words[:1]
    usage = subprocess.run(command(*named, "--help"), cwd=ROOT, text=True, capture_output=True, timeout=60, check=True).stdout
    for option in (w for w in words if w.startswith("--")):
        assert option in usage, option
    if words[0] in ("train", "config"):
        chosen = [f"{a}={b}" if a != "--set" else b for a, b in itertools.pairwise(words) if a == "--set"]
        load_config(ROOT / words[1], chosen)  # without looking for the files that a reader has


def check_script(words: list[str]) -> None:
    """Every option is one that the script's own help names."""
    script = words[:2] if words[0] == "-m" else words[:1]
    usage = subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, text=True, capture_output=True, timeout=60, check=True).stdout
    for option in (w for w in words[len(script) :] if w.startswith("--")):
        assert option in usage, option


def run_replay(words: list[str], tmp_path: Path) -> None:
    """The command itself, on a run at rest: 20 groups, number 17 dead, nothing in anybody's hands."""
    folder = RunFolder(tmp_path / "run")
    folder.open(load_config(ROOT / "recipes" / "glyph-ocr.yaml"), resume=False)
    folder.close()
    with EmbeddedRedis.start(folder.redis) as server:
        buffer = ReplayBuffer(connect(server.url), "glyph-ocr", BufferSettings(groups_per_step=20, max_attempts=1))
        buffer.initialise()
        leases = [buffer.lease("generator-0", 0) for _ in range(20)]
        for lease in leases:
            assert lease is not None
            if lease.group == 17:
                buffer.fail(lease, "scoring: no text found")
            else:
                buffer.commit(lease, b"payload", [0.0, 1.0], 0)
        line = [server.url if word.startswith("redis://") else word for word in words]
        if "--url" in line:
            done = subprocess.run(command(*line), cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            return
    line = [word.replace("runs/glyph-ocr", str(folder.path)) for word in words]
    done = subprocess.run(command(*line), cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(("page", "index", "code"), EXAMPLES, ids=lambda value: value.parent.name if isinstance(value, Path) else "")
def test_example(page: Path, index: int, code: str, tmp_path: Path) -> None:
    if "start_fleet" in code:
        pytest.skip("a reward fleet: tests/integration/services runs the same calls on a real cluster")
    # in a folder of its own: what an example leaves behind must not meet the next run of it
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, f"{page} example {index}\n{done.stderr}"


@pytest.mark.long
def test_readme_use_it_section_at_reduced_size(tmp_path: Path) -> None:
    """The `ddrl` commands of the README in their order, as one would type them."""
    lines = [shlex.split(line) for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines() if line.startswith(".venv/bin/ddrl")]
    assert [words[1] for words in lines] == ["config", "train", "train", "report", "eval", "replay", "sample", "presample", "prepare-data"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "407"\na sign that says "22"\n')
    done = []
    for words in lines:
        arguments = [w.replace("runs/", f"{tmp_path}/") for w in words[1:]]
        if arguments[0] == "train":
            arguments += [*settings(*REDUCED), "--run-dir", str(tmp_path / "mine")]
        if arguments[0] == "report":
            arguments = ["report", str(tmp_path / "mine"), str(tmp_path / "mine")]
        if arguments[0] == "eval":
            arguments = ["eval", str(tmp_path / "mine"), "--out", str(tmp_path / "evaluations")]
        if arguments[0] == "replay":
            arguments = [w.replace("glyph-ocr", "mine") for w in arguments]
        if arguments[0] == "sample":
            arguments = [w.replace("prompts.txt", str(prompts)) for w in arguments] + ["--out", str(tmp_path / "samples")]
        if arguments[0] == "presample":
            arguments = [w.replace("sets/", f"{tmp_path}/").replace("400", "12") for w in arguments]
        if arguments[0] == "prepare-data":
            arguments = [
                "prepare-data",
                str(write_folder(tmp_path / "source", 20)),
                *(w.replace("sets/", f"{tmp_path}/") for w in arguments[2:]),
                "--max-broken",
                "0.5",
            ]
        done.append(subprocess.run(command(*arguments), cwd=ROOT, text=True, capture_output=True, timeout=420, check=False))
        assert done[-1].returncode == 0, done[-1].stderr
    assert (tmp_path / "mine" / "comparison.html").exists()
    assert (tmp_path / "evaluations" / "report.html").exists()
    assert (tmp_path / "samples" / "grid.png").exists()
    assert [(tmp_path / name / "prepared.json").exists() for name in ("signs", "pictures")] == [True, True]
