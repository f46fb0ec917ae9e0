// strided_conv's kernels for one instruction set; setup.py chooses the compiler's flags by name.
#define PNFS_LANES 4
#include "cpu/strided_conv_kernels.h"

namespace pnfs {
const StridedConvKernels kStridedConvPortable = kKernels;
}
