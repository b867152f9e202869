# One program per benchmarks/*_bench.cpp.

file(GLOB benchmark_sources CONFIGURE_DEPENDS benchmarks/*_bench.cpp)
foreach(source ${benchmark_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  veloxquant_compile_options(${name})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE veloxquant)
  list(APPEND benchmark_programs ${name})
endforeach()
add_custom_target(benchmarks DEPENDS ${benchmark_programs})
