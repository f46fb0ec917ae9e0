// The kernels of mixed_sum, scale_mix and batch_stats for one instruction set; setup.py chooses the
// compiler's flags by name.
#define PNFS_LANES 4
#include "cpu/mix_kernels.h"

namespace pnfs {
const MixKernels kMixPortable = kKernels;
}
