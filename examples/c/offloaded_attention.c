/* Lookup tables in a file, fetched while other work runs, and attention over their rows.
 *   cc offloaded_attention.c $(pkg-config --cflags --libs l3ext) && ./a.out tables.safetensors */
#include <l3ext/l3ext.h>
#include <stdio.h>
#include <stdlib.h>
enum { VOCAB = 1000, D_IN = 64, D_EMB = 32, ROWS = 2500, LAYERS = 2, COUNT = 6 };

static void check(l3ext_status status) {
  if (status == L3EXT_OK) return;
  fprintf(stderr, "%s\n", l3ext_error_text());
  exit(1);
}

/* Token t owns 1 + t % 4 rows. A real engine converts its checkpoint here, once. */
static void write_tables(const char* path) {
  static int64_t offsets[VOCAB + 1];
  static float rows[ROWS * (D_IN + D_EMB)];
  for (int t = 0; t < VOCAB; ++t) offsets[t + 1] = offsets[t] + 1 + t % 4;
  for (int i = 0; i < ROWS * (D_IN + D_EMB); ++i) rows[i] = (float)(i % 17 - 8) / 8.0f;
  const l3ext_table_data layer = {.struct_size = sizeof layer,
                                  .dtype = L3EXT_FLOAT32,
                                  .d_in = D_IN,
                                  .d_emb = D_EMB,
                                  .vocab_size = VOCAB,
                                  .offsets = offsets,
                                  .num_rows = ROWS,
                                  .rows = rows};
  const l3ext_table_data layers[LAYERS] = {layer, layer};
  l3ext_tables* tables;
  check(l3ext_tables_create(layers, LAYERS, &tables));
  check(l3ext_tables_save(tables, path));
  check(l3ext_tables_close(tables));
}

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : "tables.safetensors";
  l3ext_tables* tables;
  l3ext_runtime* runtime;
  write_tables(path);
  check(l3ext_tables_open(path, L3EXT_DIRECT_IO_AUTO, &tables));
  check(l3ext_runtime_create(tables, NULL, &runtime));
  check(l3ext_tables_close(tables));
  const int32_t ids[COUNT] = {3, 14, 15, 3, 999, 3};
  static float x[COUNT][D_IN], y[COUNT][D_EMB];
  for (int i = 0; i < COUNT; ++i) x[i][i] = 1.0f;
  l3ext_step* step;
  check(l3ext_step_begin(runtime, ids, L3EXT_INT32, COUNT, &step)); /* returns at once */
  for (int layer = 0; layer < LAYERS; ++layer) {
    /* the layers before this one run here, and hide the fetch */
    check(l3ext_step_wait(step, layer, NULL));
    check(l3ext_step_attend(step, layer, L3EXT_FLOAT32, x, y, 1.0, 2));
    printf("layer %d: y[0] = %g %g ...\n", layer, y[0][0], y[0][1]);
  }
  check(l3ext_step_end(step, NULL));
  l3ext_totals totals = {.struct_size = sizeof totals};
  check(l3ext_runtime_totals(runtime, &totals));
  printf("%d rows, %d bytes fetched\n", (int)totals.rows, (int)totals.bytes);
  check(l3ext_runtime_close(runtime));
  return 0;
}
