#include "attention/cuda/decode.cuh"

namespace l3ext::cuda {
template void run_decode<float>(const SegmentedAttentionParams&, float*, const Launch&);
}  // namespace l3ext::cuda
