# Adds the project's warnings to a target; they never reach those who link it.
function(l3ext_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wno-psabi>
    # Not -Wpedantic: what nvcc hands to the host compiler is not ISO C++.
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-psabi>)
endfunction()

# The flags of each instruction set that the target processor may have.
set(L3EXT_ISAS baseline)
set(L3EXT_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND L3EXT_ISAS avx2 avx512 avx512_bf16 amx)
  set(L3EXT_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(L3EXT_FLAGS_avx512 ${L3EXT_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                         -mprefer-vector-width=512)
  set(L3EXT_FLAGS_avx512_bf16 ${L3EXT_FLAGS_avx512} -mavx512bf16)
  set(L3EXT_FLAGS_amx ${L3EXT_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)
endif()
# In a build with sanitizers: GCC takes five minutes for one of these unrolled files under
# UndefinedBehaviorSanitizer, and a third of that under AddressSanitizer alone.
set(L3EXT_KERNEL_FLAGS -O3 -ffp-contract=fast -fno-math-errno -fno-sanitize=undefined)

# Adds <stem>_<isa>.cpp for every instruction set, each with its own flags; which one runs is chosen
# at run time.
function(l3ext_cpu_isa target stem)
  foreach(isa IN LISTS L3EXT_ISAS)
    target_sources(${target} PRIVATE ${stem}_${isa}.cpp)
    set_source_files_properties(${stem}_${isa}.cpp PROPERTIES
      COMPILE_OPTIONS "${L3EXT_KERNEL_FLAGS};${L3EXT_FLAGS_${isa}}")
  endforeach()
endfunction()
