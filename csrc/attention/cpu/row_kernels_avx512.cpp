#define L3EXT_ISA avx512
#define L3EXT_VECTOR_BYTES 64
// Accumulators of dot (rows x queries) and accumulate (queries x vectors): what the registers hold.
#define L3EXT_DOT_ROWS 8
#define L3EXT_DOT_QUERIES 3
#define L3EXT_SUM_QUERIES 6
#define L3EXT_SUM_VECTORS 4
#include "attention/cpu/row_kernels.inl"
