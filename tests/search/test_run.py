"""The run directory: what is done is read, what cannot be read is done again, and one process at a time works there."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from moa.errors import InputError
from moa.progress import Progress
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


def test_threads_of_one_process_share_the_lock(tmp_path):
    stage(mine := Run(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(stage, mine).result() == ("first", False)
        assert pool.submit(stage, Run(tmp_path)).result() == ("first", False)


@pytest.mark.parametrize("damage", ["", "{"])
def test_a_manifest_that_cannot_be_read_is_none(tmp_path, damage):
    run = Run(tmp_path)
    stage(run)
    (tmp_path / "calibrate" / "manifest.json").write_text(damage)
    assert stage(run) == ("first", True)


def test_what_is_done_can_be_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    stage(Run(tmp_path))
    (tmp_path / ".lock").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert stage(Run(tmp_path)) == ("first", False)
    assert not (tmp_path / ".lock").exists()


def test_a_lock_of_another_user_is_one_line(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(InputError, match=r"cannot lock .*delete its \.lock"):
        stage(Run(tmp_path))


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def fail(self, *arguments, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", fail)
    said = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    assert stage(Run(tmp_path, progress)) == ("first", True)
    assert "without locks" in said[0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        stage(Run(tmp_path / "file"))
