"""Evaluation of temporal detections: exact, fast, on plain numpy arrays and without torch.

from stale.data.annotations import in_subset, read_annotations
from stale.evaluation import align, default_tious, evaluate, ground_truth, read_results

truth = ground_truth(in_subset(read_annotations("annotations.json").values(), "test"))
found, problems = align(read_results("detections.json"), truth)
metrics = evaluate(truth, found, default_tious("thumos14"))  # metrics.average, .mean_ap (R), .ap (R, K)
"""

from stale.evaluation.analysis import analyze
from stale.evaluation.instances import Detections, GroundTruth, detections, drop_duplicates, ground_truth
from stale.evaluation.mean_ap import Metrics, evaluate, evaluate_results
from stale.evaluation.measures import (
    average_recall,
    class_agnostic,
    top1_accuracy,
    with_true_labels,
    with_true_segments,
)
from stale.evaluation.protocol import default_tious
from stale.evaluation.results import Problem, Results, align, read_results, results_from_dict

__all__ = [
    "Detections",
    "GroundTruth",
    "Metrics",
    "Problem",
    "Results",
    "align",
    "analyze",
    "average_recall",
    "class_agnostic",
    "default_tious",
    "detections",
    "drop_duplicates",
    "evaluate",
    "evaluate_results",
    "ground_truth",
    "read_results",
    "results_from_dict",
    "top1_accuracy",
    "with_true_labels",
    "with_true_segments",
]
