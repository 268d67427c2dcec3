"""The rewards of a run: which are trained with which weight, which are only looked at, and where they are scored."""

from __future__ import annotations

from dataclasses import dataclass

from actors.groups import Weighted
from services.client.base import RewardClient
from services.client.connect import connect
from services.config import FleetConfig
from services.terms import Term


@dataclass(frozen=True)
class RunRewards:
    """Plain settings that pickle.

    Attributes:
        fleet: exactly the rewards of this run, or the URL of a service that has them.
        app: Serve application of the run's own fleet.
        trained: what the policy is trained on.
        held_out: what evaluations score besides.
        fill_mean: a score that failed counts as the mean of its group; else its member is left out.
    """

    fleet: FleetConfig
    app: str
    trained: tuple[Weighted, ...] = ()
    held_out: tuple[Term, ...] = ()
    fill_mean: bool = False

    @property
    def trained_names(self) -> list[str]:
        """Rewards to ask for a group, each once."""
        return list(dict.fromkeys(w.term.reward for w in self.trained))

    @property
    def terms(self) -> list[Term]:
        """Everything that an evaluation scores, trained terms first."""
        return list(dict.fromkeys([*(w.term for w in self.trained), *self.held_out]))

    @property
    def names(self) -> list[str]:
        """Rewards to ask in an evaluation, each once."""
        return list(dict.fromkeys(term.reward for term in self.terms))

    @property
    def own_needs(self) -> dict[str, float]:
        """Ray resources of the run's own fleet; none where a service was given."""
        return {} if self.fleet.url is not None or not self.names else {str(kind): need for kind, need in self.fleet.needs(http=False).items()}

    def connect(self) -> RewardClient:
        """A client; opens nothing yet."""
        return connect(self.fleet, self.app)
