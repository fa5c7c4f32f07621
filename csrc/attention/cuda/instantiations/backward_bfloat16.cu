#include "attention/cuda/backward.cuh"

namespace l3ext::cuda {
template void run_backward<BFloat16>(const SegmentedAttentionBackwardParams&,
                                     const BackwardWorkspace&, const Launch&);
}  // namespace l3ext::cuda
