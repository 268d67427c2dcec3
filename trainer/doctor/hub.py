"""Gathering: what the Hugging Face hub says when it is asked (`--online`). No answer shows the token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from trainer.doctor.facts import HubAnswer

DEADLINE_S = 15.0


def owner(token: str, endpoint: str | None = None, deadline_s: float = DEADLINE_S) -> HubAnswer:
    """Who the token belongs to."""
    from huggingface_hub import HfApi

    return answered(lambda: str(HfApi(endpoint).whoami(token)["name"]), deadline_s)


def access(name: str, endpoint: str | None = None, deadline_s: float = DEADLINE_S) -> HubAnswer:
    """Whether the repository `name` may be read with the token that is there, its terms accepted."""
    from huggingface_hub import HfApi, constants, errors

    def ask() -> str:
        try:
            HfApi(endpoint).auth_check(name)
        except errors.GatedRepoError:
            raise PermissionError(f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then `hf auth login`") from None
        except errors.RepositoryNotFoundError:
            raise PermissionError(f"{name} is no repository that may be read; check the name, and for a private one log in") from None
        return name

    return answered(ask, deadline_s)


def answered(ask: Callable[[], str], deadline_s: float) -> HubAnswer:
    """What `ask` returns before the deadline, or why not. It runs in a thread that nobody waits for."""
    said: queue.Queue[HubAnswer] = queue.Queue()

    def run() -> None:
        try:
            said.put(HubAnswer(who=ask()))
        except PermissionError as error:
            said.put(HubAnswer(error=str(error)))
        except Exception as error:  # of the hub's client or its HTTP library
            said.put(HubAnswer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))

    threading.Thread(target=run, daemon=True).start()
    try:
        return said.get(timeout=deadline_s)
    except queue.Empty:
        return HubAnswer(error=f"no answer within {deadline_s:.0f} s")
