/* clang-format off */
/* l3ext for other inference stacks: lookup tables that live in host memory or in a file, fetched
 * ahead of the layers that read them. C99, needs neither Python nor torch. docs/embedding.md tells
 * the whole; examples/c shows it.
 *
 *   l3ext_tables* tables;    the tables of a model, nearest layer first
 *   l3ext_runtime* runtime;  serves them
 *   l3ext_step* step;        the rows of one step, on their way
 *
 *   l3ext_tables_open("model.l3", L3EXT_DIRECT_IO_AUTO, &tables);
 *   l3ext_runtime_create(tables, NULL, &runtime);
 *   l3ext_step_begin(runtime, ids, L3EXT_INT32, count, &step);  as soon as the ids are known
 *   l3ext_step_wait(step, layer, NULL);                         before each lookup layer
 *   l3ext_step_view(step, layer, &view);                        or _attend, or _tensor
 *   l3ext_step_end(step, NULL);                                 after the last one
 *
 * Errors. Every function that returns l3ext_status returns L3EXT_OK or says in l3ext_error_text()
 * what was expected, what came, and which argument. A call that fails changes nothing, except that
 * handles it should have made are null. Nothing prints, aborts, or throws.
 *
 * Handles (l3ext_tables, l3ext_runtime, l3ext_step) are names, not addresses, and never used twice:
 * null, one that was closed, and one that came through fork() give L3EXT_ERROR_HANDLE. Closing null
 * does nothing.
 *
 * fork(). What is open belongs to the process that opened it. In a child every call with its handles
 * returns at once and changes nothing, close and end included; so does the child's end. The parent
 * goes on undisturbed. A child opens tables and a runtime of its own. If l3ext_step_attend ran on
 * several threads before, it runs on one in the child, where OpenMP's threads are missing.
 *
 * Threads. Every function may be called from any thread at any time, also for one object at once:
 * what a call uses lives until it returns. Signals are left to the program's own threads.
 *
 * Addresses of elements, of what comes in and of `y`, are multiples of the element's size; those of
 * `rows` of INT8 and FLOAT8_E4M3FN of 4 bytes, for their scales. Others give L3EXT_ERROR_VALUE.
 *
 * Structs begin with their size, which the caller sets (the options: their init function). The
 * library takes and gives structs of callers compiled with an older or a newer header. An older one
 * lacks the last fields: options have their defaults there. Those of a newer one that this library
 * does not know must be 0 in options, and are set to 0 in results. */
/* clang-format on */
#ifndef L3EXT_L3EXT_H_
#define L3EXT_L3EXT_H_

#include <stddef.h>
#include <stdint.h>

/* Raised when a program compiled against an earlier header would not run any more; functions and
 * fields at a struct's end may be added without. The library's soname carries it. */
#define L3EXT_ABI_VERSION 1

#if defined(__GNUC__)
#define L3EXT_API __attribute__((visibility("default")))
#else
#define L3EXT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t l3ext_status;
enum {
  L3EXT_OK = 0,
  L3EXT_ERROR_VALUE = 1,   /* an argument's value, shape or size */
  L3EXT_ERROR_TYPE = 2,    /* an element type or device that the call does not take */
  L3EXT_ERROR_IO = 3,      /* a file; the text has its path */
  L3EXT_ERROR_RUNTIME = 4, /* the machine, which refuses threads or memory for rows; a closed
                              runtime, an ended step */
  L3EXT_ERROR_MEMORY = 5,  /* out of memory, other than for rows */
  L3EXT_ERROR_HANDLE = 6   /* a handle that is null, closed, or from before fork() */
};

typedef int32_t l3ext_dtype;
enum {
  L3EXT_FLOAT64 = 0,
  L3EXT_FLOAT32 = 1,
  L3EXT_BFLOAT16 = 2,
  L3EXT_FLOAT16 = 3,
  L3EXT_FLOAT8_E4M3FN = 4, /* rows of tables only, with a scale for each; so is INT8 */
  L3EXT_INT8 = 5,
  L3EXT_INT32 = 6, /* token ids; so is INT64 */
  L3EXT_INT64 = 7
};

