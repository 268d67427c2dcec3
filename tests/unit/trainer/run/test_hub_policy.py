"""A run whose policy is a hub id: checked as far as the cache knows it, then held to the commit that was found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from diffusion.checkpoint import load_policy
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.run.preflight import absolute, check_files

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
ID = "team/glyph"


@pytest.fixture
def cached(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one snapshot in it and no network; the snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--team--glyph"
    shutil.copytree(policy_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def settings(**model: object) -> RunConfig:
    return parse_config({"model": {"path": ID, "init": True, **model}})


def test_a_run_keeps_the_commit_it_found(cached: Path) -> None:
    config = settings()
    check_files(config)
    kept = absolute(config)
    assert (kept.model.path, kept.model.revision) == (ID, COMMIT)
    assert absolute(kept) == kept
    policy = load_policy(kept.model)
    assert policy.source is not None
    assert (policy.source.folder, policy.source.revision) == (cached, COMMIT)


def test_what_the_cache_holds_is_checked_at_once(cached: Path) -> None:
    (cached / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.path: .*scheduler_config\.json is missing"):
        check_files(settings())


def test_what_it_does_not_hold_is_refused_when_the_run_needs_it(cached: Path) -> None:
    config = settings(path="team/other")
    check_files(config)  # `ddrl config` downloads nothing
    with pytest.raises(ConfigError, match="model: team/other is no folder here, cannot be downloaded"):
        absolute(config)
    with pytest.raises(ConfigError, match=r"model: .*holds no complete snapshot"):
        absolute(settings(revision="v2"))


def test_a_folder_has_no_revision(policy_folder: Path) -> None:
    config = settings(path=str(policy_folder), revision="main")
    with pytest.raises(ConfigError, match=r"model\.revision=main is of a hub repository"):
        check_files(config)
    assert absolute(settings(path=str(policy_folder))).model.path == str(policy_folder.resolve())
