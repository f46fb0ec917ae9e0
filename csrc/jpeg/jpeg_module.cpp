// The Python module pnfs._jpeg: every function of ops.h, without the global interpreter lock.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "jpeg/ops.h"

PYBIND11_MODULE(_jpeg, module) {
  module.doc() = "Regions of JPEG images; called through pnfs.data.images.";
#define PNFS_DEF(name) \
  module.def(#name, &pnfs::name, pybind11::call_guard<pybind11::gil_scoped_release>())
  PNFS_DEF(jpeg_size);
  PNFS_DEF(decode_jpeg_region);
}