typedef struct l3ext_tables l3ext_tables;
typedef struct l3ext_runtime l3ext_runtime;
typedef struct l3ext_step l3ext_step;

/* The L3EXT_ABI_VERSION that the library was built with. */
L3EXT_API uint32_t l3ext_abi_version(void);

/* What the last call that failed in this thread said; "" before any. Never null; valid until the
 * thread's next failing call. At most 1023 bytes of UTF-8, as far as paths are. */
L3EXT_API const char* l3ext_error_text(void);

/* --- tables --------------------------------------------------------------------------------- */

/* Whether a file is read past the page cache. AUTO: where the file system allows it. */
enum { L3EXT_DIRECT_IO_AUTO = 0, L3EXT_DIRECT_IO_ON = 1, L3EXT_DIRECT_IO_OFF = 2 };

/* Opens a table file, as l3ext.offload() and l3ext_tables_save() write it. Reads everything but
 * the rows. */
L3EXT_API l3ext_status l3ext_tables_open(const char* path, int32_t direct_io,
                                         l3ext_tables** tables);

/* The same, mapped into memory: one copy for all processes of a host, in the page cache. Rows are
 * read in place where the runtime's `verify` is 0. */
L3EXT_API l3ext_status l3ext_tables_map(const char* path, l3ext_tables** tables);

/* One layer's table in host memory: num_rows rows of d_in key elements and d_emb value elements,
 * side by side, without gaps. Token t owns rows offsets[t] to offsets[t + 1]. In a row of INT8 or
 * FLOAT8_E4M3FN follow, from the next multiple of 4 bytes, a float32 scale of its keys and one of
 * its values (tied: one in all), and padding to a multiple of 16 bytes. */
typedef struct l3ext_table_data {
  size_t struct_size;
  int64_t dtype; /* an l3ext_dtype, not INT32 or INT64 */
  int64_t d_in;  /* key columns */
  int64_t d_emb; /* value columns */
  int64_t tied;  /* 1: values are the keys, stored once, and d_emb == d_in; else 0 */
  int64_t vocab_size;
  const int64_t* offsets;         /* [vocab_size + 1], from 0, never falling; copied */
  const int64_t* frequency;       /* [vocab_size], how often each token occurs; or null; copied */
  int64_t num_rows;               /* offsets[vocab_size] */
  const void* rows;               /* used in place */
  void (*release)(void* context); /* or null: called once, from any thread, when `rows` is not used
                                     any more; not if the call fails. Must not call l3ext. */
  void* context;
} l3ext_table_data;

/* Tables over the caller's memory: `count` structs of layers[0].struct_size bytes, nearest layer
 * first. The rows are not copied and stay as they are until they are released. */
L3EXT_API l3ext_status l3ext_tables_create(const l3ext_table_data* layers, int64_t count,
                                           l3ext_tables** tables);

/* Writes tables over memory to a file: atomic, with a checksum for each token's rows. */
L3EXT_API l3ext_status l3ext_tables_save(const l3ext_tables* tables, const char* path);

typedef struct l3ext_table_info {
  size_t struct_size;
  int64_t num_layers; /* of the tables together */
  int64_t dtype;
  int64_t d_in;
  int64_t d_emb;
  int64_t tied;
  int64_t vocab_size;
  int64_t num_rows;
  int64_t row_bytes;
  const int64_t* offsets;   /* [vocab_size + 1]; valid, like what follows, until the tables close */
  const int64_t* frequency; /* [vocab_size], or null where unknown */
  const char* path;         /* of the file; null: host memory */
  int64_t direct_io;        /* 1: the file is read past the page cache */
  int64_t mapped;           /* 1: by l3ext_tables_map() */
  int64_t guarded;          /* 1: and stays readable if somebody writes to the file or cuts it */
} l3ext_table_info;

