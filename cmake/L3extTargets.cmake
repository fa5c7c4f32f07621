# Adds the project's warnings to a target; they never reach those who link it.
function(l3ext_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wno-psabi>
    # Not -Wpedantic: what nvcc hands to the host compiler is not ISO C++.
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-psabi>)
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
  file(GLOB parts CONFIGURE_DEPENDS csrc/attention/cpu/*.inl)
  foreach(isa IN LISTS isas)
    target_sources(${target} PRIVATE ${stem}_${isa}.cpp)
    set_source_files_properties(${stem}_${isa}.cpp PROPERTIES
      COMPILE_OPTIONS "-O3;-ffp-contract=fast;-fno-math-errno;${flags_${isa}}"
      OBJECT_DEPENDS "${parts}")
  endforeach()
endfunction()
