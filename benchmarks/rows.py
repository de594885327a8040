"""Rows of a benchmark in a JSON file that an interrupted run goes on with."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

import jaxq


class Rows:
    """Rows that are written one by one, with the settings, the device and the versions that made them.

    A row is told from others by `names`. SystemExit if the file is of a run with other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], names: tuple[str, ...]):
        versions = {"jax": jax.__version__, "jaxq": jaxq.__version__, "python": platform.python_version()}
        device = jax.devices()[0].device_kind
        self.path, self.names = path, names
        self.known: dict[str, Any] = {"settings": settings, "device": device, "versions": versions, "rows": []}
        if path and path.exists():
            before = json.loads(path.read_text())
            if before["settings"] != settings:
                raise SystemExit(f"{path} is of another run: {before['settings']}; name another file")
            self.known["rows"] = before["rows"]

    def __contains__(self, row: tuple[Any, ...]) -> bool:
        return any(tuple(known[name] for name in self.names) == row for known in self.known["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Writes the whole file anew, and puts it in place only when it is whole."""
        # JSON has no NaN.
        self.known["rows"].append({k: None if v != v else v for k, v in row.items()})
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(self.known, indent=1) + "\n")
            os.replace(part, self.path)
