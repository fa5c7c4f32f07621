// What the handles name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "attention/plan_buffers.hpp"
#include "capi/handles.hpp"
#include "core/dtype.hpp"
#include "runtime/mapped_file.hpp"
#include "runtime/prefetcher.hpp"
#include "runtime/table.hpp"

namespace l3ext::capi {

l3ext_dtype c_dtype(DType dtype);
DType dtype_from_c(int64_t dtype, const char* argument);  // throws kType

struct Tables {
  std::vector<Table> tables;      // at least one
  std::vector<const void*> rows;  // of each, in host memory; empty: in a file
  std::string path;               // of the file
  bool direct_io = false;
  std::shared_ptr<const MappedFile> mapped;  // null: read
};

struct Runtime {
  std::shared_ptr<Prefetcher> prefetcher;
  std::shared_ptr<const RowOwners> owners;  // of layer 0: ids are checked, steps planned by it
};

// Where one layer's rows of a step are, once they are there.
struct LayerRows {
  std::shared_ptr<DeviceBuffer> buffer;
  TableShape shape;
  std::vector<int64_t> segment_rows;  // [segments, 2]

  int64_t num_rows() const { return static_cast<int64_t>(buffer->bytes()) / shape.row_bytes(); }
  // Bytes from the start of a row, whose layout is that of TableShape::row_bytes().
  int64_t value_offset() const {
    return shape.tied ? 0 : shape.d_in * static_cast<int64_t>(dtype_bytes(shape.dtype));
  }
  int64_t key_scale_offset() const { return (shape.width() + 3) / 4 * 4; }
  int64_t value_scale_offset() const { return key_scale_offset() + (shape.tied ? 0 : 4); }
};

struct Step {
  Step(Prefetcher::Step begun, std::shared_ptr<const RowOwners> of, std::vector<int64_t> tokens)
      : step(std::move(begun)),
        owners(std::move(of)),
        ids(std::move(tokens)),
        layers_(static_cast<size_t>(step.prefetcher().num_layers())) {}

  // After the layer was waited for.
  void keep_rows(int64_t layer);
  // Throws kValue for the layer, or where it has not been waited for.
  const LayerRows& rows(int64_t layer);
  // Of `ids`; made when it is first asked for.
  const PlanBuffers& plan();

  Prefetcher::Step step;
  const std::shared_ptr<const RowOwners> owners;
  const std::vector<int64_t> ids;  // as the caller gave them

 private:
  std::mutex mutex_;                                // guards what follows
  std::vector<std::unique_ptr<LayerRows>> layers_;  // null: not waited for; kept until the end
  std::unique_ptr<PlanBuffers> plan_;
};

}  // namespace l3ext::capi
