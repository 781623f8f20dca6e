"""Evaluation of temporal detections: exact, fast, on plain numpy arrays and without torch.

from stale.data.annotations import in_subset, read_annotations
from stale.data.datasets import facts
from stale.evaluation import align, evaluate, ground_truth, read_results

truth = ground_truth(in_subset(read_annotations("annotations.json").values(), "test"))
found, problems = align(read_results("detections.json"), truth)
metrics = evaluate(truth, found, facts("thumos14").tious)  # metrics.average, .mean_ap (R), .ap (R, K)
"""

from stale.evaluation.mean_ap import Detections, GroundTruth, Metrics, drop_duplicates, evaluate, ground_truth
from stale.evaluation.results import Results, align, detections, evaluate_results, read_results, results_from_dict

__all__ = ["Detections", "GroundTruth", "Metrics", "Results", "align", "detections", "drop_duplicates", "evaluate"]
__all__ += ["evaluate_results", "ground_truth", "read_results", "results_from_dict"]
