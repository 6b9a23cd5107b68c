"""What an edit did: accuracies and generalisation per language, what stayed as it was, and how sure the figures are."""

from __future__ import annotations

from xpatch.evaluation.alone import evaluate_alone
from xpatch.evaluation.bootstrap import Estimate
from xpatch.evaluation.metrics import Metrics, measure
from xpatch.evaluation.predict import batches, label_index, label_names, predict, predict_indices
from xpatch.evaluation.readings import Readings
from xpatch.evaluation.report import Report, pool
from xpatch.evaluation.runner import evaluate

__all__ = [
    "Estimate",
    "Metrics",
    "Readings",
    "Report",
    "batches",
    "evaluate",
    "evaluate_alone",
    "label_index",
    "label_names",
    "measure",
    "pool",
    "predict",
    "predict_indices",
]