/* The facts of one layer's table, 0 the nearest. */
L3EXT_API l3ext_status l3ext_tables_describe(const l3ext_tables* tables, int64_t layer,
                                             l3ext_table_info* info);

/* Runtimes keep what they need: tables may be closed as soon as they are created. */
L3EXT_API l3ext_status l3ext_tables_close(l3ext_tables* tables);

/* --- runtimes ------------------------------------------------------------------------------- */

typedef struct l3ext_runtime_options {
  size_t struct_size;
  const char* device;   /* where the rows go, as torch spells it; "cpu" by default */
  int64_t cache_bytes;  /* rows of the most frequent tokens that stay there, all layers together */
  int64_t ring_bytes;   /* room for the rows of steps, open and recent; all layers together */
  int64_t in_place;     /* 1: the CPU reads tables in host memory where they lie, and nothing is
                           fetched; else 0 */
  int64_t num_workers;  /* threads that start reads, check and copy */
  int64_t queue_depth;  /* reads of one of them on their way at once */
  int64_t piece_bytes;  /* the most that one read brings, a multiple of 4096 up to 2^30 */
  int64_t record_steps; /* that the trace keeps */
  int64_t verify;       /* 1: rows from a file are checked against their checksums; else 0 */
  int64_t poison;       /* 1: rows become NaN when their step ends: shows a use after it */
} l3ext_runtime_options;

/* Sets every field to its default, and struct_size. */
L3EXT_API l3ext_status l3ext_runtime_options_init(l3ext_runtime_options* options,
                                                  size_t struct_size);

/* Starts the workers and loads the cache, then returns. `options`: null: the defaults. */
L3EXT_API l3ext_status l3ext_runtime_create(const l3ext_tables* tables,
                                            const l3ext_runtime_options* options,
                                            l3ext_runtime** runtime);

typedef struct l3ext_placement {
  size_t struct_size;
  int64_t table_bytes;
  int64_t in_place;      /* 1: read where it lies, with neither cache nor ring; else 0 */
  int64_t cached_tokens; /* whose rows stay on the device */
  int64_t cached_bytes;
  int64_t ring_bytes;
} l3ext_placement;

/* Where one layer's rows are. */
L3EXT_API l3ext_status l3ext_runtime_describe(const l3ext_runtime* runtime, int64_t layer,
                                              l3ext_placement* placement);

/* Sums over all layers of all steps that have ended. */
typedef struct l3ext_totals {
  size_t struct_size;
  int64_t steps;
  int64_t tokens;    /* distinct in their step */
  int64_t rows;      /* that these own */
  int64_t bytes;     /* fetched from the tables; of a step that ended early, what was begun */
  int64_t hits;      /* tokens whose rows were in the cache */
  int64_t hit_bytes; /* of these rows */
  int64_t reused;    /* tokens whose rows the ring still held of an earlier step */
  int64_t reused_bytes;
  int64_t in_place_bytes; /* of rows that are read where the table lies */
  int64_t spilled;        /* layers of steps that got memory of their own, the ring being full */
  int64_t fetch_ns;       /* from the first worker's start to the last one's end */
  int64_t exposed_ns;     /* the part of it that somebody, or a stream, waited for */
} l3ext_totals;

L3EXT_API l3ext_status l3ext_runtime_totals(const l3ext_runtime* runtime, l3ext_totals* totals);

/* Writes the last record_steps steps in the Chrome trace format (chrome://tracing, Perfetto). */
L3EXT_API l3ext_status l3ext_runtime_trace(const l3ext_runtime* runtime, const char* path);

/* Ends open steps, stops the workers, lets go of the tables. The steps' handles stay until they are
 * ended; every other call on them gives L3EXT_ERROR_RUNTIME. */
L3EXT_API l3ext_status l3ext_runtime_close(l3ext_runtime* runtime);

