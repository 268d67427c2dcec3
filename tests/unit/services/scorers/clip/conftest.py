"""Tiny random models in the layouts of the published ones, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.scorers.clip.tiny import write_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder
