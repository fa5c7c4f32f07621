# The C ABI as a shared library, and what an installed one needs to be found: l3ext::l3ext in this
# build, by add_subdirectory, by find_package(l3ext), and `pkg-config l3ext`. To be included.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

file(STRINGS csrc/include/l3ext/l3ext.h L3EXT_ABI_LINE REGEX "^#define L3EXT_ABI_VERSION [0-9]+$")
string(REGEX MATCH "[0-9]+$" L3EXT_ABI_VERSION "${L3EXT_ABI_LINE}")

add_library(l3ext_shared SHARED
  csrc/capi/errors.cpp
  csrc/capi/handles.cpp
  csrc/capi/runtime.cpp
  csrc/capi/step.cpp
  csrc/capi/tables.cpp
)
add_library(l3ext::l3ext ALIAS l3ext_shared)
target_sources(l3ext_shared
  PUBLIC FILE_SET HEADERS BASE_DIRS csrc/include
           FILES csrc/include/l3ext/l3ext.h csrc/include/l3ext/l3ext.hpp
         FILE_SET dlpack TYPE HEADERS BASE_DIRS third_party/dlpack/include
           FILES third_party/dlpack/include/dlpack/dlpack.h)
target_link_libraries(l3ext_shared PRIVATE l3ext)
# Never unloaded: its threads, and OpenMP's, would go on in code that is gone.
target_link_options(l3ext_shared PRIVATE
  "LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map" LINKER:-z,nodelete)
set_target_properties(l3ext_shared PROPERTIES
  OUTPUT_NAME l3ext EXPORT_NAME l3ext SOVERSION ${L3EXT_ABI_VERSION}
  LINK_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map"
  CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
l3ext_warnings(l3ext_shared)

if(L3EXT_WHEEL)
  return()
endif()

# DLPack's header in our own folder: a prefix may hold another one.
install(TARGETS l3ext_shared EXPORT l3ext-targets
  FILE_SET HEADERS
  FILE_SET dlpack DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/l3ext)
set(L3EXT_CONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/l3ext)
install(EXPORT l3ext-targets NAMESPACE l3ext:: DESTINATION ${L3EXT_CONFIG_DIR})
# Before 1.0 a minor version may change the API.
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/l3ext-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES cmake/l3ext-config.cmake "${CMAKE_CURRENT_BINARY_DIR}/l3ext-config-version.cmake"
  DESTINATION ${L3EXT_CONFIG_DIR})

# The prefix as seen from the file: the tree may be moved.
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX
  BASE_DIRECTORY "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" OUTPUT_VARIABLE L3EXT_PC_TO_PREFIX)
cmake_path(APPEND L3EXT_PC_INCLUDEDIR "\${prefix}" "${CMAKE_INSTALL_INCLUDEDIR}")
cmake_path(APPEND L3EXT_PC_LIBDIR "\${prefix}" "${CMAKE_INSTALL_LIBDIR}")
configure_file(cmake/l3ext.pc.in l3ext.pc @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/l3ext.pc"
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/l3ext)
install(FILES third_party/dlpack/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/l3ext
  RENAME LICENSE.dlpack)
