// What lets one header be compiled by g++ and by nvcc.
#pragma once

#if defined(__CUDACC__)
#define PNFS_HOST_DEVICE __host__ __device__
#else
#define PNFS_HOST_DEVICE
#endif
