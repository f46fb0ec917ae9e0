// separable_conv's kernels for one instruction set; setup.py chooses the compiler's flags by name.
#define PNFS_LANES 8
#include "cpu/separable_kernels.h"

namespace pnfs {
const SeparableKernels kSeparableAvx2 = kKernels;
}
