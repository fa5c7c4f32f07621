#include "attention/cuda/decode.cuh"

namespace l3ext::cuda {
template void run_decode<BFloat16>(const SegmentedAttentionParams&, float*, const Launch&);
}  // namespace l3ext::cuda
