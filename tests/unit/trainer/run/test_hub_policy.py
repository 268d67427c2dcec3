"""A run whose policy is a hub id: checked as far as the cache knows it, then held to the commit that was found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL

from actors.prepared import Row, begin, finish, write_shard
from diffusion.checkpoint import load_policy
from diffusion.digests import codec_digest
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.run.preflight import absolute, check_files

ID = "team/glyph"
BLOCKS = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TINY_VAE = BLOCKS | {"latent_channels": 3, "norm_num_groups": 4}


@pytest.fixture
def cached(cached_policy: tuple[str, Path]) -> Path:
    """The snapshot of `ID` in the cache."""
    return cached_policy[1]


def settings(**model: object) -> RunConfig:
    return parse_config({"model": {"path": ID, "init": True, **model}})


def test_a_run_keeps_the_commit_it_found(cached: Path) -> None:
    config = settings()
    check_files(config)
    kept = absolute(config)
    assert (kept.model.path, kept.model.revision) == (ID, cached.name)
    assert absolute(kept) == kept
    policy = load_policy(kept.model)
    assert (policy.source.folder, policy.source.revision) == (cached, cached.name)


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


def test_a_prepared_set_is_held_to_the_codec_in_the_cache(cached: Path, tmp_path: Path) -> None:
    """The hub id was taken for a folder without a codec, so that every set of latents was refused and every one of pixels accepted."""
    AutoencoderKL(**TINY_VAE).save_pretrained(cached / "vae")
    begin(tmp_path / "set", {})
    rows = [Row(f"caption {i}", f"caption {i}", f"{i}.png", 9, 9) for i in range(80)]
    write_shard(tmp_path / "set", 0, np.zeros((80, 3, 8, 24), np.float32), rows, [])
    about = {"model": "made/by", "height": 16, "width": 48, "latent": (3, 8, 24)}
    tree = {"model": {"path": ID, "init": True}, "data": {"kind": "prepared", "path": str(tmp_path / "set")}, "prompts": {"kind": "glyph"}}
    finish(tmp_path / "set", 1, [], codec=codec_digest(cached), **about)
    check_files(parse_config(tree))
    finish(tmp_path / "set", 1, [], codec="pixels", **about)
    with pytest.raises(ConfigError, match="were made by another codec"):
        check_files(parse_config(tree))
    check_files(parse_config(tree | {"model": {"path": "team/other", "init": True}}))  # `ddrl config` downloads nothing
