// What lets one source be compiled by g++ and by nvcc.
#pragma once

#if defined(__CUDACC__)
#define PNFS_INLINE __host__ __device__ __forceinline__
#else
#define PNFS_INLINE inline __attribute__((always_inline))
#endif
