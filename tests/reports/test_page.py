"""The report page: what it holds, what it counts, and in a real browser (where Chromium is installed) how it works."""

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
from scripts import report
from stale.errors import StaleError
from stale.evaluation import evaluate
from stale.evaluation.analysis import diagnose
from stale.io import write_json
from stale.reports import _precision as precision
from stale.reports import _timelines as timelines
from stale.reports import video_ap
from stale.run_folder import RunFolder
from tests.helpers import make_clip
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


def as_results(found: dict[str, list[tuple]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"segment": [start, end], "label": label, "score": score} for start, end, label, score in items]
        for name, items in found.items()
    }


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of TRUTH and FOUND."""
    database = {name: {"subset": "validation", "duration": 100.0, "annotations": []} for name in TRUTH}
    for name, items in TRUTH.items():
        database[name]["annotations"] = [{"segment": [start, end], "label": label} for start, end, label in items]
    (tmp_path / "a<i>.json").write_text(json.dumps({"database": database}))
    (tmp_path / "p<b>.json").write_text(json.dumps({"results": as_results(FOUND)}))
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
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_every_video_is_counted_and_linked(page: Path) -> None:
    data = json.loads(Reader(page.read_text()).data)
    assert data["classes"] == sorted(["Diving", "Golf", NASTY]) and data["tious"] == ["0.30", "0.50"]
    assert data["columns"] == ["video", "inst.", "AP", "missed", "false pos.", "top-1"]
    assert [video["cells"] for video in data["videos"]] == [
        ["right", 1, 100.0, 0, 0, "✓"],
        ["wrong", 1, 0.0, 1, 1, "✓"],
        ["half & <half>", 2, 50.0, 1, 0, "✓"],
        ["nothing", 1, 0.0, 1, 0, "✗"],
    ]
    diving, golf, nasty = (data["classes"].index(label) for label in ("Diving", "Golf", NASTY))
    first = data["videos"][0]
    assert first["truth"] == [[10, 20, diving]]
    assert first["runs"][0]["found"] == [[10, 20, diving, 0.9, "00", 0], [50, 60, nasty, 0.1, "55"]]
    links = {key: [data["videos"][index]["cells"][0] for index in videos] for key, videos in data["links"].items()}
    background = data["kinds"].index("background")
    assert links[f"0 kind {background}"] == ["right", "wrong"] and links[f"0 class {golf}"] == ["nothing"]
    assert links[f"0 cell {diving} {diving}"] == ["right", "half & <half>"]
    # Columns: the three classes, missed, background
    assert links[f"0 cell {diving} 4"] == ["wrong"] and links[f"0 cell {nasty} 4"] == ["half & <half>"]
    assert links[f"0 cell {diving} 5"] == ["wrong"] and links[f"0 cell {nasty} 5"] == ["right"]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_counts_and_curves_equal_their_definitions(case: Any) -> None:
    truth, found = case
    tious = [0.5, 0.75]
    diagnosis = diagnose(truth, found, tious)
    metrics, per_video = evaluate(truth, found, tious), video_ap(truth, found, tious)
    for number, video in enumerate(timelines(diagnosis, {})):
        for bit in range(len(tious)):
            taken = [np.broadcast_to(item[5], len(tious))[bit] for item in video["found"] if item[4][bit] == "0"]
            instances = np.flatnonzero(truth.video == number)
            expected = diagnosis.taken[bit, (diagnosis.taken[bit] >= 0) & (diagnosis.ranked.video == number)]
            assert sorted(instances[taken].tolist()) == sorted(expected.tolist())
    for index in np.unique(truth.video):
        alone = reference_per_class(truth.take(truth.video == index), found.take(found.video == index), tious)
        assert per_video[index] == pytest.approx(np.nanmean(alone))
    # AP is the mean of the interpolated precision where recall rises.
    for k in np.flatnonzero(metrics.num_instances == 1):
        assert precision(diagnosis)[k + 1][0][1] == round(1000 * metrics.ap[0, k])


DRIVER = """
<script>
const said = [], say = value => said.push(value);
const names = () => [...document.querySelectorAll("#rows button")].map(button => button.textContent);
const bars = kind => document.querySelectorAll(`#timeline .bar.${kind}`).length;
const bar = kind => document.querySelector(`#timeline .bar.${kind}`);
const links = () => document.querySelectorAll("#timeline .link").length;
const title = () => get("name").textContent;
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const set = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input", {bubbles: true})); };
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
        document.querySelectorAll("#heads button")[2].click(); say(names()[0]);
        say(document.querySelectorAll("#heads th")[2].getAttribute("aria-sort"));
        document.querySelectorAll("#heads button")[0].click(); say(names());
        set("score", 0); set("find", "diving"); say(names()); say(get("count").textContent);
        document.querySelectorAll("#rows button")[1].click(); say(title());
        say([bars("right"), bars("wrong"), bars("taken"), bars("missed"), links()]);
        bar("right").dispatchEvent(new Event("click", {bubbles: true})); say(get("about").textContent);
        set("score", 100); say([bars("right"), bars("wrong")]);
        press("ArrowLeft"); say(title()); press("j"); press("j"); say(title()); press("j"); say(title());
        get("back").click(); say(title());
        set("score", 0); document.querySelector("#toggles input").click(); say([bars("right"), bars("wrong")]);
        document.querySelector("#toggles input").click();
        const wide = () => Number(bar("right").getAttribute("width")), before = wide();
        set("zoom", 10); say(Math.round(wide() / before)); say(document.querySelectorAll("#timeline .grid").length > 3);
        document.querySelector("[data-link='0 class 2']").click(); say(names());
        document.querySelector("[data-link='0 kind 5']").click(); say(names()); say(title());
        get("all").click(); say(names().length);
        set("find", "no such thing"); say(title());
        set("curve", 1); say(document.querySelectorAll("#lines polyline").length);
        say(await fetch("https://example.org").then(() => "fetched", () => "refused"));
        await new Promise(done => setTimeout(done, 60));
        """,
    )
    in_order = ["half & <half>", "nothing", "right", "wrong"]
    assert said == [
        *(["wrong", "nothing", "half & <half>", "right"], "wrong"),
        *("right", "descending", in_order),
        *(["half & <half>", "right", "wrong"], "3 of 4 videos"),
        *("right", [1, 1, 1, 0, 1], "Diving, 0:10.0 to 0:20.0, score 0.9, true positive", [1, 0]),
        *("half & <half>", "wrong", "wrong"),
        *("right", [0, 1]),
        *(2, True, ["nothing"], ["right", "wrong"], "right", 4, "No video.", 2, "refused", "violation"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_two_runs_with_curves_and_videos_on_a_phone(tmp_path: Path, page: Path) -> None:
    """One run finds what the other misses; the narrow page does not scroll sideways, and a click on a bar plays."""
    found = {"first": FOUND, "second": {**FOUND, "wrong": [(10, 20, "Diving", 0.9)]}}
    classes = sorted({label for items in TRUTH.values() for _, _, label in items})
    protocol = {"dataset": "d", "subset": "validation", "classes": classes, "vocabulary": "unseen", "tious": [0.5]}
    protocol |= {"annotations": str(tmp_path / "a<i>.json"), "checkpoint": "best"}
    made = {"first": "best", "second": "last"}  # curves of another checkpoint are not shown
    for name, items in found.items():
        run = RunFolder(tmp_path / name)
        write_json(run.detections("unseen"), {"protocol": protocol, "results": as_results(items)})
        curves = [{"label": "", "percent": [0, 50, 100]}, {"label": "Diving", "percent": [100, 0]}]
        write_json(run.snippet_scores("unseen"), {"protocol": {"checkpoint": made[name]}, "results": {"wrong": curves}})
    (tmp_path / "clips").mkdir()
    make_clip(tmp_path / "clips" / "wrong.mp4", codec="libx264")
    runs = [str(tmp_path / name) for name in found]
    report.main([*runs, "--videos", str(tmp_path / "clips")])
    said = drive(
        tmp_path / "first" / "report" / "index.html",
        """
        say(names()[0]); document.querySelector("[data-video]:not(#rows button)").click(); say(title());
        set("score", 0); say([bars("right"), bars("wrong"), bars("half"), links()]);
        say(document.querySelectorAll("#timeline .mask, #timeline .curve").length);
        say([...document.querySelectorAll("#list th")].length);
        document.body.style.width = "400px"; say(document.body.scrollWidth);
        const player = get("player"); player.muted = true; say([player.hidden, player.getAttribute("src")]);
        bar("right").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
        await new Promise(done => player.addEventListener("loadedmetadata", done, {once: true}));
        say(player.duration > 3);
        """,
        width=400,
    )
    assert said == ["wrong", "wrong", [1, 1, 1, 1], 2, 11, 400, [False, "../../clips/wrong.mp4"], True]
    other = {"protocol": {**protocol, "classes": classes[1:]}, "results": {}}
    write_json(tmp_path / "second" / "detections.json", other)
    with pytest.raises(StaleError, match="not tested on the same"):
        report.main(runs)
    with pytest.raises(StaleError, match="no file there is a video under test"):
        report.main([runs[0], "--videos", str(tmp_path / "first")])


def test_a_last_video_without_an_instance_is_listed(tmp_path: Path) -> None:
    segments = {"a": [10, 20], "b": [5, 5]}
    entry = {"subset": "validation", "duration": 100.0}
    database = {name: {**entry, "annotations": [{"segment": s, "label": "x"}]} for name, s in segments.items()}
    write_json(tmp_path / "a.json", {"database": database})
    write_json(tmp_path / "p.json", {"results": as_results({"a": [(10, 20, "x", 0.9)]})})
    files = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(tmp_path / "a.json")]
    command.main([*files, "--duplicates", "drop", "--report", str(tmp_path)])
    data = json.loads(Reader((tmp_path / "index.html").read_text()).data)
    assert [video["cells"][:2] for video in data["videos"]] == [["a", 1], ["b", 0]]
