"""The public ops, and the switches that choose their backend.

from pnfs import kernels
with kernels.use_backend("torch"):   # "auto" | "torch" | "cpp" | "triton" | "cuda"
    ...
print(kernels.explain())
"""

from pnfs.kernels.batch_norm_act import batch_norm_act
from pnfs.kernels.batch_stats import batch_stats
from pnfs.kernels.crop_normalize import crop_normalize
from pnfs.kernels.decode_heatmaps import decode_heatmaps
from pnfs.kernels.depthwise_fanout import depthwise_fanout
from pnfs.kernels.folded_network import folded_network
from pnfs.kernels.mixed_sum import mixed_sum
from pnfs.kernels.oks_nms import oks_matrix, oks_nms
from pnfs.kernels.registry import dispatch, explain, ops, use_backend
from pnfs.kernels.scale_mix import scale_mix
from pnfs.kernels.separable_conv import separable_conv
from pnfs.kernels.shared import SharedMap
from pnfs.kernels.strided_conv import strided_conv
from pnfs.kernels.vector_heatmap import vector_heatmap
from pnfs.kernels.vector_heatmap_loss import vector_heatmap_loss

__all__ = [
    "SharedMap",
    "batch_norm_act",
    "batch_stats",
    "crop_normalize",
    "decode_heatmaps",
    "depthwise_fanout",
    "dispatch",
    "explain",
    "folded_network",
    "mixed_sum",
    "oks_matrix",
    "oks_nms",
    "ops",
    "scale_mix",
    "separable_conv",
    "strided_conv",
    "use_backend",
    "vector_heatmap",
    "vector_heatmap_loss",
]
