"""The public ops, and the switches that choose their backend.

from pnfs import kernels
with kernels.use_backend("torch"):   # "auto" | "torch" | "cpp" | "triton" | "cuda"
    ...
print(kernels.explain())
"""

from pnfs.kernels.crop_normalize import crop_normalize
from pnfs.kernels.decode_heatmaps import decode_heatmaps
from pnfs.kernels.oks_nms import oks_matrix, oks_nms
from pnfs.kernels.registry import dispatch, explain, ops, use_backend

__all__ = [
    "crop_normalize",
    "decode_heatmaps",
    "dispatch",
    "explain",
    "oks_matrix",
    "oks_nms",
    "ops",
    "use_backend",
]
