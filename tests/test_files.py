"""Files are written whole or not at all."""

import resource
from contextlib import contextmanager

import numpy as np
import pytest

from moa.errors import InputError
from moa.files import write_tensors, write_text


@contextmanager
def disk_of(size):
    """No file may be larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_tensors(path, {"a": np.zeros(1 << 18)}),
        lambda path: write_text(path, "a" * (1 << 21)),
    ],
    ids=["tensors", "text"],
)
def test_what_does_not_fit_leaves_nothing(tmp_path, write):
    with disk_of(1 << 20), pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size >= 1 << 21
