#!/bin/sh
# usage: check_instruction_sets.sh libl3ext.a
# Disassembles the row kernels of each instruction set: the instructions that it is there for are in
# it, those of later sets are not, and it defines nothing that other code could be linked to.
set -eu
for tool in ar nm objdump; do
  command -v "$tool" >/dev/null || { echo "no $tool: the machine code was not checked"; exit 77; }
done
library=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cd "$folder"
status=0

# check <isa> <instructions it must contain> <of which it must contain none>
check() {
  object=row_kernels_$1.cpp.o
  ar x "$library" "$object"
  objdump -d --no-show-raw-insn "$object" >code
  for instruction in $2; do
    grep -qw "$instruction" code || { echo "$object: expected $instruction, found none"; status=1; }
  done
  for instruction in $3; do
    ! grep -qw "$instruction" code || { echo "$object: expected no $instruction"; status=1; }
  done
  # A weak function of no set's own namespace might be the one that all others get.
  weak=$(nm -C "$object" | grep ' W ' | grep -v "::$1::" || true)
  [ -z "$weak" ] || { echo "$object: expected no weak functions, found:"; echo "$weak"; status=1; }
}

bf16="vdpbf16ps vcvtneps2bf16"
tiles="ldtilecfg tileloadd tilestored tdpbf16ps tilerelease"
check baseline "" "vfmadd231ps vfmadd213ps vfmadd132ps vcvtph2ps %ymm0 %zmm0 $bf16 $tiles"
check avx2 "vfmadd231ps vcvtph2ps" "%zmm0 $bf16 $tiles"
check avx512 "vfmadd231ps vcvtph2ps" "$bf16 $tiles"
check avx512_bf16 "$bf16" "$tiles"
check amx "vcvtneps2bf16 $tiles" ""
exit "$status"
