"""``GET /`` and the figures it shows. One self-contained file: nothing is fetched from anywhere else.

The content security policy allows the page's own script and style by their hashes, requests to this service, and nothing
more; whatever a scorer or a client wrote is set as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from services.jobs.api import Jobs
from services.rest.ingress import services_of
from services.rest.problems import documented
from services.rest.schemas import FleetStatus

_HTML = (resources.files("services.page") / "index.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", _HTML, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" for block in blocks)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; img-src blob: data:; media-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def page_router(jobs: Jobs) -> APIRouter:
    """The page, and ``GET /v1/status`` with the figures on it."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """The page; it asks for a key itself where one is needed."""
        return HTMLResponse(_HTML, headers=HEADERS)

    @router.get("/v1/status", responses=documented(401, 403, 500))
    async def status(request: Request) -> FleetStatus:
        """Health, queues and latency of every reward, and the jobs, as this ingress process sees them."""
        services = services_of(request)
        models, counts = await services.backend.health(), await jobs.counts()
        services.metrics.health(models)
        return FleetStatus(models=models, jobs=counts)

    return router
