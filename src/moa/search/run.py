"""The run directory of a search, which remembers what is done.

The result of each stage lies in a folder of its own beside a manifest, whose key is a hash of everything the result
depends on, the key of the stage before included. A stage whose key stands in its manifest is read instead of run, so a
second call resumes, and a changed setting redoes what depends on it and nothing else.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moa.errors import InputError
from moa.files import read_json, write_json
from moa.progress import SILENT, Progress

T = TypeVar("T")


class Run:
    """A run directory."""

    def __init__(self, folder: Path, progress: Progress = SILENT):
        self.folder, self.progress = folder, progress

    def stage(
        self, name: str, inputs: Mapping[str, Any], read: Callable[[Path], T], compute: Callable[[Path], T]
    ) -> tuple[T, str]:
        """Result of a stage, read if it is done for these inputs, else computed (``compute`` writes it too).

        Returns
        -------
        (result, key of the result)
        """
        canonical = json.loads(json.dumps(inputs, sort_keys=True, default=str))
        key = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.folder / name
        manifest = folder / "manifest.json"
        if manifest.is_file() and read_json(manifest).get("key") == key:
            self.progress.say(f"{name}: already done, read from {folder}")
            return read(folder), key
        manifest.unlink(missing_ok=True)  # from here on the folder's result is not that of the old key
        started = time.perf_counter()
        result = compute(folder)
        seconds = round(time.perf_counter() - started, 2)
        write_json(manifest, {"key": key, "seconds": seconds, "inputs": canonical})
        return result, key

    def finished(self, name: str) -> tuple[dict[str, Any], str]:
        """What a finished stage was computed from, and its key.

        Raises
        ------
        InputError
            If the stage has not been run here.
        """
        manifest = self.folder / name / "manifest.json"
        if not manifest.is_file():
            raise InputError(f"{self.folder} holds no finished {name} stage; run `moa {name}` (or `moa search`) first")
        found = read_json(manifest)
        return found["inputs"], found["key"]
