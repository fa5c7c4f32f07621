#define L3EXT_ISA avx512
#define L3EXT_VECTOR_BYTES 64
// 32 registers. Dense: vectors of sums, and at most so many of queries or of columns.
#define L3EXT_FEW_QUERIES 6
#define L3EXT_DENSE_ACCUMULATORS 24
#define L3EXT_DENSE_VECTORS 3
#define L3EXT_DENSE_COLUMNS 4
#include "attention/cpu/row_kernels.inl"
