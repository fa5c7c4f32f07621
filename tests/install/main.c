/* The C header as C99, and that the library behind it is the one it describes. */
#include <dlpack/dlpack.h>
#include <l3ext/l3ext.h>
#include <stdio.h>

int main(void) {
  static const int64_t offsets[] = {0, 1, 3};
  static const float rows[3][5] = {{1, 2, 3, 4, 5}, {6, 7, 8, 9, 10}, {11, 12, 13, 14, 15}};
  l3ext_table_data table = {0};
  l3ext_tables* tables = NULL;
  l3ext_runtime* runtime = NULL;
  l3ext_step* step = NULL;
  l3ext_view view = {0};
  struct DLManagedTensorVersioned* keys = NULL;
  const int32_t ids[] = {1, 1, 0};
  int good;

  table.struct_size = sizeof table;
  table.dtype = L3EXT_FLOAT32;
  table.d_in = 3;
  table.d_emb = 2;
  table.vocab_size = 2;
  table.offsets = offsets;
  table.num_rows = 3;
  table.rows = rows;
  view.struct_size = sizeof view;
  good = l3ext_abi_version() == L3EXT_ABI_VERSION &&
         l3ext_tables_create(&table, 1, &tables) == L3EXT_OK &&
         l3ext_runtime_create(tables, NULL, &runtime) == L3EXT_OK &&
         l3ext_step_begin(runtime, ids, L3EXT_INT32, 3, &step) == L3EXT_OK &&
         l3ext_step_wait(step, 0, NULL) == L3EXT_OK &&
         l3ext_step_view(step, 0, &view) == L3EXT_OK &&
         l3ext_step_tensor(step, 0, L3EXT_KEYS, &keys) == L3EXT_OK;
  if (!good) {
    printf("%s\n", l3ext_error_text());
    return 1;
  }
  good = view.num_segments == 2 && view.tokens[1] == 1 && keys->dl_tensor.shape[1] == 3 &&
         ((const float*)view.keys)[view.segment_rows[0] * 5] == 1 &&
         ((const float*)view.keys)[view.segment_rows[2] * 5 + 5] == 11;
  keys->deleter(keys);
  good = l3ext_step_end(step, NULL) == L3EXT_OK && l3ext_runtime_close(runtime) == L3EXT_OK && good;
  good = l3ext_tables_close(tables) == L3EXT_OK && good;
  printf(good ? "good\n" : "not what was put in\n");
  return good ? 0 : 1;
}
