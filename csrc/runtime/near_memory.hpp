// Host memory of exactly the size asked for, in huge pages and on the memory node of a device where
// the system has such: cudaMallocHost would round sizes up and place pages by where it is called.
#pragma once

#include <cstddef>
#include <string>

namespace l3ext {

// The memory node that a PCI device ("0000:3B:00.0", in any case) hangs on; -1: the system does not
// say, or has one only. `devices`: where the system lists them.
int numa_node_of(const std::string& pci_bus_id,
                 const std::string& devices = "/sys/bus/pci/devices");

// Leaves whole pages out of what a child of fork() gets. By open(2), a read with O_DIRECT that is
// on its way while the process forks may otherwise end in a page of the child's instead of ours.
void keep_from_children(void* memory, size_t bytes) noexcept;

// Page-aligned zeros that no child of fork() gets, every page touched by several threads, on node
// `numa_node` if there is room there and that is not -1. Throws kRuntime.
void* map_near(size_t bytes, int numa_node);
void unmap_near(void* memory, size_t bytes) noexcept;

}  // namespace l3ext
