#define L3EXT_ISA baseline
#define L3EXT_VECTOR_BYTES 16
// 16 registers or more. Dense: vectors of sums, and at most so many of queries or of columns.
#define L3EXT_FEW_QUERIES 2
#define L3EXT_DENSE_ACCUMULATORS 8
#define L3EXT_DENSE_VECTORS 2
#define L3EXT_DENSE_COLUMNS 2
#include "attention/cpu/row_kernels.inl"
