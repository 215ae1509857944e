import errno
import os
import stat

import pytest

from fastlm.files import atomic_directory, atomic_write


def test_atomic_write_replaces_the_file_with_all_that_was_written(tmp_path):
    path = tmp_path / "new folder" / "file"
    for content in (b"first", b"second, longer"):
        with atomic_write(path) as handle:
            handle.write(content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path], "a temporary file was left behind"


@pytest.mark.parametrize("name", ["n" * 255, os.fsdecode(b"\xe9" * 255), "é" * 127])
def test_atomic_write_takes_every_name_that_the_system_takes(tmp_path, name):
    with atomic_write(tmp_path / name) as handle:
        handle.write(b"all")
    assert (tmp_path / name).read_bytes() == b"all"
    assert os.listdir(tmp_path) == [name]


def test_atomic_write_leaves_the_old_file_and_nothing_else_when_it_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match="bytes-like"), atomic_write(path) as handle:
        handle.writelines([b"half of the n", None])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_shows_nothing_before_it_is_complete(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as handle:
        handle.write(b"all")
        handle.flush()
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1, "a rename from another folder may not be atomic"
    assert path.read_bytes() == b"all"


def test_atomic_write_names_the_file_when_the_disk_is_full(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("atomic", [atomic_write, atomic_directory])
def test_atomic_write_and_directory_name_what_was_asked_for_where_none_can_be_written(atomic, tmp_path, monkeypatch):
    def refuse(*, dir, prefix):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / f"{prefix}abc"))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(PermissionError) as caught, atomic(tmp_path / "mine"):
        pass
    assert caught.value.filename == str(tmp_path / "mine")


def test_atomic_directory_shows_nothing_before_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder"
    with atomic_directory(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("all")
        (partial / "inner" / "file").chmod(0o600)
        assert not path.exists()
        assert partial.parent == path.parent, "a rename from another folder may not be atomic"
    assert (path / "inner" / "file").read_text() == "all"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path / "inner" / "file")] == [0o755, 0o644]
    assert list(path.parent.iterdir()) == [path]


def test_atomic_directory_leaves_nothing_when_it_fails(tmp_path):
    def fail() -> None:
        with atomic_directory(tmp_path / "folder") as partial:
            (partial / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_takes_an_empty_one_and_a_link_to_it_and_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with atomic_directory(tmp_path / "link") as partial:
        (partial / "file").write_text("all")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "file").read_text() == "all"
    for path in tmp_path / "empty", tmp_path / "link", tmp_path / "empty" / "file":
        with pytest.raises(FileExistsError, match=f"{path}: there is something already"), atomic_directory(path):
            pytest.fail("it began")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["empty", "file", "link"]


def test_atomic_directory_never_replaces_what_came_meanwhile(tmp_path):
    path = tmp_path / "folder"

    def collide() -> None:
        with atomic_directory(path) as partial:
            (partial / "file").write_text("ours")
            path.mkdir()
            (path / "file").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        collide()
    assert (path / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]
