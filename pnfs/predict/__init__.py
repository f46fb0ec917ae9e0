"""Poses of image files, folders and videos: drawings and one JSON file in COCO results format."""

from pnfs.predict.boxes import BoxTable, read_boxes
from pnfs.predict.runner import PredictReport, predict

__all__ = ["BoxTable", "PredictReport", "predict", "read_boxes"]
