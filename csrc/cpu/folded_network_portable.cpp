// folded_network's kernels for one instruction set; setup.py chooses the compiler's flags by name.
#define PNFS_LANES 4
#include "cpu/folded_network_kernels.h"

namespace pnfs {
const FoldedKernels kFoldedPortable = kKernels;
}
