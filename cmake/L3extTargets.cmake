# Adds the project's warnings to a target; they never reach those who link it.
function(l3ext_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wno-psabi>)
endfunction()

# Compiles the CUDA parts into a target where L3EXT_CUDA allows it and nvcc is found.
function(l3ext_enable_cuda target)
  if(L3EXT_CUDA STREQUAL "OFF")
    return()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    if(L3EXT_CUDA STREQUAL "ON")
      message(FATAL_ERROR "L3EXT_CUDA=ON: expected nvcc, found none. Put it on PATH or set CUDACXX.")
    endif()
    message(STATUS "l3ext: no nvcc found, building the host part only")
    return()
  endif()
  find_package(CUDAToolkit REQUIRED)
  # The static runtime loads the driver on first use: the module imports where there is none.
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  target_compile_definitions(${target} PRIVATE L3EXT_WITH_CUDA)
  message(STATUS "l3ext: building with CUDA ${CUDAToolkit_VERSION}")
endfunction()

# Adds <stem>_<isa>.cpp for every instruction set of the target processor, each with its own flags;
# which one runs is chosen at run time.
function(l3ext_cpu_isa target stem)
  set(isas baseline)
  set(flags_baseline "")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND isas avx2 avx512)
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                     -mprefer-vector-width=512)
  endif()
  foreach(isa IN LISTS isas)
    target_sources(${target} PRIVATE ${stem}_${isa}.cpp)
    set_source_files_properties(${stem}_${isa}.cpp PROPERTIES
      COMPILE_OPTIONS "-O3;-ffp-contract=fast;-fno-math-errno;${flags_${isa}}"
      OBJECT_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/attention/cpu/row_kernels.inl)
  endforeach()
endfunction()
