"""Scores: COCO AP and PCKh, each with the words that say how it was measured."""

from pnfs.evaluation.coco import Candidates, coco_ap, coco_results, rescore
from pnfs.evaluation.pckh import pckh
from pnfs.evaluation.runner import EvalResult, evaluate

__all__ = [
    "Candidates",
    "EvalResult",
    "coco_ap",
    "coco_results",
    "evaluate",
    "pckh",
    "rescore",
]
