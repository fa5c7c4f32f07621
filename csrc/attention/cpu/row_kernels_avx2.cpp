#define L3EXT_ISA avx2
#define L3EXT_VECTOR_BYTES 32
// 16 registers. Dense: vectors of sums, and at most so many of queries or of columns.
#define L3EXT_FEW_QUERIES 4
#define L3EXT_DENSE_ACCUMULATORS 12
#define L3EXT_DENSE_VECTORS 3
#define L3EXT_DENSE_COLUMNS 3
#include "attention/cpu/row_kernels.inl"
