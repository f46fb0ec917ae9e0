// depthwise_fanout's kernels for one instruction set; setup.py chooses the compiler's flags by name.
#define PNFS_LANES 16
#include "cpu/depthwise_fanout_kernels.h"

namespace pnfs {
const FanoutKernels kFanoutAvx512 = kKernels;
}
