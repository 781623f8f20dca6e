"""Files are whole or absent, and faults in them are one clear line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from stale.errors import StaleError, name_some, run_command
from stale.files import atomic_path, read_json, read_text, write_json, write_text


def test_text_and_json_round_trip(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.txt", "θ → 0\n")
    assert read_text(tmp_path / "deep" / "er" / "a.txt", "text") == "θ → 0\n"
    write_json(tmp_path / "a.json", {"ä": [1, 2.5, None]}, indent=1)
    assert read_json(tmp_path / "a.json", "file") == {"ä": [1, 2.5, None]}


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("power cut")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path, "file") == {"old": True}


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # or replacing it would not be atomic
    assert path.read_text() == "new"


def test_the_old_file_survives_when_the_exchange_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(StaleError, match=f"^cannot write {path}: No space left on device$"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_written_file_has_the_usual_rights(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StaleError, match=f"cannot write {tmp_path}/file/a.txt"):
        write_text(tmp_path / "file" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StaleError, match=f"cannot write {tmp_path}/folder"):
        write_text(tmp_path / "folder", "x")


def test_gzip_is_understood_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b'{"a": 1}'))
    assert read_json(tmp_path / "a.json", "file") == {"a": 1}


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json", "file") == [1]


def _truncated_gzip() -> bytes:
    return gzip.compress(json.dumps(list(range(1000))).encode())[:-20]


def _damaged_gzip() -> bytes:
    whole = bytearray(gzip.compress(json.dumps(list(range(1000))).encode()))
    whole[10:200] = b"\xff" * 190
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"<html>404</html>", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"1" * 5000, "is not valid JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (_truncated_gzip(), "cannot be read"),
        (_damaged_gzip(), "cannot be read"),
    ],
    ids=["cut", "empty", "web page", "too deep", "endless number", "not UTF-8", "cut gzip", "damaged gzip"],
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
    with pytest.raises(StaleError, match=f"^result file cannot be read: {tmp_path}"):
        read_json(tmp_path, "result file")


def test_name_some_stays_one_line() -> None:
    assert name_some(["a", "b"]) == "a, b"
    assert name_some(range(12)) == "0, 1, 2, 3, 4 and 7 more"
    assert name_some([]) == ""


def test_commands_turn_bad_input_into_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise StaleError("no such video")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no such video\n"


def test_commands_let_real_faults_through() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)
