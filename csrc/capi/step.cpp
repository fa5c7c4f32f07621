// The life of a step.
#include "attention/segmented_attention.hpp"
#include "capi/objects.hpp"
#include "capi/structs.hpp"
#include "core/dlpack_dtype.hpp"
#include "dlpack/dlpack.h"

namespace l3ext::capi {

void Step::keep_rows(int64_t layer) {
  auto rows = std::make_unique<LayerRows>();
  const Prefetcher& prefetcher = step.prefetcher();
  rows->buffer = step.rows(layer);
  rows->shape = prefetcher.shape(layer);
  rows->segment_rows.resize(2 * step.tokens().size());
  step.segment_rows(layer, rows->segment_rows.data());
  const std::scoped_lock lock(mutex_);
  if (!layers_[layer]) layers_[layer] = std::move(rows);  // views of an earlier wait stay valid
}

const LayerRows& Step::rows(int64_t layer) {
  const std::scoped_lock lock(mutex_);
  L3EXT_CHECK(layer >= 0 && layer < std::ssize(layers_), "layer: expected 0 to ",
              layers_.size() - 1, ", got ", layer);
  static_cast<void>(step.rows(layer));  // throws where step or runtime has ended
  L3EXT_CHECK(layers_[layer], "layer: expected one that l3ext_step_wait() was called for, got ",
              layer);
  return *layers_[layer];
}

const PlanBuffers& Step::plan() {
  const std::scoped_lock lock(mutex_);
  if (!plan_) {
    auto made = std::make_unique<PlanBuffers>();
    made->make(ids, owners->offsets, /*check_offsets=*/false);
    plan_ = std::move(made);
  }
  return *plan_;
}

namespace {

std::vector<int64_t> copy_ids(const void* ids, int64_t dtype, int64_t count) {
  L3EXT_CHECK(count >= 0 && count <= INT32_MAX, "count: expected 0 to ", INT32_MAX,
              " token ids, got ", count);
  L3EXT_CHECK(ids != nullptr || count == 0, "token_ids: expected ", count, " ids, got null");
  return dispatch_integer(dtype_from_c(dtype, "dtype"), "dtype", [&](auto tag) {
    using Id = typename decltype(tag)::type;
    check_aligned(ids, sizeof(Id), "token_ids");
    const auto* begin = static_cast<const Id*>(ids);
    return std::vector<int64_t>(begin, begin + count);
  });
}

// A tensor that shares the ownership of the rows' memory.
struct Export {
  DLManagedTensorVersioned tensor = {};
  int64_t shape[2] = {};
  int64_t strides[2] = {};
  std::shared_ptr<DeviceBuffer> buffer;
};

DLDevice dlpack_device(const Device& device) {
  return {device.is_host() ? kDLCPU : kDLCUDA, device.index()};
}

// `offset`: bytes from the start of a row. `columns` 0: one element of each row, a vector.
DLManagedTensorVersioned* export_rows(const LayerRows& rows, DLDevice device, DType dtype,
                                      int64_t offset, int64_t columns) {
  auto made = std::make_unique<Export>();
  made->buffer = rows.buffer;
  made->shape[0] = rows.num_rows();
  made->shape[1] = columns;
  made->strides[0] = rows.shape.row_bytes() / static_cast<int64_t>(dtype_bytes(dtype));
  made->strides[1] = 1;
  DLTensor& tensor = made->tensor.dl_tensor;
  tensor.data = rows.buffer->data();
  tensor.byte_offset = static_cast<uint64_t>(offset);
  tensor.device = device;
  tensor.ndim = columns == 0 ? 1 : 2;
  tensor.dtype = dlpack_dtype(dtype);
  tensor.shape = made->shape;
  tensor.strides = made->strides;
  made->tensor.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  made->tensor.flags = DLPACK_FLAG_BITMASK_READ_ONLY;
  made->tensor.manager_ctx = made.get();
  made->tensor.deleter = [](DLManagedTensorVersioned* self) {
    delete static_cast<Export*>(self->manager_ctx);
  };
  return &made.release()->tensor;
}

DLManagedTensorVersioned* export_part(const LayerRows& rows, DLDevice device, int32_t part) {
  const TableShape& shape = rows.shape;
  if (part == L3EXT_KEYS) return export_rows(rows, device, shape.dtype, 0, shape.d_in);
  if (part == L3EXT_VALUES) {
    return export_rows(rows, device, shape.dtype, rows.value_offset(), shape.d_emb);
  }
  L3EXT_CHECK(part == L3EXT_KEY_SCALES || part == L3EXT_VALUE_SCALES,
              "part: expected L3EXT_KEYS, VALUES, KEY_SCALES or VALUE_SCALES, got ", part);
  L3EXT_CHECK(is_quantized(shape.dtype), "part: expected keys or values, as rows of ",
              dtype_name(shape.dtype), " have no scales, got ", part);
  return export_rows(rows, device, DType::kFloat32,
                     part == L3EXT_KEY_SCALES ? rows.key_scale_offset() : rows.value_scale_offset(),
                     0);
}

// What attention reads of a step's layer.
SegmentedAttentionParams attention_params(Step& step, const LayerRows& rows, DType dtype) {
  const TableShape& shape = rows.shape;
  const std::byte* data = rows.buffer->data();
  SegmentedAttentionParams params;
  const Device& device = step.step.prefetcher().device();
  if (!device.is_host()) {
    throw Error(ErrorCode::kType,
                concat("step: expected rows in host memory, got them on ", device.name()));
  }
  if (is_quantized(shape.dtype)) {
    if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
      throw Error(ErrorCode::kType,
                  concat("dtype: expected float32, bfloat16 or float16 for rows of ",
                         dtype_name(shape.dtype), ", got ", dtype_name(dtype)));
    }
    params.quantization.emplace();
    params.quantization->dtype = shape.dtype;
    params.quantization->keys = {data + rows.key_scale_offset(), shape.row_bytes()};
    params.quantization->values = {data + rows.value_scale_offset(), shape.row_bytes()};
  } else if (dtype != shape.dtype) {
    throw Error(ErrorCode::kType, concat("dtype: expected the table's, ", dtype_name(shape.dtype),
                                         ", got ", dtype_name(dtype)));
  }
  const int64_t stride = shape.row_bytes() / static_cast<int64_t>(dtype_bytes(shape.dtype));
  params.dtype = dtype;
  params.keys = {data, stride};
  params.values = {data + rows.value_offset(), stride};
  params.plan = step.plan().view();
  params.plan.segment_rows = rows.segment_rows.data();
  params.table_rows = rows.num_rows();
  params.d_in = shape.d_in;
  params.d_emb = shape.d_emb;
  return params;
}

}  // namespace
}  // namespace l3ext::capi

