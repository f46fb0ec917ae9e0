// folded_network's kernels for one instruction set; setup.py chooses the compiler's flags by name.
#define PNFS_LANES 16
#include "cpu/folded_network_kernels.h"

namespace pnfs {
const FoldedKernels kFoldedAmx = kKernels;
}
