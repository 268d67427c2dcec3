"""Where a policy comes from: folders, and hub ids against a hub on loopback with the hub's own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.families.sd3.tiny import write_tiny
from diffusion.source import CheckpointError, belongs, is_hub_id, locate
from tests.unit.diffusion.hub import COMMIT

ROOT = Path(__file__).resolve().parents[3]
ID = "team/sd3-tiny"
NOISE = (
    "README.md",
    "sd3.5_medium.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
)
"""What published repositories also hold."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a hub with a whole policy and a gated one."""
    root = tmp_path_factory.mktemp("hub")
    write_tiny(root / ID)
    for name in NOISE:
        (root / ID / name).parent.mkdir(exist_ok=True)
        (root / ID / name).write_bytes(b"not wanted")
    (root / "team" / "gated").mkdir()
    (root / "team" / "gated" / "model_index.json").write_text("{}")
    command = [sys.executable, "-m", "tests.unit.diffusion.hub", str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}", root
        server.kill()


LOCATE = """
import json, sys
from diffusion.source import CheckpointError, locate
try:
    source = locate(sys.argv[1], sys.argv[2] or None)
    print(json.dumps([str(source.folder), source.revision]))
except CheckpointError as error:
    print(json.dumps([str(error), None]))
"""


def found(endpoint: str, cache: Path, name: str, revision: str = "", **env: str) -> tuple[str, str | None]:
    """`locate` in a process of its own: the client reads its environment when it is imported. Folder and commit, or the error and None."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", LOCATE, name, revision], cwd=cache, env=own, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    what, commit = json.loads(done.stdout)
    return what, commit


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_hub_id_becomes_a_snapshot_of_what_a_policy_needs(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, root = hub
    folder, commit = found(endpoint, tmp_path, ID)
    assert commit == COMMIT
    assert files(Path(folder)) == files(root / ID) - set(NOISE)
    for name in files(Path(folder)):
        assert (Path(folder) / name).read_bytes() == (root / ID / name).read_bytes()
    asked = (root / "asked.txt").read_text()
    assert found(endpoint, tmp_path, ID, COMMIT) == (folder, COMMIT)  # once found, nothing is asked for again
    assert (root / "asked.txt").read_text() == asked
    for revision in ("", "main", COMMIT):  # nor is there need of a network
        assert found(endpoint, tmp_path, ID, revision, HF_HUB_OFFLINE="1") == (folder, COMMIT)
    assert found("http://127.0.0.1:9", tmp_path, ID) == (folder, COMMIT)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("team/gated", "", ["team/gated is gated", "accept its terms at http://127.0.0.1", "HF_TOKEN"]),
        (ID, "v9", [f"{ID} has no revision v9", "model.revision"]),
        ("team/nothing", "", ["team/nothing is neither a folder here nor a repository", "hf auth login"]),
    ],
)
def test_the_hub_s_refusals_say_what_to_do(name: str, revision: str, words: list[str], hub: tuple[str, Path], tmp_path: Path) -> None:
    message, commit = found(hub[0], tmp_path, name, revision)
    assert commit is None
    for word in words:
        assert word in message


def test_without_network_and_snapshot_the_error_says_how_to_get_one(hub: tuple[str, Path], tmp_path: Path) -> None:
    for endpoint, env in ((hub[0], {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})):
        message, commit = found(endpoint, tmp_path, ID, "main", **env)
        assert commit is None
        for word in (f"{ID}@main is no folder here", str(tmp_path), f"hf download {ID} --revision main", "set model.path to a folder"):
            assert word in message


def test_half_a_snapshot_is_none(hub: tuple[str, Path], tmp_path: Path) -> None:
    folder, _ = found(hub[0], tmp_path, ID)
    (Path(folder) / "vae" / "config.json").unlink()
    message, commit = found(hub[0], tmp_path, ID, HF_HUB_OFFLINE="1")
    assert commit is None
    assert "no complete snapshot" in message
    assert found(hub[0], tmp_path, ID) == (folder, COMMIT)
    assert (Path(folder) / "vae" / "config.json").exists()


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name").folder == Path("owner/name")
    assert locate("owner/name").revision is None
    assert is_hub_id("other/name")
    for path in ("owner/name", "owner/nam", str(tmp_path / "x"), "a/b/c", "name", "../x/y", "~/policy", ""):
        assert not is_hub_id(path), path
    with pytest.raises(CheckpointError, match=r"checkpoint folder owner/nam does not exist; set model\.path to a folder .* or to a hub id"):
        locate("owner/nam")
    with pytest.raises(CheckpointError, match=r"model\.revision=main is of a hub repository, but model\.path owner/name is a folder here"):
        locate("owner/name", "main")


def test_what_belongs_to_a_policy() -> None:
    yes = ["model_index.json", "vae/config.json", "transformer/diffusion_pytorch_model-00002-of-00003.safetensors", "tokenizer_3/spiece.model"]
    yes += ["text_encoder_3/model.safetensors.index.json", "tokenizer/merges.txt", "text_encoder_3/model-00001-of-00002.safetensors"]
    assert [name for name in yes if not belongs(name)] == []
    assert [name for name in (*NOISE, "a/b/config.json", "LICENSE.txt") if belongs(name)] == []
