"""What a child runs in place of a case where there is no GPU. Imports nothing slow."""

from __future__ import annotations

import os
import time
from typing import Any

from gpu.children import progress


def answer(item: dict[str, Any]) -> dict[str, Any]:
    match item["do"]:
        case "sleep":
            progress(round=1)
            progress(round=2)
            time.sleep(600)
        case "die":
            os._exit(3)
        case "raise":
            raise ValueError("as asked")
    return {"kind": "returned", "stuck": item["do"] == "get stuck"}
