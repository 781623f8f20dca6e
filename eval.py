"""Evaluate detections: anyone's file, a run folder, or many runs.

    python eval.py --predictions P.json --annotations A.json
    python eval.py --run RUN                      # also writes RUN/metrics.json
    python eval.py --run RUN --report DIR         # a page to browse
    python eval.py --runs DIR... --versus DIR...  # means, paired differences

P.json is in ActivityNet's layout, times in seconds, a higher score for a surer
detection: {"results": {"video": [{"label": "Diving", "score": 0.9, "segment":
[1.5, 4.0]}]}}. What inference.py adds under "protocol" then need not be said.

Protocols of zero-shot detection; their numbers must not be compared:

    test         unseen classes in the test subset
    val+test     unseen classes in both annotated subsets (T3AL, FreeZAD);
                 of ActivityNet and others in training and validation
    generalized  seen and unseen classes together in the test subset, and the
                 harmonic mean of both groups

AP of each class is exactly that of the official ActivityNet evaluator, with one
exception: an instance and a detection that both have no length do not match
here; there, 0/0 counts as a match.
"""

import argparse
import gc
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stale.commands import CommandParser
from stale.data.annotations import Video, all_labels, in_subset, read_annotations, unit_fault
from stale.data.datasets import facts
from stale.data.splits import read_class_list
from stale.errors import StaleError, name_some, run_command
from stale.evaluation.aggregate import aggregate, aggregate_report, read_runs
from stale.evaluation.assess import Assessment, Subject, assess
from stale.evaluation.model_card import update_results
from stale.evaluation.results import ALLOW_UNSEEN, Results, read_results, read_video_scores
from stale.evaluation.tables import FORMATS, check_tious, render, report
from stale.io import file_sha256, write_json
from stale.run_folder import BASELINES, RunFolder


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; an option that would have no effect is an error."""
    parser = CommandParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", metavar="FILE", help="detections, JSON or gzipped JSON")
    source.add_argument("--run", metavar="RUN", help="run folder that inference.py has written detections into")
    source.add_argument("--runs", metavar="DIR", nargs="+", help="run folders to aggregate")
    parser.add_argument("--versus", metavar="DIR", nargs="+", help="with --runs: a second system's run folders")
    parser.add_argument("--annotations", metavar="FILE", help="annotations in ActivityNet's layout")
    parser.add_argument("--protocol", choices=("test", "val+test", "generalized"), default="test", help="see above")
    parser.add_argument("--subset", help="subset to test on, or several (a+b); default the protocol's")
    parser.add_argument("--split-file", metavar="UNSEEN", help="the unseen classes, one a line; default all classes")
    parser.add_argument("--vocabulary", choices=("unseen", "seen", "all"), help="with --run(s); default the protocol's")
    parser.add_argument("--tiou", type=float, nargs="+", metavar="T", help="thresholds; default the data set's")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the tables; default text")
    parser.add_argument("-v", "--verbose", action="store_true", help="also 95 %% intervals, and the AP of each class")
    parser.add_argument("--json", metavar="OUT", help="write all metrics as JSON, as fractions")
    parser.add_argument("--report", metavar="DIR", help="write DIR/index.html, a page of results, errors and videos")
    parser.add_argument("--videos", metavar="DIR", help="with --report: video files that the page plays")
    parser.add_argument("--video-scores", metavar="FILE", help="apply external video-level classes (opt-in)")
    parser.add_argument(ALLOW_UNSEEN, action="store_true", help="let FILE hold classes beyond those under test")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="labels that FILE gives a video; default 1")
    parser.add_argument("--decay", type=float, default=1.0, metavar="D", help="factor on each further label's score")
    parser.add_argument(
        "--ground-truth",
        choices=("all", "predicted-videos"),
        default="all",
        help="predicted-videos: leave out the videos without detections, as the released code does",
    )
    parser.add_argument("--duplicates", choices=("keep", "drop"), default="keep", help="of ground truth")
    parser.add_argument("--strict", action="store_true", help="refuse detections with any problem")
    options = parser.parse_args(arguments)
    source_name = "predictions" if options.predictions else "run" if options.run else "runs"
    without_effect = {
        "predictions": ("versus", "vocabulary"),
        "run": ("versus", "split_file"),
        "runs": tuple({*vars(options)} - {"runs", "versus", "vocabulary", "protocol", "json", "format", "verbose"}),
    }
    for name in without_effect[source_name]:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does not go with --{source_name}")
    if options.predictions and not options.annotations:
        parser.error("--predictions needs --annotations")
    extra = options.allow_unseen_supervision or (options.top, options.decay) != (1, 1)
    if extra and not options.video_scores:
        parser.error(f"{ALLOW_UNSEEN}, --top and --decay go with --video-scores")
    if options.protocol == "val+test" and (options.runs or "+" not in (options.subset or "+")):
        parser.error("--protocol val+test goes without --runs, and with a --subset of several, such as a+b")
    if options.videos and not options.report:
        parser.error("--videos goes with --report")
    if options.top < 1 or not 0 <= options.decay <= 1:
        parser.error("--top is at least 1, --decay from 0 to 1")
    if options.protocol == "generalized" and (options.vocabulary or options.predictions and not options.split_file):
        parser.error("--protocol generalized goes without --vocabulary, and with --predictions needs --split-file")
    options.vocabulary = options.vocabulary or ("all" if options.protocol == "generalized" else "unseen")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    if options.runs:
        name = RunFolder(Path()).metrics(options.vocabulary).name
        content = aggregate(read_runs(options.runs, name), read_runs(options.versus or [], name))
        print(render(aggregate_report(content, options.verbose), options.format))
    else:
        assessment, own = evaluate_run(options) if options.run else (evaluate_predictions(options), "")
        content = assessment.metrics
        print(render(report(content, options.verbose), options.format))
        if options.run:
            save_in_run(content, options, own)
    if options.json:
        write_json(options.json, content, indent=1)
    if options.report:
        from stale.reports import Subject as Reported  # imports jinja2
        from stale.reports import write_report

        reported = Reported(Path(options.run or options.predictions), assessment)
        note(f"report: {write_report([reported], options.report, options.videos)}")


def evaluate_predictions(options: argparse.Namespace) -> Assessment:
    """``--predictions``: what the options and the files say decides the protocol."""
    videos = read_annotations(options.annotations, need_durations=False)
    results = read_results(options.predictions)
    dataset = results.protocol.get("dataset") or guess_dataset(options.annotations, videos)
    present, usual = {video.subset for video in videos.values()}, facts(dataset).subsets
    subset = wanted_subset(options, results, dataset, present)
    if subset is None:  # the data set's, or the only one there is
        subset = present.pop() if len(present) == 1 else usual[1]
    classes, stated = classes_under_test(options, results, videos)
    tested, groups = in_subset(videos.values(), subset), {}
    if options.protocol == "generalized" and classes is not None:
        groups = grouped(all_labels(tested), classes)
        classes = [*groups["seen"], *groups["unseen"]]
    protocol = {**results.protocol, "dataset": dataset, **stated}
    return run_assessment(options, results, videos=tested, classes=classes, protocol=protocol, groups=groups)


def evaluate_run(options: argparse.Namespace) -> tuple[Assessment, str]:
    """``--run``: the protocol that inference.py wrote decides. Also returns the path of the run's own annotations."""
    run = RunFolder(Path(options.run))
    results = read_run_results(run.detections(options.vocabulary), run)
    protocol = results.protocol
    missing = [key for key in ("dataset", "subset", "classes", "annotations") if protocol.get(key) is None]
    if missing:
        raise StaleError(f"{results.path}: its 'protocol' lacks {name_some(missing)}; run inference.py again")
    videos = read_annotations(options.annotations or protocol["annotations"], need_durations=False)
    subset = wanted_subset(options, results, protocol["dataset"], {video.subset for video in videos.values()})
    tested = in_subset(videos.values(), subset or protocol["subset"])
    files = {name: run.baselines(name, options.vocabulary) for name in BASELINES}
    absent = [str(file) for file in files.values() if not file.is_file()]
    if absent:  # inference.py leaves out those that the features do not allow
        note(f"note: training-free baselines that inference.py did not write: {name_some(absent)}")
    baselines = {name: read_results(file) for name, file in files.items() if file.is_file()}
    groups: dict[str, Sequence[str]] = {}
    if options.vocabulary == "all":
        unseen = protocol.get("unseen_classes")
        if unseen is None:
            unseen = read_run_results(run.detections("unseen"), run).protocol.get("classes", [])
        groups = grouped(protocol["classes"], unseen)
        if options.protocol == "generalized" and not all(groups.values()):
            raise StaleError(f"{run.path}: --protocol generalized needs seen and unseen classes; the run has one group")
    known = {"protocol": protocol, "baselines": baselines, "groups": groups}
    assessment = run_assessment(options, results, videos=tested, classes=protocol["classes"], **known)
    return assessment, protocol["annotations"]


