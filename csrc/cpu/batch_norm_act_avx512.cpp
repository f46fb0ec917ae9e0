// The kernels of batch_norm_act for one instruction set; setup.py chooses the compiler's flags by
// name.
#define PNFS_LANES 16
#include "cpu/batch_norm_act_kernels.h"

namespace pnfs {
const BatchNormActKernels kBatchNormActAvx512 = kKernels;
}
