"""What an interrupted command leaves for its next call to go on from: a file beside the result it was to write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa.errors import InputError
from moa.files import check_writable, read_json, write_json


class Partial:
    """The unfinished result of a command.

    Parameters
    ----------
    result : Path or None
        Where the result is to be written; with None nothing is kept.
    settings : mapping
        What the numbers depend on, as JSON. What was left with other settings is not gone on from.

    Attributes
    ----------
    left : dict
        What an interrupted call with the same settings has kept; nothing otherwise.

    Raises
    ------
    InputError
        If the place cannot be written, or the name is not that of a JSON file: a table of the same name lies beside it.
    """

    def __init__(self, result: Path | None, settings: Mapping[str, Any]):
        self._settings = dict(settings)
        self._file = result.with_suffix(".partial.json") if result else None
        self.left: dict[str, Any] = {}
        if result:
            if result.suffix != ".json":
                raise InputError(f"--json {result}: expected a name that ends in .json, such as {result}.json")
            check_writable(result)
        if self._file and self._file.is_file():
            found = read_json(self._file)
            if all(found.get(name) == value for name, value in settings.items()):
                self.left = found

    def keep(self, found: Mapping[str, Any]) -> None:
        """Write what there is so far, all or nothing."""
        if self._file:
            write_json(self._file, {**self._settings, **found})

    def finish(self) -> None:
        """The result is written: nothing is left."""
        if self._file:
            self._file.unlink(missing_ok=True)
