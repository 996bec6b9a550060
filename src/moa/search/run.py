"""The run directory of a search, which remembers what is done.

The result of each stage lies in a folder of its own beside a manifest, whose key is a hash of everything the result
depends on, the key of the stage before included. A stage whose key stands in its manifest is read instead of run, so a
second call resumes, and a changed setting redoes what depends on it and nothing else. A result that cannot be read is
computed again. One process at a time works in a run directory.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from moa.errors import InputError, PlanError
from moa.files import check_writable, read_json, write_json
from moa.progress import SILENT, Progress

T = TypeVar("T")

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what a file system says that has none


class Run:
    """A run directory, locked against other processes from the first stage on, for as long as this object lives."""

    def __init__(self, folder: Path, progress: Progress = SILENT):
        self.folder, self.progress = folder, progress
        self._lock = FileLock(folder.resolve() / ".lock", timeout=0, thread_local=False, is_singleton=True)

    def stage(
        self, name: str, inputs: Mapping[str, Any], read: Callable[[Path], T], compute: Callable[[Path], T]
    ) -> tuple[T, str]:
        """Result of a stage, read if it is done for these inputs, else computed (``compute`` writes it too).

        Returns
        -------
        (result, key of the result)

        Raises
        ------
        InputError
            If another process works here, or the folder cannot be written.
        """
        self._take()
        canonical = json.loads(json.dumps(inputs, sort_keys=True, default=str))
        key = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.folder / name
        manifest = folder / "manifest.json"
        try:
            if manifest.is_file() and read_json(manifest).get("key") == key:
                result = read(folder)
                self.progress.say(f"{name}: already done, read from {folder}")
                return result, key
        except (InputError, PlanError) as error:
            self.progress.say(f"{name}: was done, but {error}; done again")
        check_writable(manifest)
        manifest.unlink(missing_ok=True)  # from here on the folder's result is not that of the old key
        started = time.perf_counter()
        result = compute(folder)
        seconds = round(time.perf_counter() - started, 2)
        write_json(manifest, {"key": key, "seconds": seconds, "inputs": canonical})
        return result, key

    def _take(self) -> None:
        if self._lock.is_locked or (self.folder.is_dir() and not os.access(self.folder, os.W_OK)):
            return  # what cannot be written can still be read
        check_writable(self.folder / ".lock")
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another process works in {self.folder}; wait for it, or choose another --run-dir"
            ) from error
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise InputError(
                    f"cannot lock {self.folder}: {error}; delete its .lock, or choose another --run-dir"
                ) from error
            self.progress.say(f"{self.folder} is on a file system without locks: run one search at a time there")

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
