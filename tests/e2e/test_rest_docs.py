"""Every command of docs/rest.md, in order, as one types them: the service is really started, the answers are looked at."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.fleet.file import parse_fleet
from tests.pipeline import ROOT

PAGE = ROOT / "docs" / "rest.md"
OURS = {".venv/bin/ddrl": f"{sys.executable} -m trainer", ".venv/bin/python": sys.executable}


def lines(heading: str | None = None) -> list[str]:
    """The commands of the page, or of one section."""
    text = PAGE.read_text()
    if heading is not None:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for line in block.splitlines() if line]


class Shell:
    """One bash in a folder of its own where `docs` and `recipes` are the repository's; services go to a free port."""

    def __init__(self, folder: Path) -> None:
        self.url = ""
        self._folder = folder
        for name in ("docs", "recipes"):
            (folder / name).symlink_to(ROOT / name)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_ADDRESS", None)
        self._environment = environment
        self._bash = subprocess.Popen(["bash"], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.services: list[subprocess.Popen[str]] = []

    def type(self, line: str) -> str:
        """Run a line; its output. The line must succeed."""
        # in one pass: the interpreter's own path may hold `.venv/bin/python`
        line = re.sub("|".join(map(re.escape, OURS)), lambda found: OURS[found[0]], line)
        line = line.replace("http://127.0.0.1:8000", self.url)
        if " serve " in line:
            return self._serve(line)
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f'{line}\nS=$?; echo; echo "status $S"\n')
        self._bash.stdin.flush()
        out: list[str] = []
        while not (out and re.fullmatch(r"status \d+\n", out[-1])):
            out.append(self._bash.stdout.readline())
            assert out[-1] != "", "bash ended"
        assert out[-1] == "status 0\n", f"{line}\n{''.join(out)}"
        return "".join(out[:-1]).strip()

    def _serve(self, line: str) -> str:
        service = subprocess.Popen(
            [*line.split(), "--port", "0"], cwd=self._folder, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.services.append(service)
        assert service.stdout is not None
        out = []
        for text in service.stdout:
            out.append(text)
            if found := re.search(r"ready: (http://\S+)", text):
                self.url = found[1]
                return "".join(out)
        raise AssertionError(f"the service did not start:\n{''.join(out)}")

    def close(self) -> None:
        """End what was started, each by its own process."""
        for service in self.services:
            if service.poll() is None:
                service.send_signal(signal.SIGINT)
        for service in self.services:
            try:
                service.wait(60)
            except subprocess.TimeoutExpired:
                service.kill()
        self._bash.terminate()
        self._bash.wait(10)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.close()


@pytest.mark.long
def test_the_page_without_keys(shell: Shell) -> None:
    answers: list[tuple[str, Any]] = []
    typed = [line for line in lines() if line not in lines("Keys")]
    for line in typed:
        out = shell.type(line)
        answers.append((line, json.loads(out) if out.startswith("{") else out))
    models = next(a for line, a in answers if line.endswith("/v1/models"))
    assert [m["name"] for m in models["models"]] == ["ocr", "jpeg", "scene"]
    one = next(a for line, a in answers if "-F model=ocr" in line and "nothing" not in line)
    assert (one["results"][0]["reward"], one["results"][0]["text"]) == (1.0, "OPEN")
    two = next(a for line, a in answers if "prompt=nothing" in line)
    assert [sorted(r) for r in two["results"]] == [["reward", "scores", "text"], ["error"]]
    combined = next(a for line, a in answers if "combine=" in line)
    assert combined["combined"][0]["total"] == pytest.approx(1.0 + 0.2 * combined["rewards"]["scene"]["results"][0]["scores"]["contrast"])
    clip = next(a for line, a in answers if "/v1/score" in line and "clip.mp4" in line)
    assert clip["rewards"]["ocr"]["results"][0]["reward"] == 1.0
    assert "motion" in clip["rewards"]["scene"]["results"][0]["scores"]
    first, again = (a for line, a in answers if "step-17" in line)
    assert first == again
    assert "jpeg" in next(a for line, a in answers if "--url" in line)
    here = next(a for line, a in answers if line.endswith("--json"))
    assert here["rewards"]["ocr"]["results"] == one["results"], "the same numbers without a service"
    job = next(a for line, a in answers if line.endswith("/v1/jobs/$JOB") and "DELETE" not in line)
    assert job["status"] in ("queued", "running", "succeeded")
    assert next(a for line, a in answers if "-X DELETE" in line)["status"] in ("cancelled", "succeeded")
    assert "ddrl_reward_items_total" in next(a for line, a in answers if line.endswith("/metrics"))
    (service,) = shell.services
    service.send_signal(signal.SIGINT)
    assert service.stdout is not None
    assert "stopping: finishing what was accepted" in service.stdout.read()
    assert service.wait(60) == 0


@pytest.mark.long
def test_the_section_about_keys(shell: Shell) -> None:
    for line in lines("Keys"):
        out = shell.type(line)
        if line.endswith('(cat trainer.key)"') and "models" in line:
            assert [m["name"] for m in json.loads(out)["models"]] == ["ocr", "jpeg", "scene"]
    assert "key_missing" in shell.type("curl -s http://127.0.0.1:8000/v1/models")
    assert "scope_missing" in shell.type('curl -s http://127.0.0.1:8000/metrics -H "Authorization: Bearer $(cat trainer.key)"')
    assert shell.type("curl -s http://127.0.0.1:8000/").startswith("<!doctype html>")


def test_the_fleet_with_gpus_is_one() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    fleet = parse_fleet(yaml.safe_load(blocks[0]))
    assert fleet.needs() == {"CPU": pytest.approx(4.1), "GPU": 0.75}
    deployed = yaml.safe_load(blocks[1])["applications"][0]
    module, _, name = deployed["import_path"].partition(":")
    assert (ROOT / f"{module.replace('.', '/')}.py").read_text().count(f"def {name}(") == 1
