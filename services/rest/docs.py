"""``GET /docs``: Swagger UI from the package ``fastapi-offline``, so that the browser asks nobody but this service.

Every address is relative, so the page works under a route prefix as well.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}
_STATIC = resources.files("fastapi_offline") / "static"
PATHS = ("/docs", *(f"/docs/{name}" for name in _TYPES))

router = APIRouter(include_in_schema=False)


def _page() -> HTMLResponse:
    script, style, icon = (f"docs/{name}" for name in _TYPES)
    page = get_swagger_ui_html(openapi_url="openapi.json", title="ddrl rewards", swagger_js_url=script, swagger_css_url=style, swagger_favicon_url=icon)
    (inline,) = re.findall(r"<script>(.*?)</script>", bytes(page.body).decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    # Swagger UI styles its elements by attributes and draws its signs as data: images.
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The page."""
    return _page()


def _add(name: str, kind: str) -> None:
    @router.get(f"/docs/{name}")
    def asset() -> Response:
        return Response((_STATIC / name).read_bytes(), media_type=kind, headers={"Cache-Control": "public, max-age=86400"})


for _name, _kind in _TYPES.items():
    _add(_name, _kind)
