"""The report page: what it holds, what it counts, and in a real browser (where Chromium is installed) how it works."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import eval as command
from stale.evaluation import evaluate
from stale.reports import timelines, video_ap
from tests.reference.evaluation import cases, reference_per_class

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = '</script><script>evil</script><img src="http://example.org/x" onerror="alert(1)"> {{ 7 * 7 }} $\\frac$'
TRUTH = {
    "right": [(10, 20, "Diving")],
    "wrong": [(10, 20, "Diving")],
    "half & <half>": [(0, 30, "Diving"), (50, 80, NASTY)],
    "nothing": [(5, 9, "Golf")],
}
FOUND = {
    "right": [(10, 20, "Diving", 0.9), (50, 60, NASTY, 0.1)],
    "wrong": [(70, 90, "Diving", 0.9)],
    "half & <half>": [(0, 30, "Diving", 0.8)],
}


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


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of TRUTH and FOUND."""
    database = {
        name: {
            "subset": "validation",
            "duration": 100.0,
            "annotations": [{"segment": [start, end], "label": label} for start, end, label in items],
        }
        for name, items in TRUTH.items()
    }
    results = {
        name: [{"segment": [start, end], "label": label, "score": score} for start, end, label, score in items]
        for name, items in FOUND.items()
    }
    (tmp_path / "a<i>.json").write_text(json.dumps({"database": database}))
    (tmp_path / "p<b>.json").write_text(json.dumps({"results": results}))
    files = ["--predictions", str(tmp_path / "p<b>.json"), "--annotations", str(tmp_path / "a<i>.json")]
    command.main([*files, "--tiou", "0.3", "0.5", "--report", str(tmp_path / "report")])
    return tmp_path / "report" / "index.html"


def test_the_page_is_one_file_with_everything_escaped(page: Path) -> None:
    text = page.read_text()
    reader = Reader(text)
    tags = [tag for tag, _ in reader.tags]
    assert not {"img", "link", "iframe", "i>", "b>"} & set(tags) and tags.count("script") == 2
    assert not any({"src", "href", "onerror"} & set(attributes) for _, attributes in reader.tags)
    assert "default-src 'none'" in text and "<script>evil" not in text
    for shown in ("<h1>p&lt;b&gt;.json</h1>", "a&lt;i&gt;", "{{ 7 * 7 }}", "DETAD", "class-agnostic", "AR@100"):
        assert shown in text
    assert sorted(path.name for path in page.parent.iterdir()) == ["analysis.json", "index.html"]
    analysis = json.loads((page.parent / "analysis.json").read_text())
    assert analysis["protocol"]["dataset"] == "a<i>" and analysis["kinds"][0] == "true positive"


def test_every_video_is_counted(page: Path) -> None:
    data = json.loads(Reader(page.read_text()).data)
    assert data["classes"] == sorted(["Diving", "Golf", NASTY]) and data["tious"] == ["0.30", "0.50"]
    counts = {video[0]: video[2:6] for video in data["videos"]}
    assert counts == {
        "right": [1.0, 0, 0, 2],
        "wrong": [0.0, 1, 1, 1],
        "half & <half>": [0.5, 1, 0, 1],
        "nothing": [0.0, 1, 0, 0],
    }
    diving, nasty = data["classes"].index("Diving"), data["classes"].index(NASTY)
    assert data["videos"][0][6:] == [[[10, 20, diving, 3]], [[10, 20, diving, 0.9, 3], [50, 60, nasty, 0.1, 0]]]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_counts_equal_their_definitions(case: Any) -> None:
    truth, found = case
    tious = [0.5, 0.75]
    data = timelines(truth, found, tious)
    metrics, per_video = evaluate(truth, found, tious), video_ap(truth, found, tious)
    right = sum(item[4] & 1 for video in data["videos"] for item in video[7])
    taken = sum(item[3] & 1 for video in data["videos"] for item in video[6])
    assert right == taken and sum(len(video[6]) for video in data["videos"]) == metrics.num_instances.sum()
    for index in np.unique(truth.video):
        alone = reference_per_class(truth.take(truth.video == index), found.take(found.video == index), tious)
        assert per_video[index] == pytest.approx(np.nanmean(alone))


DRIVER = """
<script>
const said = [], say = value => said.push(value);
const names = () => [...document.querySelectorAll("#rows button")].map(button => button.textContent);
const bars = kind => document.querySelectorAll(`#timeline .bar.${kind}`).length;
const title = () => document.querySelector("#timeline h3").textContent;
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const set = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input")); };
addEventListener("securitypolicyviolation", () => say("violation"));
addEventListener("error", event => say("error " + event.message));
(async () => { STEPS
  const block = document.createElement("pre");
  block.id = "said";
  block.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
  document.body.append(block);
})();
</script></body>"""


def drive(page: Path, steps: str, width: int = 1400) -> list[Any]:
    """What the ``steps`` say after the page has loaded in headless Chromium."""
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text().replace("</body>", DRIVER.replace("STEPS", steps)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    options += [f"--window-size={width},800", f"--user-data-dir={page.parent / 'profile'}"]
    result = subprocess.run([CHROMIUM, *options, driven.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="said">([^<]*)</pre>', result.stdout)
    assert found, result.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(page: Path) -> None:
    said = drive(
        page,
        """
        say(names()); say(title());
        document.querySelector("th[data-key=ap] button").click(); say(names()[0]);
        say(document.querySelector("th[data-key=ap]").getAttribute("aria-sort"));
        document.querySelector("th[data-key=id] button").click(); say(names());
        set("score", 0); set("find", "diving"); say(names()); say(get("count").textContent);
        document.querySelectorAll("#rows button")[1].click(); say(title());
        say([bars("right"), bars("wrong"), bars("taken"), bars("missed")]);
        set("score", 100); say([bars("right"), bars("wrong")]);
        press("ArrowLeft"); say(title()); press("j"); press("j"); say(title()); press("j"); say(title());
        get("back").click(); say(title()); say(document.activeElement.id);
        set("find", ""); document.querySelector("[data-find=Golf]").click(); say(names());
        set("find", "no such thing"); say(get("timeline").textContent);
        say(await fetch("https://example.org").then(() => "fetched", () => "refused"));
        await new Promise(done => setTimeout(done, 60));
        """,
    )
    in_order = ["half & <half>", "nothing", "right", "wrong"]
    assert said == [
        *(["nothing", "wrong", "half & <half>", "right"], "nothing"),
        *("right", "descending", in_order),
        *(["half & <half>", "right", "wrong"], "3 of 4 videos"),
        *("right", [1, 1, 1, 0], [1, 0]),
        *("half & <half>", "wrong", "wrong"),
        *("right", "back", ["nothing"], "No video.", "refused", "violation"),
    ]
