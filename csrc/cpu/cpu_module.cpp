// The Python module pnfs._cpu. An op's file defines register_<op>; PNFS_OPS lists the ops.
//
// Functions take raw addresses, sizes and strides: nothing here knows torch. The module is linked
// without an OpenMP runtime and uses the one that torch has loaded (pnfs/kernels/native.py), so both
// share one thread pool.

#include <pybind11/pybind11.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#define PNFS_OPS(X) \
  X(crop_normalize) \
  X(decode_heatmaps) \
  X(oks_nms)

namespace pnfs {
#define PNFS_DECLARE(op) void register_##op(pybind11::module_&);
PNFS_OPS(PNFS_DECLARE)
}  // namespace pnfs

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of pnfs; called through pnfs.kernels.";
  module.def(
      "max_threads",
      [] {
#if defined(_OPENMP)
        return omp_get_max_threads();
#else
        return 1;
#endif
      },
      "Threads that the next parallel region of the calling thread would use.");
#define PNFS_REGISTER(op) pnfs::register_##op(module);
  PNFS_OPS(PNFS_REGISTER)
}
