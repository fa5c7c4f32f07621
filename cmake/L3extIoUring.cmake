# io_uring takes no library, only the kernel headers of Linux 5.6 or later.
include(CheckCXXSourceCompiles)

function(l3ext_enable_io_uring target)
  check_cxx_source_compiles("
    #include <linux/io_uring.h>
    #include <sys/syscall.h>
    int main() { return IORING_OP_READ + IORING_FEAT_RW_CUR_POS + __NR_io_uring_setup == 0; }"
    L3EXT_HAVE_IO_URING)
  if(L3EXT_HAVE_IO_URING)
    set_source_files_properties(csrc/runtime/uring_queue.cpp PROPERTIES
      COMPILE_DEFINITIONS L3EXT_HAVE_IO_URING)
  else()
    message(STATUS "l3ext: no kernel headers with io_uring here, table files are read with pread")
  endif()
endfunction()
