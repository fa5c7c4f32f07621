// Marks a function for the host and, where the compiler is nvcc, for the device too.
#pragma once

#ifdef __CUDACC__
#define L3EXT_HOST_DEVICE __host__ __device__
#else
#define L3EXT_HOST_DEVICE
#endif