def wanted_subset(options: argparse.Namespace, results: Results, dataset: str, present: set[str]) -> str | None:
    """The subset to count, if the options or the file say it; a StaleError if the file has detections of less.

    ``present`` are the subsets of the annotations; those of another project can have other names than the file's.
    """
    stated = results.protocol.get("subset")
    subset = options.subset or stated
    if options.protocol == "val+test" and "+" not in (subset or ""):
        subset = "+".join(facts(dataset).subsets)
    names = {*(stated or "").lower().split("+")}
    if subset and names <= present and not {*subset.lower().split("+")} <= names:
        fix = f"set data.test_subset={subset} and run inference.py again"
        raise StaleError(f"{results.path} has detections of subset {stated} alone: {fix}")
    return subset


def run_assessment(
    options: argparse.Namespace,
    results: Results,
    *,
    videos: list[Video],
    classes: Sequence[str] | None,
    protocol: dict[str, Any],
    **known: Any,
) -> Assessment:
    """Assess what the options ask for: thresholds, counting and external scores."""
    tious = check_tious(options.tiou or protocol.get("tious") or facts(protocol["dataset"]).tious)
    subject = Subject(tuple(videos), None if classes is None else tuple(classes), tious, options.duplicates)
    if options.ground_truth != "all":
        subject = subject.within(results)
    if fault := unit_fault(videos):
        note(f"warning: annotations, {fault}")
    if subject.truth().estimated:
        note("note: not all durations are annotated; the end of a video's last instance is used for its end")
    scores = None
    if options.video_scores:
        ranks = {"top": options.top, "decay": options.decay}
        scores = read_video_scores(options.video_scores, subject.truth(), options.allow_unseen_supervision, **ranks)
    assessment = assess(subject, results, protocol, video_scores=scores, **known)
    problems = assessment.metrics["problems"]
    if options.strict and problems:
        found = (f"{one['count']} with {one['kind']} ({name_some(one['names'])})" for one in problems)
        raise StaleError(f"detections file {results.path}: {'; '.join(found)}; correct it or leave out --strict")
    return assessment


