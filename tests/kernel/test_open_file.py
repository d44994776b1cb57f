"""Which descriptors share an open file description."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fdshare.kernel import open_file
from fdshare.kernel.open_file import Descriptions, compare_open_files, same_here, same_open_file

HERE = os.getpid()

pytestmark = pytest.mark.skipif(
    same_open_file(HERE, 0, HERE, 0) is None, reason="kcmp(2) is not allowed here"
)


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Twenty of one file, each opened for itself."""
    made = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    yield made
    for fd in made:
        os.close(fd)


def test_the_same_open_file_is_told_from_the_same_file(files: list[int]) -> None:
    one, other = files[:2]
    copy = os.dup(one)
    assert same_open_file(HERE, one, HERE, copy) is True
    assert same_open_file(HERE, one, HERE, other) is False
    os.close(copy)
    assert same_open_file(HERE, one, HERE, copy) is False
    with pytest.raises(OSError):
        compare_open_files(HERE, one, HERE, copy)


@pytest.mark.parametrize("has_query", [True, False])
def test_in_this_process(
    files: list[int], has_query: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_query:  # an older kernel refuses a command that it does not know
        monkeypatch.setattr(open_file, "_F_DUPFD_QUERY", 1024 + 999)
    one, other = files[:2]
    copy = os.dup(one)
    assert same_here(one, copy) is True
    assert same_here(one, other) is False
    os.close(copy)
    assert same_here(one, copy) is False
    assert same_here(copy, one) is False


def test_each_is_found_by_its_copies_alone(files: list[int]) -> None:
    some = Descriptions()
    assert some.works
    for fd in files[::2]:
        some.add(fd)
    for fd in files[::2]:
        copy = os.dup(fd)
        assert some.find(copy) == fd
        os.close(copy)
    assert [some.find(fd) for fd in files[1::2]] == [None] * 10


def test_a_copy_takes_the_place_and_the_last_leaves_none(files: list[int]) -> None:
    some = Descriptions()
    for fd in files:
        some.add(fd)
    copies = [os.dup(fd) for fd in files]
    for fd, copy in zip(files, copies, strict=True):
        some.replace(copy, None)  # it is not in there: nothing happens
        assert some.find(copy) == fd
        some.replace(fd, copy)
        assert some.find(fd) == copy
    for fd, copy in zip(files, copies, strict=True):
        some.replace(copy, None)
        assert some.find(fd) is None
        os.close(copy)
