"""The least that a Python gateway can be: Granian in front, aiohttp behind, bytes through. The ceiling ours is held against."""

from __future__ import annotations

import os
from typing import Any

import aiohttp

SESSION: list[aiohttp.ClientSession] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if not SESSION:
        SESSION.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    url = os.environ["UPSTREAM"] + scope["path"]
    async with SESSION[0].request(scope["method"], url, data=body, headers={"content-type": "application/json"}) as response:
        content = await response.read()
        await send({"type": "http.response.start", "status": response.status, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": content})
