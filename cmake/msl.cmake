# The MSL machine: Metal kernels compiled by clang and run on the CPU (tests/msl). Only for tests,
# only where clang 16 or later is (half, bfloat) and the stacks can be switched (x86-64 Linux).

function(veloxquant_add_msl_tests)
  find_program(VELOXQUANT_MSL_CLANG NAMES clang++-19 clang++-18 clang++-17 clang++-16)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"
      OR VELOXQUANT_SANITIZE)
    message(STATUS "Metal kernels are not tested here: the machine runs on x86-64 Linux, unsanitised")
    return()
  endif()
  if(NOT VELOXQUANT_MSL_CLANG)
    message(WARNING "Metal kernels are not tested: no clang++-16..19 was found (tools/setup.sh --test)")
    return()
  endif()
  file(GLOB machine_sources CONFIGURE_DEPENDS tests/msl/*.cpp)
  list(FILTER machine_sources EXCLUDE REGEX "_(test|main)\\.cpp$")
  add_library(msl_machine STATIC ${machine_sources})
  veloxquant_compile_options(msl_machine)
  target_include_directories(msl_machine PUBLIC ${PROJECT_SOURCE_DIR})
  target_compile_definitions(msl_machine PRIVATE
    VELOXQUANT_MSL_CLANG="${VELOXQUANT_MSL_CLANG}"
    VELOXQUANT_MSL_SHIM="${PROJECT_SOURCE_DIR}/tests/msl/shim"
    VELOXQUANT_MSL_CACHE="${PROJECT_SOURCE_DIR}/build/msl")
  target_link_libraries(msl_machine PUBLIC veloxquant ${CMAKE_DL_LIBS})
  # Launches of the MLX layer, as Python tests hand them over.
  add_executable(msl_run tests/msl/run_main.cpp)
  veloxquant_compile_options(msl_run)
  set_target_properties(msl_run PROPERTIES ENABLE_EXPORTS ON)
  target_link_libraries(msl_run PRIVATE -Wl,--whole-archive msl_machine -Wl,--no-whole-archive
    nlohmann_json::nlohmann_json)
  # What a Mac's compiler would be given ahead of time.
  include(${PROJECT_SOURCE_DIR}/cmake/metallib.cmake)
  veloxquant_add_metal_texts()
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/metal)
  add_test(NAME MetalTexts.AreWritten COMMAND metal_texts ${PROJECT_BINARY_DIR}/metal)
  list(TRANSFORM VELOXQUANT_METAL_TEXT_NAMES PREPEND ${PROJECT_BINARY_DIR}/metal/ OUTPUT_VARIABLE text_files)
  list(TRANSFORM text_files APPEND .metal)
  add_test(NAME MetalTexts.Exist COMMAND ${CMAKE_COMMAND} -E cat ${text_files})
  set_tests_properties(MetalTexts.Exist PROPERTIES DEPENDS MetalTexts.AreWritten PASS_REGULAR_EXPRESSION "kernel")
  foreach(source ${ARGN})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    veloxquant_compile_options(${name})
    # Compiled kernels call the machine in the program that loads them.
    set_target_properties(${name} PROPERTIES ENABLE_EXPORTS ON)
    target_link_libraries(${name} PRIVATE -Wl,--whole-archive msl_machine -Wl,--no-whole-archive
      GTest::gtest_main GTest::gmock rapidcheck rapidcheck_gtest)
    gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 600)
  endforeach()
endfunction()
