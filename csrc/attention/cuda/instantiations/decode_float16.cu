#include "attention/cuda/decode.cuh"

namespace l3ext::cuda {
template void run_decode<Float16>(const SegmentedAttentionParams&, float*, const Launch&);
}  // namespace l3ext::cuda
