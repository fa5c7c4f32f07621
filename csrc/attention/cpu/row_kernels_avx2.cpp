#define L3EXT_ISA avx2
#define L3EXT_VECTOR_BYTES 32
// Accumulators of dot (rows x queries) and accumulate (queries x vectors): what the registers hold.
#define L3EXT_DOT_ROWS 4
#define L3EXT_DOT_QUERIES 3
#define L3EXT_SUM_QUERIES 4
#define L3EXT_SUM_VECTORS 3
#include "attention/cpu/row_kernels.inl"
