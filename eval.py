"""Evaluate detections: anyone's file, a run folder, or many runs.

    python eval.py --predictions P.json --annotations A.json [--subset S] [--split-file LIST] [--tiou 0.3 0.4 …]
                   [--json OUT] [--video-scores FILE] [--analyze DIR] [--strict] [--duplicates keep|drop]
    python eval.py --run RUN [--vocabulary unseen|seen|all]       also writes RUN/metrics.json
    python eval.py --runs DIR... [--versus DIR...] [--json OUT]   mean, deviation, interval, paired differences

Per-class AP is exactly the official ActivityNet evaluator's. Every table is headed by its protocol.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stale.data.annotations import Video, all_labels, in_subset, read_annotations
from stale.data.splits import read_class_list
from stale.errors import StaleError, name_some, run_command
from stale.evaluation.aggregate import aggregate, aggregate_report, read_runs
from stale.evaluation.assess import Assessment, Subject, assess
from stale.evaluation.protocol import check_tious, default_tious
from stale.evaluation.report import report
from stale.evaluation.results import Results, read_results
from stale.evaluation.video_scores import VideoScores, read_video_scores
from stale.files import read_json, write_json

UNTRAINED = ("whole_video", "snippets")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked for options that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", metavar="FILE", help="detections, JSON or gzipped JSON")
    source.add_argument("--run", metavar="RUN", help="run folder that inference.py has written detections into")
    source.add_argument("--runs", metavar="DIR", nargs="+", help="run folders to aggregate")
    parser.add_argument("--versus", metavar="DIR", nargs="+", help="with --runs: a second system's run folders")
    parser.add_argument("--annotations", metavar="FILE", help="annotations in ActivityNet's layout")
    parser.add_argument("--subset", help="subset to test on; default test (THUMOS14) or validation")
    parser.add_argument("--split-file", metavar="LIST", help="the classes under test, one a line; default all")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), help="with --run(s); default unseen")
    parser.add_argument("--tiou", type=float, nargs="+", metavar="T", help="thresholds; default the data set's")
    parser.add_argument("--json", metavar="OUT", help="write all figures as JSON")
    parser.add_argument("--video-scores", metavar="FILE", help="apply external video-level classes (opt-in)")
    parser.add_argument(
        "--allow-unseen-supervision", action="store_true", help="let FILE hold classes beyond those under test"
    )
    parser.add_argument("--analyze", metavar="DIR", help="write an error analysis: JSON, PNGs, one HTML page")
    parser.add_argument("--strict", action="store_true", help="any odd detection is an error")
    parser.add_argument(
        "--ground-truth",
        choices=("all", "predicted-videos"),
        default="all",
        help="predicted-videos: as the released code, leave out the videos without detections; named in the table",
    )
    parser.add_argument("--duplicates", choices=("keep", "drop"), default="keep", help="of ground truth")
    options = parser.parse_args(arguments)
    refuse_idle_options(parser, options)
    options.vocabulary = options.vocabulary or "unseen"
    return options


def refuse_idle_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """An option that would do nothing is a mistake, and a table of another protocol than meant."""
    source = "predictions" if options.predictions else "run" if options.run else "runs"
    idle = {
        "predictions": ("versus", "vocabulary"),
        "run": ("versus", "split_file"),
        "runs": tuple(name for name in vars(options) if name not in ("runs", "versus", "vocabulary", "json")),
    }
    for name in idle[source]:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does not go with --{source}")
    if options.predictions and not options.annotations:
        parser.error("--predictions needs --annotations")
    if options.allow_unseen_supervision and not options.video_scores:
        parser.error("--allow-unseen-supervision goes with --video-scores")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    if options.runs:
        return evaluate_runs(options)
    assessment = evaluate_run(Path(options.run), options) if options.run else evaluate_predictions(options)
    content = assessment.as_dict()
    print(report(content))
    if options.run:
        save_in_run(content, options)
    if options.json:
        write_json(options.json, content, indent=1)
    if options.analyze:
        from stale.evaluation.analysis_page import write_analysis  # imports matplotlib

        print(f"\nanalysis: {write_analysis(assessment, options.analyze)}")
    return None


def evaluate_predictions(options: argparse.Namespace) -> Assessment:
    """``--predictions``: what the options and the files say decides the protocol."""
    videos = read_annotations(options.annotations)
    results = read_results(options.predictions, partial(label_ids, options.annotations))
    dataset = results.protocol.get("dataset") or guess_dataset(options.annotations, videos)
    tested = choose_subset(list(videos.values()), options.subset or results.protocol.get("subset"), dataset)
    classes, setting = classes_under_test(options, results, videos)
    tious = options.tiou or results.protocol.get("tious") or default_tious(dataset)
    subject = make_subject(options, tested, classes, tious, results)
    protocol = {**results.protocol, "dataset": dataset, **setting}
    return assess(subject, results, protocol, {}, load_video_scores(options, subject), strict=options.strict)


def evaluate_run(run: Path, options: argparse.Namespace) -> Assessment:
    """``--run``: the protocol that inference.py wrote decides."""
    results = read_run_results(run, file_name("detections", options.vocabulary))
    protocol = results.protocol
    missing = [key for key in ("dataset", "subset", "classes", "annotations") if key not in protocol]
    if missing:
        raise StaleError(f"{results.path}: its 'protocol' lacks {name_some(missing)}; run inference.py again")
    videos = read_annotations(options.annotations or protocol["annotations"])
    tested = in_subset(videos.values(), options.subset or protocol["subset"])
    tious = options.tiou or protocol.get("tious") or default_tious(protocol["dataset"])
    subject = make_subject(options, tested, protocol["classes"], tious, results)
    untrained = read_untrained(run, options.vocabulary)
    groups = class_groups(run, protocol) if options.vocabulary == "all" else {}
    external = load_video_scores(options, subject)
    return assess(subject, results, protocol, untrained, external, groups, options.strict)


def evaluate_runs(options: argparse.Namespace) -> None:
    """``--runs``: mean, deviation and interval over run folders."""
    name = file_name("metrics", options.vocabulary)
    content = aggregate(read_runs(options.runs, name), read_runs(options.versus or [], name))
    print(aggregate_report(content))
    if options.json:
        write_json(options.json, content, indent=1)


def save_in_run(content: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the run's metrics file, unless options made this another protocol than the run's own."""
    path = Path(options.run) / file_name("metrics", options.vocabulary)
    altered = {
        "--tiou": options.tiou,
        "--subset": options.subset,
        "--video-scores": options.video_scores,
        "--duplicates drop": options.duplicates == "drop",
        "--ground-truth": options.ground_truth != "all",
    }
    if any(altered.values()):
        given = name_some(option for option, value in altered.items() if value)
        print(f"\n{path.name} is not written: {given} changed the protocol of the run; --json OUT writes it")
    else:
        write_json(path, content, indent=1)


