"""What a person is told when a run cannot start: one clear line, the right exit status, nothing left running."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline import ROOT, Run, command


def refuse(run: Run, status: int, *words: str) -> None:
    code, out, err = run.finish()
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == status, (out, err)
    assert len(lines) == 1, err
    assert "Traceback" not in out + err
    for word in words:
        assert word in lines[0], lines[0]
    assert run.leftovers() == []


def test_misspelt_key(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "objective.data_wieght=1")
    refuse(run, 2, "objective.data_wieght", "objective.data_weight")
    assert not run.folder.exists()


def test_missing_checkpoint_folder(start: Callable[..., Run]) -> None:
    refuse(start("run", "--set", "model.path=recipes/no-such-policy"), 2, "no-such-policy", "model.path")


def test_a_size_that_the_policy_cannot_sample(start: Callable[..., Run]) -> None:
    refuse(start("run", "--set", "sampler.height=160"), 2, "40x12 patches exceed pos_embed_max_size=24", "sample a smaller size")


def test_unreachable_redis_does_not_show_the_password(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "redis.url=redis://:sesame@127.0.0.1:1/0", "--set", "redis.connect_timeout_s=2")
    refuse(run, 1, "Redis", "127.0.0.1:1")
    assert all("sesame" not in file.read_text(errors="ignore") for file in run.folder.rglob("*") if file.is_file())


@pytest.mark.long
def test_a_failed_start_can_be_mended_on_the_same_folder(start: Callable[..., Run]) -> None:
    refuse(start("run", "--set", "redis.url=redis://127.0.0.1:1/0", "--set", "redis.connect_timeout_s=1"), 1, "Redis")
    refuse(start("run", "--set", "redis.url=redis://127.0.0.1:2/0", "--set", "redis.connect_timeout_s=1"), 1, "127.0.0.1:2")


def test_a_missing_prompt_file_is_found_before_anything_starts(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "prompts.kind=file", "--set", "prompts.path=no-such-file.txt")
    refuse(run, 2, "prompt file", "no-such-file.txt")
    assert not run.folder.exists()


class Broken(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def broken_rewards() -> Iterator[str]:
    """A reward service that answers every request with status 500."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.long
def test_reward_url_that_answers_500(start: Callable[..., Run], broken_rewards: str) -> None:
    refuse(start("run", "--set", f"fleet.url={broken_rewards}"), 1, broken_rewards, "500")


def test_full_disk(tmp_path: Path) -> None:
    """A real file system that is full: 8 MB of memory, mounted for this test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        refuse(Run(disk / "run"), 2, str(disk / "run"), "MB free")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: earlier\n")
    (folder / "metrics.jsonl").write_text('{"kind": "update", "step": 1}\n')
    refuse(Run(folder), 2, "--resume", str(folder))


def test_resume_of_nothing_is_refused(tmp_path: Path) -> None:
    refuse(Run(tmp_path / "run", "--resume"), 2, "nothing to resume")


def test_config_command_prints_a_comment_for_each_key() -> None:
    done = subprocess.run(command("config", "recipes/glyph-ocr.yaml"), cwd=ROOT, text=True, capture_output=True, timeout=60, check=True)
    keys = [line for line in done.stdout.splitlines() if ":" in line and not line.lstrip().startswith("#") and not line.rstrip().endswith(":")]
    assert len(keys) > 60
    assert all("  # " in line for line in keys)
