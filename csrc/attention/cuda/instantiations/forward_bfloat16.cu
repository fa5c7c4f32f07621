#include "attention/cuda/forward.cuh"

namespace l3ext::cuda {
template void run_forward<BFloat16>(const SegmentedAttentionParams&, const Launch&);
}  // namespace l3ext::cuda
