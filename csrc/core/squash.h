// The squash of a keypoint vector (Eq. 4, 5): its length becomes n² / (1 + n²), n² the vector's
// squared length. With q = 1 / (1 + n²) that is n²·q, and its gradient is 2·q²·v.
#pragma once

#include "core/macros.h"

namespace pnfs {

// Number is a float or a vector of them.
template <class Number>
PNFS_HOST_DEVICE inline Number squash_factor(Number squared) {
  return 1.0f / (1.0f + squared);
}

}  // namespace pnfs
