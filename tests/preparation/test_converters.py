"""Layouts: each can be loaded back, says what it cannot hold, and invalid files are an error in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_preparation.converters import WRITTEN, Annotations, load_any_layout, write_as
from stale.data.annotations import Instance, Video, read_annotations
from stale.errors import StaleError
from stale.io import clean_name

VIDEOS = {
    "v_a": Video("v_a", "training", 60.5, (Instance(1.25, 2.0, "Diving"), Instance(0.1, 59.9, "Hand, washing")), 29.97),
    'b "c"': Video('b "c"', "validation", 10.0, (), 25.0),
}

names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/\\."), min_size=1).map(
    clean_name
)
times = st.floats(0, 1000).map(lambda value: round(value, 3))
instances = st.builds(lambda a, b, label: Instance(min(a, b), max(a, b), label), times, times, names)


@st.composite
def annotations(draw: st.DrawFn) -> Annotations:
    """Any annotations."""
    videos = {}
    for name in draw(st.lists(names, unique=True, max_size=4)):
        duration = draw(st.floats(0.01, 1e5).map(lambda value: round(value, 3)))
        found = tuple(draw(st.lists(instances, max_size=4)))
        fps = draw(st.sampled_from([25.0, 29.97]))
        videos[name] = Video(name, draw(st.sampled_from(["training", "test"])), duration, found, fps)
    return Annotations(videos)


@pytest.mark.parametrize("layout", WRITTEN)
@settings(max_examples=25, deadline=None)
@given(content=annotations())
def test_whatever_they_hold(tmp_path_factory: pytest.TempPathFactory, layout: str, content: Annotations) -> None:
    path = tmp_path_factory.mktemp("a") / ("a.csv" if layout == "csv" else "a.json")
    write_as(layout, content, path)
    assert load_any_layout(path) == content


def test_the_json_layouts_are_what_training_and_actionformer_load(tmp_path: Path) -> None:
    for layout in ("activitynet", "actionformer"):
        write_as(layout, Annotations(VIDEOS), tmp_path / "a.json")
        assert read_annotations(tmp_path / "a.json") == VIDEOS
    entry = json.loads((tmp_path / "a.json").read_text())["database"]["v_a"]
    assert (entry["fps"], [item["label_id"] for item in entry["annotations"]]) == (29.97, [0, 1])
    source = Annotations(VIDEOS, {"training": "Training"}, {"Diving": 7})  # what ActivityNet's evaluator needs
    write_as("csv", source, tmp_path / "a.csv")
    assert load_any_layout(tmp_path / "a.csv").subsets["training"] == "Training"
    write_as("activitynet", source, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert (content["taxonomy"], content["database"]["v_a"]["subset"]) == ([], "Training")
    write_as("actionformer", source, tmp_path / "a.json")
    loaded = load_any_layout(tmp_path / "a.json")
    assert loaded.label_ids == {"Diving": 7, "Hand, washing": 0}
    write_as("opentad", loaded, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["database"]["v_a"]["frame"] == 1813
    assert (tmp_path / "category_idx.txt").read_text() == "Hand, washing\nDiving\n"
    assert load_any_layout(tmp_path / "a.json").label_ids == {"Hand, washing": 0, "Diving": 1}
    with pytest.raises(StaleError, match="layout opentad counts frames, but no fps is known of v_a"):
        write_as("opentad", Annotations({"v_a": replace(VIDEOS["v_a"], fps=None)}), tmp_path / "b.json")
    with pytest.raises(StaleError, match="layout 'xml' is not written"):
        write_as("xml", Annotations(VIDEOS), tmp_path / "a.json")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "a\\b", "", ".", "..", ".hidden", "a\0"])
def test_ids_that_would_leave_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"database": {name: {"subset": "test", "duration": 1, "annotations": []}}}))
    with pytest.raises(StaleError, match="ids that cannot name a file"):
        load_any_layout(path)


HEAD = "video,subset,duration,start,end,label\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("video,start,end,label\n", "no column subset, duration"),
        (HEAD + "a,test,10,1,2,x,y\n", "line 2: more or fewer"),
        (HEAD + "a,test,ten,1,2,x\n", "line 2: video 'a': 'duration' must be a positive number of seconds, not 'ten'"),
        (HEAD + "a,test,nan,1,2,x\n", "'duration' must be a positive number of seconds, not nan"),
        *((HEAD + f"a,test,10,{row}\n", "annotation needs a 'segment'") for row in ("2,1,x", "1,,x", "1,2,")),
        (HEAD + "a,,10,1,2,x\n", "'subset' is missing"),
        (HEAD + "a,test,10,1,2,x\na,train,10,1,2,x\n", "line 3: video 'a' has another subset"),
        (HEAD + ",,,,,\n\na,test,1" + 400 * "0" + ",1,2,x\n", "line 4: video 'a': 'duration' must be"),
        (HEAD + 'a,test,10,1,2,"x\nb,test,10,1,2,x\n', "line 3: unexpected end of data"),
        (HEAD + f"a,test,10,1,2,{'x' * 140_000}\n", "line 2: field larger than field limit"),
        (HEAD + "../a,test,10,1,2,x\n", "cannot name a file"),
    ],
)
def test_odd_tables(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(StaleError, match=fault):
        load_any_layout(path)


@pytest.mark.parametrize("change", [lambda x: x.replace(",", ";"), str.upper, lambda x: x.replace("\n", "\r")])
def test_tables_of_other_programs(tmp_path: Path, change: Callable[[str], str]) -> None:
    (tmp_path / "a.csv").write_bytes(change(f"{HEAD}a,test,10,1,2,x\n,,,,,\n").encode())
    (video,) = load_any_layout(tmp_path / "a.csv").videos.values()
    assert (video.subset, video.duration, video.instances[0].start, video.instances[0].end) == ("test", 10, 1, 2)
    with pytest.raises(StaleError, match="a.csv: JSON .* ActivityNet's layout, is expected; .* convert IN OUT"):
        read_annotations(tmp_path / "a.csv")
