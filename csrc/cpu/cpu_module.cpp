// The Python module pnfs._cpu: every function of ops.h, without the global interpreter lock.
//
// It is linked without an OpenMP runtime and uses the one that torch has loaded
// (pnfs/kernels/native.py), so both share one thread pool.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace {

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of pnfs; called through pnfs.kernels.";
  module.def("max_threads", &max_threads, "Threads that a parallel region of this thread gets.");
  module.def("instruction_sets", &pnfs::instruction_sets,
             "Values of PNFS_ISA that this CPU can run, best first.");
  module.def("multiplies_bfloat16", &pnfs::multiplies_bfloat16,
             "Whether products in bfloat16 run on instructions for them; as PNFS_ISA allows.");
#define PNFS_DEF(name) \
  module.def(#name, &pnfs::name, pybind11::call_guard<pybind11::gil_scoped_release>())
  PNFS_DEF(batch_norm_act);
  PNFS_DEF(batch_norm_act_backward);
  PNFS_DEF(batch_stats);
  PNFS_DEF(batch_stats_backward);
  PNFS_DEF(crop_normalize);
  PNFS_DEF(decode_heatmaps);
  PNFS_DEF(depthwise_fanout);
  PNFS_DEF(depthwise_fanout_backward);
  PNFS_DEF(folded_network);
  PNFS_DEF(mixed_sum);
  PNFS_DEF(mixed_sum_backward);
  PNFS_DEF(oks_nms);
  PNFS_DEF(scale_mix);
  PNFS_DEF(scale_mix_backward);
  PNFS_DEF(separable_conv);
  PNFS_DEF(separable_conv_backward);
  PNFS_DEF(strided_conv);
  PNFS_DEF(strided_conv_backward);
  PNFS_DEF(vector_heatmap);
  PNFS_DEF(vector_heatmap_backward);
  PNFS_DEF(vector_heatmap_loss);
}
