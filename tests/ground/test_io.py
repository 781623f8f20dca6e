"""Files are whole or absent, and faults in them are one clear line."""

import gzip
import json
import os
from pathlib import Path

import pytest

from stale.errors import StaleError
from stale.io import atomic_path, read_json, write_text


@pytest.mark.parametrize("content", [gzip.compress(b"[1]"), b"\xef\xbb\xbf[1]"], ids=["gzip", "byte order mark"])
def test_the_form_is_found_by_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json", "file") == [1]


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("power cut")
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(StaleError, match=f"^cannot write {path}: No space left on device$"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


GZIP = gzip.compress(json.dumps(list(range(1000))).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"1" * 5000, "is not valid JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (GZIP[:-20], "cannot be read"),
        (GZIP[:10] + b"\xff" * 190 + GZIP[200:], "cannot be read"),
    ],
    ids=["cut", "empty", "too deep", "endless number", "not UTF-8", "cut gzip", "damaged gzip"],
)
def test_unreadable_json_names_what_and_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(StaleError, match=f"^result file {message}: {path}") as caught:
        read_json(path, "result file")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_in_their_place(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match=f"^result file not found: {tmp_path}/none.json$"):
        read_json(tmp_path / "none.json", "result file")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 << 30)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "sparse", "/dev/zero", f"{tmp_path}/\0"):
        with pytest.raises(StaleError, match=f"^result file cannot be read: {path}"):
            read_json(path, "result file")
