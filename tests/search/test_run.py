"""The run directory: what is done is read, what cannot be read is done again, and one process at a time works there."""

import json

import pytest
from filelock import FileLock

from moa.errors import InputError
from moa.search.run import Run


def stage(run, value="first", name="calibrate"):
    """What a stage of one number gives, and whether it was computed."""
    computed = []

    def compute(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "value.json").write_text(json.dumps(value))
        computed.append(value)
        return value

    def read(folder):
        try:
            return json.loads((folder / "value.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is damaged") from error

    result, _ = run.stage(name, {"value": value}, read, compute)
    return result, bool(computed)


def test_what_is_done_is_read(tmp_path):
    run = Run(tmp_path / "run")
    assert stage(run) == ("first", True)
    assert stage(run) == ("first", False)
    assert stage(Run(tmp_path / "run")) == ("first", False)
    assert stage(run, "other") == ("other", True)
    assert stage(run) == ("first", True)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("[")])
def test_a_result_that_cannot_be_read_is_computed_again(tmp_path, damage):
    run = Run(tmp_path)
    stage(run)
    damage(tmp_path / "calibrate" / "value.json")
    assert stage(run) == ("first", True)
    assert stage(run) == ("first", False)


def test_another_process_is_kept_out_until_the_first_is_done(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="another process works in"):
        stage(Run(tmp_path))
    assert not (tmp_path / "calibrate").exists()
    mine = Run(tmp_path)
    stage(mine)
    assert stage(Run(tmp_path)) == ("first", False), "the same process"
    with pytest.raises(TimeoutError):
        FileLock(tmp_path / ".lock", timeout=0).acquire()
    del mine
    FileLock(tmp_path / ".lock", timeout=0).acquire()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        stage(Run(tmp_path / "file"))
