#define L3EXT_ISA baseline
#define L3EXT_VECTOR_BYTES 16
// Accumulators of dot (rows x queries) and accumulate (queries x vectors): what the registers hold.
#define L3EXT_DOT_ROWS 4
#define L3EXT_DOT_QUERIES 2
#define L3EXT_SUM_QUERIES 4
#define L3EXT_SUM_VECTORS 2
#include "attention/cpu/row_kernels.inl"
