"""From a download or a copy to a normalized file that training can load; a second run changes nothing."""

import gzip
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_preparation.converters import Annotations, write_as
from data_preparation.prepare import prepare
from scripts import prepare_data as command
from stale.data.annotations import Instance, Video, read_annotations
from stale.data.datasets import DATASETS, DatasetFacts
from stale.errors import StaleError
from stale.io import download
from tests.helpers import SHARED, needs_shared

CONTENT = bytes(range(256)) * 1000


THUMOS14 = DATASETS["thumos14"]
SMALL = replace(THUMOS14, counts={"validation": ((1,), 2), "test": ((1,), 2)}, num_classes=2)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A file as another project ships it: unsorted, capital subsets, an ambiguous segment."""
    first = (Instance(5.0, 6.0, "Diving"), Instance(1.0, 2.0, "CliffDiving"), Instance(0.0, 1.0, "Ambiguous"))
    videos = {
        "video_test_0000004": Video("video_test_0000004", "Test", 33.83, first[:2]),
        "video_test_0001292": Video("video_test_0001292", "Test", 20.0, first[2:]),
        "video_validation_0000051": Video("video_validation_0000051", "Validation", 169.79, first[:2]),
    }
    path = tmp_path / "copies" / "thumos14.json"
    write_as("actionformer", Annotations(videos), path)
    return path


class _Handler(BaseHTTPRequestHandler):
    """Answers each request by the next of ``answers``: a status, or content and how many bytes of it are sent."""

    def do_GET(self) -> None:
        self.server.requests += 1
        answer = self.server.answers.pop(0)
        if isinstance(answer, int):
            return self.send_error(answer)
        content, sent = answer
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        return None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.requests, server.url = 0, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_broken_download_is_retried_and_a_finished_one_kept(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.answers = [503, (CONTENT, 1000), (CONTENT, len(CONTENT))]
    assert download(f"{server.url}/a.bin", tmp_path / "new").read_bytes() == CONTENT
    assert download(f"{server.url}/a.bin", tmp_path / "new").read_bytes() == CONTENT
    assert server.requests == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]
    server.answers = [(CONTENT, len(CONTENT))] * 4
    with pytest.raises(StaleError, match="hash"):
        download(f"{server.url}/b.bin", tmp_path, sha256="0" * 64)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(404, "404"), ((CONTENT, 10), "IncompleteRead"), (None, "could not be downloaded")],  # None: nobody answers
)
def test_what_fails_is_one_line_that_says_what_to_do(
    server: ThreadingHTTPServer, tmp_path: Path, answer: int | tuple[bytes, int] | None, reason: str
) -> None:
    server.answers = [answer] * 4
    if answer is None:
        server.server_close()
    with pytest.raises(StaleError, match=reason) as error:
        download(f"{server.url}/a.bin", tmp_path)
    assert str(error.value).startswith(f"{server.url}/a.bin")
    assert str(error.value).endswith(f"download it yourself to {tmp_path / 'a.bin'} and run again")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_login_page_is_not_kept_as_the_annotations(server: ThreadingHTTPServer, copy: Path, tmp_path: Path) -> None:
    page = b"<html>Welcome</html>"
    server.answers = [(page, len(page)), (content := copy.read_bytes(), len(content))]
    served = replace(SMALL, source=f"{server.url}/thumos14.json")
    with pytest.raises(StaleError, match="not valid JSON"):
        prepare(served, tmp_path / "data")
    assert "; made; " in prepare(served, tmp_path / "data")[0]


def snapshot(root: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("given", ["plain", "gzipped"])
def test_a_copy_is_normalized_and_the_second_run_changes_nothing(copy: Path, tmp_path: Path, given: str) -> None:
    if given == "gzipped":
        copy.write_bytes(gzip.compress(copy.read_bytes()))
    root = tmp_path / "data"
    annotations, features = prepare(SMALL, root, copy)
    assert "2 videos, 4 segments, 2 classes; made; " in annotations and "differs from the copy" in annotations
    assert "missing: fetch" in features and str(root / "thumos14" / "features") in features
    videos = read_annotations(root / "thumos14" / "thumos14.json")
    assert list(videos) == ["video_test_0000004", "video_validation_0000051"]
    assert videos["video_test_0000004"].subset == "test"
    assert [item.label for item in videos["video_test_0000004"].instances] == ["CliffDiving", "Diving"]
    before = snapshot(root)
    assert prepare(SMALL, root)[0].endswith("; kept")
    assert snapshot(root) == before


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_both_data_sets_from_copies(dataset: DatasetFacts, tmp_path: Path) -> None:
    copy = SHARED / "data" / "annotations" / dataset.annotations
    assert "content equal to the copy" in prepare(dataset, tmp_path, copy)[0]
    videos = read_annotations(tmp_path / dataset.title.lower() / dataset.annotations)
    original = read_annotations(copy)
    assert list(videos) == sorted(original)
    for name, video in original.items():
        assert Counter(videos[name].instances) == Counter(video.instances)


def test_other_annotations_are_refused_and_nothing_is_written(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="not the annotations of THUMOS14: 2 classes, not 20; 1 validation videos"):
        prepare(THUMOS14, tmp_path / "data", copy)
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / "thumos14").mkdir(parents=True)
    copy.rename(tmp_path / "data" / "thumos14" / "thumos14.json")
    with pytest.raises(StaleError, match="not the annotations of THUMOS14: 3 classes, not 2"):
        prepare(SMALL, tmp_path / "data")  # with ambiguous segments, training must not use it as it is


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match=r"fetched by hand: download thumos14.json of https.*--from FILE"):
        prepare(THUMOS14, tmp_path)
    with pytest.raises(StaleError, match=r"annotation file not found: .*nowhere"):
        prepare(THUMOS14, tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("options", ["", "--root x --sample 1", "--root x --check --from y", "--root x --nonsense"])
def test_a_wrong_call_is_code_2(options: str) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        command.main(["thumos14", *options.split()])