// --- the ABI ------------------------------------------------------------------------------------

using namespace l3ext;
using namespace l3ext::capi;

l3ext_status l3ext_step_begin(l3ext_runtime* runtime, const void* token_ids, l3ext_dtype dtype,
                              int64_t count, l3ext_step** step) {
  return guarded([&] {
    clear_result(step, "step");
    const auto of = registry().runtimes.find(runtime, "runtime");
    std::vector<int64_t> ids = copy_ids(token_ids, dtype, count);
    const int64_t vocab = of->owners->vocab_size();
    std::vector<int32_t> narrow(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      L3EXT_CHECK(ids[i] >= 0 && ids[i] < vocab, "token_ids[", i, "]: expected an id in [0, ",
                  vocab, "), got ", ids[i]);
      narrow[i] = static_cast<int32_t>(ids[i]);
    }
    auto begun = std::make_shared<Step>(Prefetcher::begin(of->prefetcher, narrow), of->owners,
                                        std::move(ids));
    *step = registry().steps.add(std::move(begun));
  });
}

l3ext_status l3ext_step_wait(l3ext_step* step, int64_t layer, void* stream) {
  return guarded([&] {
    const auto waited = registry().steps.find(step, "step");
    waited->step.wait(layer, stream);
    waited->keep_rows(layer);
  });
}

l3ext_status l3ext_step_view(l3ext_step* step, int64_t layer, l3ext_view* view) {
  return guarded([&] {
    const auto of = registry().steps.find(step, "step");
    const size_t size = result_size(view, "view");
    const LayerRows& rows = of->rows(layer);
    const std::byte* data = rows.buffer->data();
    const bool scaled = is_quantized(rows.shape.dtype);
    l3ext_view facts = {};
    facts.keys = data;
    facts.values = data + rows.value_offset();
    facts.key_scales = scaled ? data + rows.key_scale_offset() : nullptr;
    facts.value_scales = scaled ? data + rows.value_scale_offset() : nullptr;
    facts.row_stride = rows.shape.row_bytes();
    facts.num_rows = rows.num_rows();
    facts.dtype = c_dtype(rows.shape.dtype);
    facts.d_in = rows.shape.d_in;
    facts.d_emb = rows.shape.d_emb;
    facts.num_segments = std::ssize(of->step.tokens());
    facts.tokens = of->step.tokens().data();
    facts.segment_rows = rows.segment_rows.data();
    write_struct(facts, view, size);
  });
}

l3ext_status l3ext_step_tensor(l3ext_step* step, int64_t layer, int32_t part,
                               DLManagedTensorVersioned** tensor) {
  return guarded([&] {
    clear_result(tensor, "tensor");
    const auto of = registry().steps.find(step, "step");
    const LayerRows& rows = of->rows(layer);
    *tensor = export_part(rows, dlpack_device(of->step.prefetcher().device()), part);
  });
}

l3ext_status l3ext_step_attend(l3ext_step* step, int64_t layer, l3ext_dtype dtype, const void* x,
                               void* y, double scale, int32_t num_threads) {
  return guarded([&] {
    const auto of = registry().steps.find(step, "step");
    SegmentedAttentionParams params =
        attention_params(*of, of->rows(layer), dtype_from_c(dtype, "dtype"));
    const int64_t count = params.plan.num_tokens;
    L3EXT_CHECK(x != nullptr || count == 0, "x: expected ", count, " rows, got null");
    L3EXT_CHECK(y != nullptr || count == 0, "y: expected room for ", count, " rows, got null");
    check_aligned(x, dtype_bytes(params.dtype), "x");
    check_aligned(y, dtype_bytes(params.dtype), "y");
    L3EXT_CHECK(num_threads >= 1, "num_threads: expected at least 1, got ", num_threads);
    params.x = {x, params.d_in};
    params.y = {y, params.d_emb};
    params.scale = scale;
    params.num_threads = num_threads;
    segmented_attention(params);
  });
}

l3ext_status l3ext_step_end(l3ext_step* step, void* stream) {
  return guarded([&] {
    if (const auto ended = registry().steps.take(step, "step")) ended->step.end(stream);
  });
}
