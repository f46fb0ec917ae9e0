// strided_conv's kernels for one instruction set; setup.py chooses the compiler's flags by name.
#define PNFS_LANES 16
#include "cpu/strided_conv_kernels.h"

namespace pnfs {
const StridedConvKernels kStridedConvAvx512 = kKernels;
}
