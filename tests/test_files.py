"""Atomic writes: what a killed writer leaves, what a replacement keeps, permissions, and the order in which things reach the disk."""

import os
import stat
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastpeft import files
from fastpeft.files import atomic_file, atomic_folder, is_folder, locked, open_append, recover_folder, save_tensors, write_text


class Killed(BaseException):
    pass


@pytest.fixture(params=["in one step", "by two renames"])
def either_way(request, monkeypatch):
    """How a folder is replaced: on Linux in one step, elsewhere by two renames."""
    if request.param == "by two renames":
        monkeypatch.setattr(files, "_exchange", lambda draft, folder: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("the same in every mode")
    return request.param


def test_the_next_writer_puts_back_what_a_killed_one_moved_aside(tmp_path):
    folder, other, aside = tmp_path / "a[b]", tmp_path / ".a[b]-new-other", tmp_path / ".a[b]-old-x" / "a[b]"
    aside.mkdir(parents=True)
    (aside / "kept").write_text("one")
    other.mkdir()
    with pytest.raises(Killed), atomic_folder(folder):
        raise Killed
    assert (folder / "kept").read_text() == "one" and other.is_dir()  # another process may be writing there
    recover_folder(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reader_puts_back_what_a_killed_writer_moved_aside(tmp_path):
    folder, aside = tmp_path / "a", tmp_path / ".a-old-x" / "a"
    aside.mkdir(parents=True)
    assert is_folder(folder) and not is_folder(tmp_path / "b")


def test_the_next_writer_removes_drafts_that_nobody_writes(tmp_path):
    folder, dead, alive, fresh = tmp_path / "a", *(tmp_path / f".a-new-{name}" for name in ("dead", "alive", "fresh"))
    for draft in (dead, alive, fresh):
        draft.mkdir()
        (draft / "half").write_text("1")
    for draft in (dead, alive):
        os.utime(draft, (0, 0))
    with locked(alive), atomic_folder(folder):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([alive, fresh, folder])


def test_a_whole_folder_stands_at_every_moment(tmp_path, monkeypatch):
    """Another process looks as often as it can while this one replaces the folder."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the same in every mode")
    folder, seen = tmp_path / "out", tmp_path / "seen"
    with atomic_folder(folder) as draft:
        (draft / "a").write_text("0")
    pid = os.fork()
    if not pid:
        missing = 0
        while not seen.exists():
            missing += not folder.is_dir()
        os._exit(min(missing, 100))
    for number in range(200):
        with atomic_folder(folder, durable=False) as draft:
            (draft / "a").write_text(str(number))
    seen.touch()
    assert os.waitpid(pid, 0)[1] == 0 and (folder / "a").read_text() == "199"


def test_what_stood_there_keeps_another_name(tmp_path, either_way):
    folder = tmp_path / "out"
    for number in range(3):
        with atomic_folder(folder, aside=tmp_path / "before") as draft:
            (draft / "a").write_text(str(number))
    assert (folder / "a").read_text() == "2" and (tmp_path / "before" / "a").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "out"]


def test_a_link_to_a_folder_is_replaced_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("theirs")
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("ours")
    assert (tmp_path / "there" / "a").read_text() == "theirs" and not (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    theirs, draft = tmp_path / "theirs", tmp_path / ".out-new-known"
    theirs.write_text("theirs")
    draft.symlink_to(theirs)
    monkeypatch.setattr(files, "_beside", lambda path, kind: draft)  # as if its name could be guessed
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "out", "ours")
    (tmp_path / "log").symlink_to(theirs)
    with pytest.raises(OSError):
        open_append(tmp_path / "log")
    (tmp_path / "text").symlink_to(theirs)
    monkeypatch.undo()
    write_text(tmp_path / "text", "ours")
    assert theirs.read_text() == "theirs" and (tmp_path / "text").read_text() == "ours"


def test_a_replacement_keeps_what_it_is_asked_to(tmp_path, either_way):
    folder = tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    for name in ("gone", "both", "kept", "deep/er"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("nowhere")
    with atomic_folder(folder, keep=lambda name: name != "gone") as draft:
        (draft / "both").write_text("new")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["both", "deep", "deep/er", "kept", "link"]
    assert (folder / "both").read_text() == "new" and (folder / "kept").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
    with atomic_folder(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_failure_leaves_the_folder_whole_although_something_of_it_was_to_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda draft, folder: False)
    folder, replace = tmp_path / "out", os.replace
    folder.mkdir()
    (folder / "kept").write_text("old")

    def full(source, target):
        if target == folder and "-new-" in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"), atomic_folder(folder, keep=lambda name: True):
        pass
    assert (folder / "kept").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_must_not_be_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with atomic_folder(folder, replace=False) as draft:  # an empty one may
        (draft / "a").write_text("one")
    with pytest.raises(OSError), atomic_folder(folder, replace=False) as draft:
        (draft / "a").write_text("two")
    assert (folder / "a").read_text() == "one" and list(tmp_path.iterdir()) == [folder]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.pth"
    with atomic_file(path) as draft:
        draft.write_text("one")
    with pytest.raises(Killed), atomic_file(path) as draft:
        draft.write_text("two")
        raise Killed
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_what_is_written_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    said, replace, sync = [], os.replace, files.sync
    monkeypatch.setattr("os.replace", lambda source, target: (said.append("renamed"), replace(source, target)))
    monkeypatch.setattr(files, "sync", lambda path: (said.append(path.name), sync(path)))
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "file").write_text("a")
    assert sorted(said[:3]) == sorted(["file", "inner", draft.name]) and said[3:] == ["renamed", tmp_path.name]
    said.clear()
    with atomic_file(tmp_path / "a.txt") as draft:
        draft.write_text("a")
    assert said == [draft.name, "renamed", tmp_path.name]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "out") as draft:
            save_file({"a": torch.zeros(1)}, draft / "of_others")  # whose own permissions are 0600
        write_text(tmp_path / "text", "a")
        save_tensors({"a": torch.zeros(1)}, tmp_path / "tensors")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "out/of_others", "text", "tensors")]
    assert modes == [0o777 & ~mask, *[0o666 & ~mask] * 3]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "checkpoint"
    for text in ("one", "two"):
        with atomic_folder(folder) as draft:
            (draft / "a").write_text(text)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as draft:
        (draft / "a").write_text("three")
        raise KeyboardInterrupt
    assert (folder / "a").read_text() == "two" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_survives_a_failing_rename(tmp_path, monkeypatch):
    folder, replace = tmp_path / "checkpoint", os.replace
    monkeypatch.setattr("fastpeft.files._exchange", lambda draft, folder: False)
    with atomic_folder(folder) as draft:
        (draft / "a").write_text("one")

    def rename(a, b):
        if "-new-" in str(a):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr("os.replace", rename)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as draft:
        (draft / "a").write_text("two")
    assert (folder / "a").read_text() == "one" and list(tmp_path.iterdir()) == [folder]


def test_what_a_killed_process_left_is_cleared_up(tmp_path):
    """Killed between the two renames: the folder stands under another name, beside the finished draft."""
    folder = tmp_path / "checkpoint"
    for left, text in ((".checkpoint-old-x/old", "one"), (".checkpoint-new-y", "two"), (".checkpoint-new-z", "three")):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "a").write_text(text)
    recover_folder(folder)
    assert (folder / "a").read_text() == "one" and list(tmp_path.iterdir()) == [folder]
