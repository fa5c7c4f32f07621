# Enables the CUDA language where L3EXT_CUDA allows it and nvcc is found. To be included, not called:
# a language can only be enabled at file scope.
set(L3EXT_WITH_CUDA OFF)
if(NOT L3EXT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "L3EXT_CUDA: expected AUTO, ON or OFF, got \"${L3EXT_CUDA}\"")
endif()
if(NOT L3EXT_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(L3EXT_WITH_CUDA ON)
  elseif(L3EXT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "L3EXT_CUDA=ON: expected nvcc, found none. Put it on PATH or set CUDACXX.")
  else()
    message(STATUS "l3ext: no nvcc found, building the host part only")
  endif()
endif()

if(L3EXT_WITH_CUDA)
  # 80 keeps its PTX, for every later architecture that has no code of its own here.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES "80;90a-real;100-real")
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "l3ext: building with CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()

# Compiles the kernels into a target, where CUDA is enabled.
function(l3ext_enable_cuda target)
  if(NOT L3EXT_WITH_CUDA)
    return()
  endif()
  # Found, not listed: a kernel has one instance file per dtype, and each is only its name.
  file(GLOB_RECURSE kernels CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/*.cu")
  target_sources(${target} PRIVATE ${kernels})
  target_compile_definitions(${target} PRIVATE L3EXT_WITH_CUDA)
  # -std by hand: CMake 3.25 does not know that nvcc has C++20. And the device may call what is
  # constexpr: limits and sizes are written once for both sides.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--expt-relaxed-constexpr>)
  # The static runtime loads the driver on first use: the module imports where there is none.
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  set_target_properties(${target} PROPERTIES
    CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
endfunction()
