"""Which client a run uses: REST when ``fleet.url`` is set, else the Serve handles of the run's own fleet."""

from __future__ import annotations

import os

from services.client.base import RewardClient, RewardError
from services.config import FleetConfig


def connect(config: FleetConfig, app: str) -> RewardClient:
    """A client for ``config``, whose own fleet is the Serve application ``app``; opens nothing yet. Raises ``RewardError``.

    Imports Ray only for a fleet of this cluster, httpx only for a URL.
    """
    if config.url is None:
        from services.client.handle import HandleRewardClient

        return HandleRewardClient(app, limits_s={name: reward.timeout_s for name, reward in config.rewards.items()})
    from services.client.rest import RestRewardClient
    from services.client.wire import Keys

    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise RewardError(f"fleet.api_key_env names {config.api_key_env}, which is not set")
    return RestRewardClient(config.url, api_key=key, keys=Keys("fleet.url", "fleet.api_key_env", "fleet.timeout_s"))
