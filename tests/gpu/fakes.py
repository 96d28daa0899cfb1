"""What a child runs in place of a case where there is no GPU. Imports nothing slow."""

from __future__ import annotations

import os
import time
from typing import Any


def answer(item: dict[str, Any]) -> dict[str, Any]:
    match item["do"]:
        case "sleep":
            time.sleep(600)
        case "die":
            os._exit(3)
        case "raise":
            raise ValueError("as asked")
    return {"kind": "returned", "stuck": item["do"] == "get stuck"}
