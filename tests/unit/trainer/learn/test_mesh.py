"""Meshes of real gloo ranks against one rank: sequence ranks, FSDP beside them, replicas (HSDP), and all three.

Ranks in processes of their own run scenarios of `ranks.py`, while the one rank of this process does the same. What a group computes may
not depend on its mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion.families.wan.tiny import write_tiny
from tests.gloo import DEADLINE_S, alone, launched
from tests.unit.trainer.learn.claims import assert_handed_in, assert_same, assert_same_state, assert_same_updates, write_claim, write_policy
from tests.unit.trainer.learn.mesh_ranks import MESHES, names_of, self_tested
from tests.unit.trainer.learn.ranks import CPU, SAVED, UPDATES, checkpoint_of, resumed, scenario, transport_of
from trainer.config.learner import LearnerConfig
from trainer.learn.parallel import mesh_of

Found = dict[str, Any]
Ranks = Callable[[str], list[Found]]
FOUR = pytest.mark.long


def on_meshes(saved: bool = False) -> pytest.MarkDecorator:
    """Every scenario on every mesh; those of four ranks in the long suite."""
    cases = [(label, name) for label, mesh in MESHES.items() for name in names_of(mesh["ranks"]) if not saved or name in SAVED]
    marked = [pytest.param(label, name, marks=FOUR if MESHES[label]["ranks"] > 2 else ()) for label, name in cases]
    return pytest.mark.parametrize(("label", "name"), marked)


every_mesh = pytest.mark.parametrize("label", [pytest.param(label, marks=FOUR if mesh["ranks"] > 2 else ()) for label, mesh in MESHES.items()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("meshes")
    write_policy(made)
    write_tiny(made / "wan")
    for name in names_of(4):
        write_claim(made, name)
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Callable[[str], Found]]:
    """What one rank makes of a scenario; its group stays for the tests."""
    made: dict[str, Found] = {}

    def find(name: str) -> Found:
        if name not in made:
            made[name] = scenario(name, folder, 0, 1)
        return made[name]

    with alone():
        for name in SAVED:  # the meshes load its checkpoints
            find(name)
        yield find


@pytest.fixture(scope="module")
def ranks(folder: Path, one: Callable[[str], Found]) -> Ranks:
    """What each rank of a mesh made of all scenarios."""
    made: dict[int, list[Found]] = {}

    def find(label: str) -> list[Found]:
        world = MESHES[label]["ranks"]
        if world not in made:
            (folder / "store").unlink(missing_ok=True)
            made[world] = launched("tests.unit.trainer.learn.mesh_ranks", world, folder, 8 * DEADLINE_S)
        return [rank[label] for rank in made[world]]

    return find


@on_meshes()
def test_a_mesh_computes_what_one_rank_does(label: str, name: str, one: Callable[[str], Found], ranks: Ranks) -> None:
    expected = one(name)
    for rank in ranks(label):
        assert_same_updates(rank[name]["said"], expected["said"])
        assert_same_state(name, rank[name]["state"], expected["state"])
    assert all(s["grad_norm"] > 1e-5 and not s["skipped"] for s in expected["said"])  # the scenario moves something


@on_meshes()
def test_what_a_mesh_hands_in_is_the_trained_policy_to_the_bit(label: str, name: str, folder: Path, ranks: Ranks) -> None:
    """Every slice once, whatever is replicated."""
    found = [rank[name] for rank in ranks(label)]
    assert_handed_in(found, transport_of(folder, name, label))
    places = [(entry.name, entry.start) for rank in found for entry in rank["published"].entries]
    assert len(places) == len(set(places))


@on_meshes(saved=True)
def test_a_checkpoint_of_one_rank_is_loaded_by_a_mesh(label: str, name: str, one: Callable[[str], Found], ranks: Ranks) -> None:
    expected = one(name)
    for rank in ranks(label):
        assert_same(rank[f"{name}, resumed"]["state"], expected["state"], rtol=0)
        assert_same_updates(rank[f"{name}, resumed"]["next"], expected["next"])
        assert_same_state(name, rank[f"{name}, resumed"]["next state"], expected["next state"])


@on_meshes(saved=True)
def test_a_checkpoint_of_a_mesh_is_loaded_by_one_rank(label: str, name: str, folder: Path, one: Callable[[str], Found], ranks: Ranks) -> None:
    expected = ranks(label)[0][name]
    found = resumed(name, folder, saved_by=label)
    assert found["progress"].step == UPDATES
    assert_same(found["state"], expected["state"], rtol=0)
    assert_same_updates(found["next"], expected["next"])
    waited, trained = (checkpoint_of(folder, name, label, background) for background in (False, True))
    assert all((waited / f.name).read_bytes() == f.read_bytes() for f in trained.glob("*.distcp"))


@every_mesh
def test_ranks_that_share_rows_count_them_once_in_the_self_test(label: str, folder: Path, one: Callable[[str], Found], ranks: Ranks) -> None:
    alone = self_tested(folder)
    for rank in ranks(label):
        found = rank["self-test"]
        assert found == ranks(label)[0]["self-test"]
        assert found["transitions"] == alone["transitions"] * MESHES[label]["ranks"] // MESHES[label].get("sequence_ranks", 1)
        assert found["largest"] < 1e-4


def test_ranks_that_form_no_mesh_are_refused(one: Callable[[str], Found]) -> None:
    with pytest.raises(ValueError, match=r"1 ranks are no multiple of learner\.replicas=1 x learner\.sequence_ranks=2"):
        mesh_of(CPU, LearnerConfig(ranks=4, sequence_ranks=2))
