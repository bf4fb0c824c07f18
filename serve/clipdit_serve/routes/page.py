"""GET /: a page to try the service with. One file, nothing outside it; it calls POST /v1/translate as everybody else does."""

import base64
import hashlib
import html
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from clipdit_serve.variants import Variants

NO_CHOICE = '<select id="variant"></select>'
"""What stands in the page where several variants are chosen from."""


def router(engines: Variants) -> APIRouter:
    routes = APIRouter()
    text = (files("clipdit_serve") / "assets" / "page.html").read_text("utf-8")
    if engines.several:  # here and not by a request of the page's: without a key it would be refused
        options = "".join(f"<option>{html.escape(name)}</option>" for name in engines)
        text = text.replace(NO_CHOICE, NO_CHOICE.replace("></", f">{options}</"))
    headers = {"content-security-policy": _policy(text), "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return routes


def _policy(text: str) -> str:
    """Only the script and the styles that are in the page, and requests to this service alone."""
    allowed = []
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode("ascii")
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    rest = "default-src 'none'; img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return "; ".join([rest, *allowed])