/* --- steps ---------------------------------------------------------------------------------- */

/* Starts to fetch the rows of these tokens for every layer, nearest first, and returns at once.
 * `token_ids`: `count` int32 or int64, any order, repeats allowed; copied. An id outside the
 * vocabulary is an error, and nothing is fetched then. */
L3EXT_API l3ext_status l3ext_step_begin(l3ext_runtime* runtime, const void* token_ids,
                                        l3ext_dtype dtype, int64_t count, l3ext_step** step);

/* On the host: blocks until the rows of `layer` are there. On a GPU: makes `stream` (a
 * cudaStream_t; null: the default stream) wait for them, not the caller. L3EXT_ERROR_IO where a
 * read failed or rows do not match their checksum: the runtime and the other layers go on. */
L3EXT_API l3ext_status l3ext_step_wait(l3ext_step* step, int64_t layer, void* stream);

/* One layer's rows, where they lie. Row r of the keys begins r * row_stride bytes behind `keys`,
 * and so for values and scales. Only rows that a segment names are the step's. */
typedef struct l3ext_view {
  size_t struct_size;
  const void* keys;         /* [num_rows, d_in] */
  const void* values;       /* [num_rows, d_emb]; equal to keys where tied */
  const void* key_scales;   /* float32, a row of INT8 or FLOAT8_E4M3FN stands for its elements */
  const void* value_scales; /*   times its scale; null for the other types */
  int64_t row_stride;       /* bytes */
  int64_t num_rows;
  int64_t dtype;
  int64_t d_in;
  int64_t d_emb;
  int64_t num_segments;        /* the distinct tokens of the step */
  const int32_t* tokens;       /* [num_segments] in host memory, ascending */
  const int64_t* segment_rows; /* [num_segments, 2] in host memory: first row, one past the last */
} l3ext_view;

/* After l3ext_step_wait() of that layer. Valid until l3ext_step_end(); rows must not be written. */
L3EXT_API l3ext_status l3ext_step_view(l3ext_step* step, int64_t layer, l3ext_view* view);

/* The parts of a view that a tensor can hold. */
enum { L3EXT_KEYS = 0, L3EXT_VALUES = 1, L3EXT_KEY_SCALES = 2, L3EXT_VALUE_SCALES = 3 };

struct DLManagedTensorVersioned;

/* The same rows for a tensor library. Versioned, as only that can say that a tensor is read-only.
 * Whoever holds the result calls its deleter once. The memory lives until then; what lies in it is
 * the step's until l3ext_step_end(). <dlpack/dlpack.h> is installed beside this header. */
L3EXT_API l3ext_status l3ext_step_tensor(l3ext_step* step, int64_t layer, int32_t part,
                                         struct DLManagedTensorVersioned** tensor);

/* Attention on the CPU, each position over the rows of its token:
 *   y[i] = softmax(scale * keys(token_ids[i]) x[i]) values(token_ids[i])
 * x [count, d_in] and y [count, d_emb] without gaps, apart from each other, in the order of the
 * step's ids, of the table's dtype; of a table of 8 bits, `dtype` is FLOAT32, BFLOAT16 or FLOAT16.
 * The same bits for any num_threads, which are OpenMP's: where the system refuses one, GCC's ends
 * the process, unless num_threads is 1. After l3ext_step_wait() of that layer. */
L3EXT_API l3ext_status l3ext_step_attend(l3ext_step* step, int64_t layer, l3ext_dtype dtype,
                                         const void* x, void* y, double scale, int32_t num_threads);

/* Gives the rows back, and closes the handle: nobody may read them from here on. On a GPU, what the
 * stream was given before may still read them. A call that waits for the step in another thread
 * returns L3EXT_ERROR_RUNTIME. With L3EXT_ERROR_MEMORY it has ended, and the totals lack it. */
L3EXT_API l3ext_status l3ext_step_end(l3ext_step* step, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* L3EXT_L3EXT_H_ */
