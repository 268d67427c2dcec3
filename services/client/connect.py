"""Which client a run uses: REST when ``reward.url`` is set, else the Serve handle of the run's own fleet."""

from __future__ import annotations

import os

from services.client.base import RewardClient, RewardError
from services.config import RewardConfig


def connect(config: RewardConfig) -> RewardClient:
    """A client for ``config``; opens nothing yet. Imports Ray only for a fleet of this cluster."""
    if config.url is None:
        from services.client.handle import HandleRewardClient

        return HandleRewardClient(model=config.model)
    from services.client.rest import RestRewardClient

    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise RewardError(f"reward.api_key_env names {config.api_key_env}, which is not set")
    return RestRewardClient(config.url, api_key=key, model=config.model)
