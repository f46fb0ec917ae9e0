// The Python module pnfs._cuda: every function of ops.h, without the global interpreter lock.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/ops.h"

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of pnfs; called through pnfs.kernels.";
#define PNFS_DEF(name) \
  module.def(#name, &pnfs::name, pybind11::call_guard<pybind11::gil_scoped_release>())
  PNFS_DEF(crop_normalize);
  PNFS_DEF(depthwise_fanout);
  PNFS_DEF(depthwise_fanout_backward);
  PNFS_DEF(depthwise_fanout_scratch);
  PNFS_DEF(oks_nms);
}