def make_subject(
    options: argparse.Namespace,
    videos: list[Video],
    classes: Sequence[str] | None,
    tious: Sequence[float],
    results: Results,
) -> Subject:
    """The test that the options ask for."""
    labels = tuple(classes) if classes is not None else None
    subject = Subject(tuple(videos), labels, check_tious(tious), options.duplicates)
    return subject if options.ground_truth == "all" else subject.within(results)


def load_video_scores(options: argparse.Namespace, subject: Subject) -> VideoScores | None:
    """The external scores, if any were asked for."""
    if not options.video_scores:
        return None
    return read_video_scores(options.video_scores, subject.truth(), options.allow_unseen_supervision)


def classes_under_test(
    options: argparse.Namespace, results: Results, videos: dict[str, Video]
) -> tuple[Sequence[str] | None, dict[str, Any]]:
    """The classes and what to say of them: a list file, else the file's own protocol, else all that occur."""
    if options.split_file:
        classes = read_class_list(options.split_file)
        strangers = sorted(set(classes) - set(all_labels(videos.values())))
        if strangers:
            raise StaleError(f"split file {options.split_file}: not in the annotations: {name_some(strangers)}")
        stated = {"setting": "classes of a list", "split": None, "split_source": options.split_file}
        return classes, {**stated, "vocabulary": "of the list"}
    if isinstance(results.protocol.get("classes"), list):
        return results.protocol["classes"], {}
    return None, {"setting": "all classes", "split": None, "vocabulary": "all that occur"}


def choose_subset(videos: list[Video], subset: str | None, dataset: str) -> list[Video]:
    """The videos of the subset asked for, of the customary one, or of the only one there is."""
    present = {video.subset for video in videos}
    customary = "test" if "thumos" in dataset.lower() else "validation"
    if subset is None and customary not in present and len(present) == 1:
        return videos
    return in_subset(videos, subset or customary)


def guess_dataset(annotations: str, videos: dict[str, Video]) -> str:
    """``thumos14`` by its video ids, ``activitynet`` by the file's name, else that name."""
    name = Path(annotations).name.split(".")[0]
    if all(re.match(r"video_(test|validation)_\d+$", video) for video in videos):
        return "thumos14"
    return "activitynet" if re.search(r"activity_?net|anet", name.lower()) else name


def label_ids(annotations: str) -> dict[int, str]:
    """The class of each ``label_id`` in the annotations, for detections that number their classes."""
    entries = read_json(annotations, "annotation file")["database"].values()
    items = [item for entry in entries for item in entry.get("annotations", [])]
    return {item["label_id"]: item["label"] for item in items if "label_id" in item}


def class_groups(run: Path, protocol: dict[str, Any]) -> dict[str, Sequence[str]]:
    """Seen and unseen classes of a generalised run: by its protocol, else by its file on the unseen alone."""
    unseen = protocol.get("unseen_classes")
    if unseen is None:
        unseen = read_run_results(run, "detections.json").protocol.get("classes", [])
    return {"seen": [label for label in protocol["classes"] if label not in set(unseen)], "unseen": unseen}


def read_run_results(run: Path, name: str) -> Results:
    """A detections file of a run folder."""
    path = run / name
    if not path.is_file():
        raise StaleError(f"no detections in {run}: {path} is missing; run inference.py first")
    return read_results(path)


def read_untrained(run: Path, vocabulary: str) -> dict[str, Results]:
    """The untrained rows that inference.py wrote; it leaves out those that the features do not allow."""
    files = {name: f"untrained/{file_name(name, vocabulary)}" for name in UNTRAINED}
    missing = [str(run / file) for file in files.values() if not (run / file).is_file()]
    if missing:
        print(f"note: untrained rows that inference.py did not write: {name_some(missing)}")
    return {name: read_run_results(run, file) for name, file in files.items() if str(run / file) not in missing}


def file_name(stem: str, vocabulary: str) -> str:
    """``detections.json``, ``detections_seen.json`` and so on."""
    return f"{stem}.json" if vocabulary == "unseen" else f"{stem}_{vocabulary}.json"


if __name__ == "__main__":
    run_command(main)