def save_in_run(content: dict[str, Any], options: argparse.Namespace, annotations: str) -> None:
    """Write the run's metrics file, unless options made this another protocol than the run's own (``annotations``)."""
    path = RunFolder(Path(options.run)).metrics(options.vocabulary)
    own, given = Path(annotations), Path(options.annotations or annotations)
    altered = {
        "--annotations": own.is_file() and file_sha256(own) != file_sha256(given),  # not the same file elsewhere
        "--subset": options.subset,
        "--tiou": options.tiou,
        "--video-scores": options.video_scores,
        "--duplicates drop": options.duplicates == "drop",
        "--ground-truth": options.ground_truth != "all",
    }
    if any(altered.values()):
        changes = name_some(option for option, value in altered.items() if value)
        note(f"{path.name} is not written: {changes} changed the protocol of the run; --json OUT writes it")
    else:
        write_json(path, content, indent=1)
        update_results(RunFolder(Path(options.run)))


def classes_under_test(
    options: argparse.Namespace, results: Results, videos: dict[str, Video]
) -> tuple[Sequence[str] | None, dict[str, Any]]:
    """The classes and their description: a list file, else the file's own protocol, else all that occur."""
    if options.split_file:
        classes = read_class_list(options.split_file)
        unknown = sorted(set(classes) - set(all_labels(videos.values())))
        if unknown:
            raise StaleError(f"split file {options.split_file}: not in the annotations: {name_some(unknown)}")
        stated = {"setting": "classes of a list", "split": None, "split_source": options.split_file}
        return classes, {**stated, "vocabulary": "all" if options.protocol == "generalized" else "of the list"}
    if isinstance(results.protocol.get("classes"), list):
        return results.protocol["classes"], {}
    return None, {"setting": "all classes", "split": None, "vocabulary": "all that occur"}


def note(text: str) -> None:
    """Print a remark on stderr: stdout holds nothing but the report."""
    print(text, file=sys.stderr)


def grouped(classes: Sequence[str], unseen: Sequence[str]) -> dict[str, Sequence[str]]:
    """The two groups of classes of a generalized test."""
    return {"seen": [label for label in classes if label not in set(unseen)], "unseen": unseen}


def guess_dataset(annotations: str, videos: dict[str, Video]) -> str:
    """``thumos14`` by its video ids, ``activitynet`` by the file's name, else that name."""
    name = Path(annotations).name.split(".")[0]
    if all(re.match(r"video_(test|validation)_\d+$", video) for video in videos):
        return "thumos14"
    return "activitynet" if re.search(r"activity_?net|anet", name.lower()) else name


def read_run_results(path: Path, run: RunFolder) -> Results:
    """A detections file of a run folder."""
    if not path.is_file():
        raise StaleError(f"no detections in {run.path}: {path} is missing; run inference.py first")
    return read_results(path)


if __name__ == "__main__":
    gc.disable()  # it would visit all detections again and again, and free nothing
    run_command(main)
