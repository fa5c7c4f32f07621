# The shared library needs nothing of its users: what it needs itself, it brings or links.
include("${CMAKE_CURRENT_LIST_DIR}/l3ext-targets.cmake")
