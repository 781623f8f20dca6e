"""A run's test videos as pictures and one page; the page in a real browser where Chromium is installed."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scripts import visualize as command
from stale.data.annotations import Instance, Video
from stale.errors import StaleError
from stale.evaluation.browse import browse_page, video_record
from tests.tiny import UNSEEN

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = '</script><img src="http://example.org/x" onerror="alert(1)">'
TIOUS = [0.3, 0.5]


def seen(name: str, instances: list[tuple], found: list[tuple], foreground: bool = True) -> Any:
    """One video; instances (start, end, label) and detections (start, end, label, score)."""
    rng = np.random.default_rng(len(name))
    return SimpleNamespace(
        video=Video(name, "test", 100.0, tuple(Instance(*item) for item in instances)),
        classes=["Diving", NASTY],
        detections=[{"segment": [s, e], "label": label, "score": score} for s, e, label, score in found],
        class_scores=rng.random((2, 16)),
        foreground=rng.random(16) if foreground else None,
        threshold=0.5,
    )


def some_videos() -> list[Any]:
    """AP 1 (right), 0 (wrong), a half (one class of two), and none (only a class that is not under test)."""
    return [
        seen("right", [(10, 20, "Diving")], [(10, 20, "Diving", 0.9), (50, 60, NASTY, 0.1)]),
        seen("wrong", [(10, 20, "Diving")], [(70, 90, "Diving", 0.9)], foreground=False),
        seen("half & <half>", [(0, 30, "Diving"), (50, 80, NASTY)], [(0, 30, "Diving", 0.8)]),
        seen("stranger", [(5, 9, "Golf")], []),
    ]


class Reader(HTMLParser):
    """Tags with their attributes, and the text of the data block."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data = ""
        self._in_data = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_data(self, data: str) -> None:
        self.data += data if self._in_data else ""

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


def test_the_page_holds_every_video_and_fetches_nothing() -> None:
    page = browse_page("Title <b>", NASTY, some_videos(), TIOUS)
    reader = Reader(page)
    data = json.loads(reader.data)
    assert [video["id"] for video in data["videos"]] == ["right", "wrong", "half & <half>", "stranger"]
    assert data["labels"] == ["Diving", NASTY, "Golf"]
    assert data["known"] == 2
    for tag, attributes in reader.tags:
        assert tag not in ("img", "link", "iframe"), "a name became markup, or something is fetched"
        assert "src" not in attributes
        assert not str(attributes.get("href", "#")).startswith("http")
    assert "default-src 'none'" in page
    assert [tag for tag, _ in reader.tags].count("script") == 2


def test_ap_is_the_videos_own() -> None:
    index = {"Diving": 0, NASTY: 1, "Golf": 2}
    records = [video_record(video, index, TIOUS) for video in some_videos()]
    assert [record["ap"] for record in records] == [1.0, 0.0, 0.5, None]
    assert records[2]["aps"] == {0: 1.0, 1: 0.0}
    assert records[1]["mask"] is None
    assert records[0]["found"][0] == [10, 20, 0, 0.9]


def test_the_command_writes_page_and_pictures(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command.main(["--run", str(clip_run), "--output", str(tmp_path / "out"), "--pictures", "1"])
    assert capsys.readouterr().out == f"4 videos: {tmp_path / 'out' / 'index.html'}\n"
    data = json.loads(Reader((tmp_path / "out/index.html").read_text()).data)
    assert data["labels"] == list(UNSEEN)
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"{data['videos'][0]['id']}.png"]


def test_everything_of_a_run_goes_into_its_folder_by_default(clip_run: Path) -> None:
    command.main(["--run", str(clip_run), "--vocabulary", "all", "--limit", "2"])
    assert len(list((clip_run / "pictures").glob("*.png"))) == 2
    shutil.rmtree(clip_run / "pictures")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match="no run in"):
        command.main(["--run", str(tmp_path)])


# In a browser

DRIVER = """
<script>
const said = [], say = value => said.push(value);
const names = () => [...document.querySelectorAll("#rows a")].map(link => link.textContent);
const press = (key, target) => (target || document.activeElement).dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const wait = () => new Promise(done => setTimeout(done, 60));
addEventListener("securitypolicyviolation", () => say("violation"));
addEventListener("error", event => say("error " + event.message));
(async () => { STEPS
  const block = document.createElement("pre");
  block.id = "said";
  block.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
  document.body.append(block);
})();
</script></body>"""


def drive(folder: Path, steps: str) -> list[Any]:
    """What the ``steps`` say after the page has loaded in headless Chromium."""
    page = browse_page("Videos", "protocol", some_videos(), TIOUS)
    (folder / "page.html").write_text(page.replace("</body>", DRIVER.replace("STEPS", steps)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    browser = [CHROMIUM, *options, profile, (folder / "page.html").as_uri()]
    result = subprocess.run(browser, capture_output=True, text=True, timeout=50)
    found = re.search(r'<pre id="said">([^<]*)</pre>', result.stdout)
    assert found, result.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_it_sorts_filters_and_opens(tmp_path: Path) -> None:
    said = drive(
        tmp_path,
        """
        say(names());
        const ap = document.querySelector("th button[data-key=ap]");
        ap.click(); say(names()); say(ap.parentElement.getAttribute("aria-sort"));
        document.querySelector("th button[data-key=id]").click(); say(names());
        const chosen = document.getElementById("class");
        say([...chosen.options].length);
        chosen.value = "1"; chosen.dispatchEvent(new Event("change")); say(names());
        say(document.querySelector("#rows td:last-child").textContent);
        say(document.getElementById("count").textContent);
        chosen.value = ""; chosen.dispatchEvent(new Event("change"));
        const find = document.getElementById("search");
        find.value = "golf"; find.dispatchEvent(new Event("input")); say(names());
        find.value = ""; find.dispatchEvent(new Event("input"));
        document.querySelector("#rows a").click(); await wait();
        say(document.querySelector("#detail h2").textContent);
        say(document.querySelectorAll("#detail svg rect title").length);
        say(document.querySelectorAll("#detail svg image").length);
        say(document.querySelectorAll("#detail tbody tr").length);
        """,
    )
    assert said == [
        ["wrong", "half & <half>", "right", "stranger"],
        ["right", "half & <half>", "wrong", "stranger"],
        "descending",
        ["half & <half>", "right", "stranger", "wrong"],
        3,
        ["half & <half>"],
        "0.0",
        "1 of 4 videos",
        ["stranger"],
        "half & <half>",
        3,
        2,
        3,
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_the_keyboard_is_enough(tmp_path: Path) -> None:
    said = drive(
        tmp_path,
        """
        document.querySelector("#rows a").focus();
        press("ArrowDown"); say(document.activeElement.textContent);
        document.activeElement.click(); await wait();
        say(document.activeElement.id); say(document.querySelector("#detail h2").textContent);
        document.getElementById("next").click(); await wait();
        say(document.querySelector("#detail h2").textContent);
        press("Escape"); await wait();
        say(document.getElementById("detail").hidden); say(document.activeElement.textContent);
        const fetched = await fetch("https://example.org").then(() => "fetched", () => "refused");
        say(fetched); await wait();
        """,
    )
    assert said == ["half & <half>", "detail", "half & <half>", "right", True, "right", "refused", "violation"]
