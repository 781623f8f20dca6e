"""Downloads resume, retry, refuse what is unsafe, and are never taken for whole before they are; archives likewise."""

from __future__ import annotations

import gzip
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from preparation_sources import Server, serve

from stale.errors import StaleError
from stale.preparation import archives
from stale.preparation.archives import read_members, refuse_gzip_bomb
from stale.preparation.downloads import Patience, fetch, is_safe_address, sha256_of
from stale.preparation.manifest import Manifest

CONTENT = bytes(range(256)) * 1000
WAITS: list[float] = []
PATIENCE = Patience(3, 1.0, WAITS.append)
TEXT = re.compile(r"(?:.*/)?[a-z]+\.txt")


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with one file."""
    WAITS.clear()
    with serve() as state:
        state.files["a.bin"] = CONTENT
        yield state


def get(server: Server, folder: Path, limit: int = 1 << 20) -> Path:
    """Fetch the file."""
    fetch([f"{server.url}/a.bin"], folder / "downloads" / "a.bin", limit, PATIENCE)
    return folder / "downloads" / "a.bin"


def names(folder: Path) -> list[str]:
    """Names in the download folder."""
    return sorted(path.name for path in (folder / "downloads").iterdir())


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(server: Server, tmp_path: Path) -> None:
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["a.bin"]


def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.faults = [100_000, 50_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["", "bytes=100000-", "bytes=150000-"]
    assert WAITS == [1.0, 2.0]


def test_another_run_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.faults = [70_000, ("status", 503), ("status", 503)]
    with pytest.raises(StaleError, match=r"a.bin could not be downloaded .*503.*--from"):
        get(server, tmp_path)
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]  # never under its own name
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=70000-"
    assert names(tmp_path) == ["a.bin"]


def test_a_file_that_changed_meanwhile_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = [70_000, ("status", 404)]
    with pytest.raises(StaleError):
        get(server, tmp_path)
    server.files["a.bin"], server.etag = CONTENT[::-1], '"2"'
    assert get(server, tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("setting", [{"ranges": False}, {"etag": ""}, {"etag": 'W/"1"'}])
def test_without_ranges_or_versions_nothing_is_glued_together(server: Server, tmp_path: Path, setting: dict) -> None:
    vars(server).update(setting)
    server.faults = [70_000]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = [70_000, ("status", 404)]
    with pytest.raises(StaleError):
        get(server, tmp_path)
    part = tmp_path / "downloads" / "a.bin.part"
    part.write_bytes(CONTENT * 2)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_of_mirrors_the_first_that_works(server: Server, tmp_path: Path) -> None:
    server.faults = [("status", 404)]
    target = tmp_path / "a.bin"
    assert fetch([f"{server.url}/gone", f"{server.url}/a.bin"], target, 1 << 20, PATIENCE) == f"{server.url}/a.bin"
    assert WAITS == []  # what is not there is not asked for again


@pytest.mark.parametrize("ranges", [True, False])
def test_what_is_too_large_is_refused(server: Server, tmp_path: Path, ranges: bool) -> None:
    with pytest.raises(StaleError, match="more than 1,000 are refused"):
        get(server, tmp_path, limit=1000)
    assert not (tmp_path / "downloads" / "a.bin").exists()


def test_only_https_and_no_redirect_away_from_it(server: Server, tmp_path: Path) -> None:
    assert is_safe_address("https://example.org/a")
    assert not any(map(is_safe_address, ["http://example.org/a", "ftp://example.org/a", "file:///etc/passwd"]))
    with pytest.raises(StaleError, match="only HTTPS"):
        fetch(["http://example.org/a"], tmp_path / "a", 10, PATIENCE)
    server.faults = [("redirect", "http://example.org/a.bin")]
    with pytest.raises(StaleError, match="redirects to http://example.org/a.bin, which is not HTTPS"):
        get(server, tmp_path)
    server.faults = [("redirect", "file:///etc/passwd")]
    with pytest.raises(StaleError):
        get(server, tmp_path)


def test_nobody_there(tmp_path: Path) -> None:
    with serve() as gone:
        url = f"{gone.url}/a"
    with pytest.raises(StaleError, match="could not be downloaded"):
        fetch([url], tmp_path / "a", 10, PATIENCE)


def test_a_manifest_notices_every_change(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("one")
    manifest = Manifest(tmp_path)
    assert not manifest.holds("x")
    manifest.record("x", sha256_of(path), address="https://example.org/x")
    before = manifest.path.read_bytes()
    assert Manifest(tmp_path).holds("x")
    path.write_text("two")
    with pytest.raises(StaleError, match="is not the file that .* records"):
        Manifest(tmp_path).holds("x")
    with pytest.raises(StaleError, match="it has changed where it comes from"):
        Manifest(tmp_path).record("x", sha256_of(path))
    assert manifest.path.read_bytes() == before
    manifest.path.write_text('{"files": [1]}')
    with pytest.raises(StaleError, match="damaged"):
        Manifest(tmp_path)


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    """A zip archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_only_the_wanted_members_are_read(tmp_path: Path) -> None:
    members = {"x/a.txt": b"1", "b.txt": b"2", "c.bin": b"3", "__MACOSX/a.txt": b"4", "x/._a.txt": b"5"}
    assert read_members(archive_of(tmp_path / "z.zip", members), TEXT) == {"x/a.txt": b"1", "b.txt": b"2"}


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "x/../../a.txt", "C:/a.txt", "..\\a.txt", "\\a.txt"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = archive_of(tmp_path / "z.zip", {"good.txt": b"1", name: b"2"})
    with pytest.raises(StaleError, match="leave the folder"):
        read_members(path, TEXT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.zip"]


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(StaleError, match="links, refused: a.txt"):
        read_members(tmp_path / "z.zip", TEXT)


def test_bombs_are_refused_before_they_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = archive_of(tmp_path / "large.zip", {"a.txt": bytes(archives.MAX_MEMBER + 1)})
    many = archive_of(tmp_path / "many.zip", {"a.txt": b"123456", "b.txt": b"123456"})
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    assert large.stat().st_size < 100_000
    with pytest.raises(StaleError, match="a.txt unpacks to 8,388,609 bytes: refused"):
        read_members(large, TEXT)
    monkeypatch.setattr(archives, "MAX_TOTAL", 10)
    with pytest.raises(StaleError, match="unpack to 12 bytes"):
        read_members(many, TEXT)
    monkeypatch.setattr(archives, "MAX_ENTRIES", 1)
    with pytest.raises(StaleError, match="2 entries"):
        read_members(many, TEXT)


def test_an_archive_that_lies_about_sizes_is_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "z.zip", {"a.txt": bytes(5_000_000)})
    raw = bytearray(path.read_bytes())
    directory = raw.rindex(b"PK\1\2")
    raw[directory + 24 : directory + 28] = struct.pack("<I", 10)
    path.write_bytes(raw)
    with pytest.raises(StaleError):
        read_members(path, TEXT)


@pytest.mark.parametrize("damage", ["cut", "no archive", "missing", "wrong checksum"])
def test_damaged_archives_are_an_error_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "z.zip"
    if damage != "missing":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a long enough text")
        raw = path.read_bytes()
        changed = {"cut": raw[:40], "no archive": b"<html>", "wrong checksum": raw.replace(b"long", b"lonG")}
        path.write_bytes(changed[damage])
    with pytest.raises(StaleError) as error:
        read_members(path, TEXT)
    assert "\n" not in str(error.value)


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(bytes(3_000_000)))
    refuse_gzip_bomb(path)
    with pytest.raises(StaleError, match="more than 1 MB: refused"):
        refuse_gzip_bomb(path, 1 << 20)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StaleError, match="cannot be unpacked"):
        refuse_gzip_bomb(path)
