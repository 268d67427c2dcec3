"""The weight store: which versions there are and where their slices lie. Tables only: neither torch nor a byte of weights.

    hand_in(rank 0) … hand_in(rank R-1) ─► visible ─► newest ─► older than the newest two and wanted by no evaluation ─► forgotten
                                              └─ lost: a reader found it damaged or gone

Invariants: a version is visible when every rank has handed in and its slices cover every tensor. Shards of several starts of the learner
(lineages) are never mixed; a version of a later lineage cuts off those of earlier ones that it replaces. What a restarted store finds is
what its transport recalls: everything in a folder, nothing of objects, which the learner hands in again when it waits for groups.

    >>> store = WeightStore(FolderTransport(folder))
    >>> [store.hand_in(Shard(1, 5, rank, 2, entries[rank])) for rank in range(2)]
    [False, True]
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actors.weights.table import Name, Shard, Table, TableError, complete
from actors.weights.transport import Objects, Transport, WeightsGone

if TYPE_CHECKING:
    from actors.weights.reading import OpenVersion

log = logging.getLogger(__name__)

KEEP = 2
"""Newest versions that are kept: a reader of the one before the newest is not cut off."""


class VersionGone(WeightsGone):
    """A version that the store does not keep any more."""


class Superseded(RuntimeError):
    """A shard of a learner group that has been started again since."""


@dataclass(frozen=True)
class View:
    """A visible version: its table, and how its bytes are reached."""

    table: Table
    transport: Transport
    objects: Objects

    @property
    def version(self) -> int:
        return self.table.version

    def open(self, deadline_s: float) -> OpenVersion:
        """Fetch and check all of it; see `actors.weights.reading.open_version`."""
        from actors.weights.reading import open_version  # brings torch, which the store does without

        return open_version(self, deadline_s)


@dataclass(frozen=True)
class _Version:
    table: Table
    objects: Objects
    wanted: bool


class WeightStore:
    """Plain class; the driver makes it a Ray actor. Every method may be called again with the same arguments.

    Args:
        transport: the one that the ranks write with.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._visible: OrderedDict[Name, _Version] = OrderedDict()  # oldest first
        self._arriving: dict[int, tuple[Shard, Objects]] = {}  # by rank, of one version
        for shard in transport.recall():
            try:
                self._take(shard, {})
            except (TableError, Superseded) as error:
                log.warning("weights that were there before are not used: %s", error)

    def pid(self) -> int:
        """Process id."""
        return os.getpid()

    def hand_in(self, shard: Shard, objects: Objects) -> bool:
        """Take one rank's shard of a version; True when the version is complete and visible.

        Raises:
            Superseded: the learner has been started again meanwhile.
            TableError: all ranks have handed in, and their slices do not make a version; nothing of it is kept.
        """
        newest = self._newest
        if newest is not None and shard.lineage == newest[0] and shard.version <= newest[1]:
            return shard.name in self._visible  # asked again: the store died before it could answer
        self._transport.remember(shard)
        return self._take(shard, objects)

    def _take(self, shard: Shard, objects: Objects) -> bool:
        seen = max(self._arriving_name or shard.name, self._newest or shard.name)
        if shard.lineage < seen[0]:
            self._transport.forget(shard.name)
            raise Superseded(f"version {shard.version} is of start {shard.lineage} of the learner, and start {seen[0]} has handed in already")
        if self._arriving_name not in (None, shard.name):
            self._drop_arriving()
        self._arriving[shard.rank] = shard, objects
        if len(self._arriving) < shard.world:
            return False
        arrived, self._arriving = list(self._arriving.values()), {}
        try:
            table = complete([shard for shard, _ in arrived])
        except TableError:
            self._transport.forget(shard.name)
            raise
        self._show(_Version(table, {k: v for _, found in arrived for k, v in found.items()}, any(shard.wanted for shard, _ in arrived)))
        return True

    @property
    def _newest(self) -> Name | None:
        return next(reversed(self._visible), None)

    @property
    def _arriving_name(self) -> Name | None:
        return next((shard.name for shard, _ in self._arriving.values()), None)

    def _drop_arriving(self) -> None:
        name = self._arriving_name
        self._arriving = {}
        if name is not None and name not in self._visible:
            self._transport.forget(name)

    def _show(self, version: _Version) -> None:
        name = version.table.name
        for cut_off in [n for n in self._visible if n[1] >= name[1]]:  # the learner went back to a checkpoint
            self._forget(cut_off)
        self._visible[name] = version
        self._forget_old()
        self._transport.sweep(name, self._visible)

    def _forget(self, name: Name) -> None:
        del self._visible[name]
        self._transport.forget(name)

    def _forget_old(self) -> None:
        for name in list(self._visible)[:-KEEP]:
            if not self._visible[name].wanted:
                self._forget(name)

    def version(self) -> int | None:
        """Newest version, None before the first."""
        return None if self._newest is None else self._newest[1]

    def stands(self, name: Name) -> bool:
        """Whether a version can be read: its learner hands it in again if not, and if someone may be waiting for it."""
        return name in self._visible

    def view(self, have: Name | None = None, exact: int | None = None) -> View | None:
        """The newest version, or None if the caller already has it (`have` is its name) or there is none yet.

        With `exact`, that version and no other. Raises VersionGone when it is not kept.
        """
        if exact is None:
            name = self._newest
            if name is None or (have is not None and have >= name):
                return None
        else:
            name = next((n for n in self._visible if n[1] == exact), None)
            if name is None:
                raise VersionGone(f"version {exact} is not kept any more; the store has {[version for _, version in self._visible]}")
        found = self._visible[name]
        return View(found.table, self._transport, found.objects)

    def release(self, version: int | None = None) -> None:
        """No evaluation waits for a version any more; None = for any."""
        for name in [n for n in self._visible if version in (None, n[1])]:
            self._visible[name] = replace(self._visible[name], wanted=False)
            self._transport.release(name)
        self._forget_old()

    def lost(self, name: Name, reason: str) -> None:
        """A reader could not read a version: nobody else shall try, and it is handed in again when someone waits for it."""
        if name in self._visible:
            log.warning("version %d is not served any more: %s", name[1], reason)
            self._forget(name)
