# One test program per *_test.cpp, beside the code it tests or in tests/.

enable_testing()
find_package(GTest REQUIRED)
find_package(rapidcheck QUIET)
if(NOT rapidcheck_FOUND)
  # Homebrew has no RapidCheck: build the revision that Debian packages.
  include(FetchContent)
  set(RC_ENABLE_GTEST ON)
  FetchContent_Declare(rapidcheck GIT_REPOSITORY https://github.com/emil-e/rapidcheck.git
    GIT_TAG 08b505857e32d52a20b2240b5125d937d67a6d86)
  FetchContent_MakeAvailable(rapidcheck)
endif()
include(GoogleTest)

file(GLOB test_sources CONFIGURE_DEPENDS src/*/*_test.cpp src/*/*/*_test.cpp tests/*_test.cpp)
list(FILTER test_sources EXCLUDE REGEX "/src/mlx/")
# Tests of Metal kernels run on the MSL machine.
file(GLOB msl_test_sources CONFIGURE_DEPENDS tests/msl/*_test.cpp src/*/*_metal_test.cpp src/*/*/*_metal_test.cpp)
list(FILTER test_sources EXCLUDE REGEX "_metal_test\\.cpp$")
include(cmake/msl.cmake)
veloxquant_add_msl_tests(${msl_test_sources})
foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  veloxquant_compile_options(${name})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE veloxquant nlohmann_json::nlohmann_json
    GTest::gtest_main GTest::gmock rapidcheck rapidcheck_gtest)
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 600)
endforeach()

target_compile_definitions(golden_test PRIVATE
  VELOXQUANT_GOLDEN_DIR="${PROJECT_SOURCE_DIR}/tests/golden")
add_executable(write_golden EXCLUDE_FROM_ALL tests/golden/write_golden.cpp)
veloxquant_compile_options(write_golden)
target_include_directories(write_golden PRIVATE ${PROJECT_SOURCE_DIR})
target_link_libraries(write_golden PRIVATE veloxquant)

# As a C++ user does it: install, find_package, build the example, run it.
add_test(NAME install_and_use COMMAND ${CMAKE_COMMAND}
  -DSOURCE_DIR=${PROJECT_SOURCE_DIR} -DBUILD_DIR=${PROJECT_BINARY_DIR}
  -DGENERATOR=${CMAKE_GENERATOR} -DSANITIZE=${VELOXQUANT_SANITIZE}
  -P ${PROJECT_SOURCE_DIR}/tests/install/install_and_use.cmake)
set_tests_properties(install_and_use PROPERTIES TIMEOUT 300)

# Continuous integration has no GPU and little time: where nvcc is, it compiles a kernel of each kind.
find_program(VELOXQUANT_NVCC nvcc PATHS /usr/local/cuda/bin)
if(VELOXQUANT_NVCC)
  add_test(NAME cuda_compiles COMMAND ${PROJECT_SOURCE_DIR}/tools/gpu/compile.sh ${VELOXQUANT_NVCC}
    ${PROJECT_BINARY_DIR}/cuda_compiles)
  set_tests_properties(cuda_compiles PROPERTIES TIMEOUT 1200)
endif()
# The kernels that are handed to NVRTC, by MLX or by the library, are compiled by it where a toolkit has it.
find_library(VELOXQUANT_NVRTC nvrtc PATHS /usr/local/cuda/lib64)
find_path(VELOXQUANT_CUDA_INCLUDE cuda_fp16.h PATHS /usr/local/cuda/include)
foreach(name cuda_text_test cuda_general_text_test)
  target_link_libraries(${name} PRIVATE ${CMAKE_DL_LIBS})
  if(VELOXQUANT_NVRTC AND VELOXQUANT_CUDA_INCLUDE)
    target_compile_definitions(${name} PRIVATE
      VELOXQUANT_NVRTC="${VELOXQUANT_NVRTC}" VELOXQUANT_CUDA_INCLUDE="${VELOXQUANT_CUDA_INCLUDE}")
  endif()
endforeach()
if(VELOXQUANT_CUDA_INCLUDE)
  # The layout of the decode kernels' shared memory, for the host as below.
  target_include_directories(cuda_shared_memory_test BEFORE PRIVATE ${PROJECT_SOURCE_DIR}/tests/cuda_machine)
  target_include_directories(cuda_shared_memory_test SYSTEM PRIVATE ${VELOXQUANT_CUDA_INCLUDE})
  target_compile_definitions(cuda_shared_memory_test PRIVATE VELOXQUANT_MACHINE_ARCH=900)
  target_compile_options(cuda_shared_memory_test PRIVATE -O1 -Wno-unknown-pragmas)
endif()
# The decode kernels themselves on the CUDA machine: their source, compiled for the host. Its folder comes first, so
# that its ptx.cuh and start.cuh stand for those of src/backends/cuda. Sanitizers do not know fibers.
if(VELOXQUANT_CUDA_INCLUDE AND NOT VELOXQUANT_HAVE_CUDA AND NOT VELOXQUANT_SANITIZE)
  # sm_90's layout of shared memory, and that of an architecture with 99 KB.
  foreach(arch 900 1200)
    set(name cuda_decode_${arch}_test)
    add_executable(${name} tests/cuda_machine/decode_test.cpp tests/cuda_machine/machine.cpp
      tests/cuda_machine/runtime.cpp tools/gpu/problem.cpp)
    veloxquant_compile_options(${name})
    target_compile_options(${name} PRIVATE -O1 -Wno-unknown-pragmas)
    target_compile_definitions(${name} PRIVATE VELOXQUANT_MACHINE_ARCH=${arch})
    target_include_directories(${name} BEFORE PRIVATE ${PROJECT_SOURCE_DIR}/tests/cuda_machine)
    target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
    target_include_directories(${name} SYSTEM PRIVATE ${VELOXQUANT_CUDA_INCLUDE})
    target_link_libraries(${name} PRIVATE veloxquant GTest::gtest_main)
    gtest_discover_tests(${name} TEST_SUFFIX _sm${arch} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 600)
  endforeach()
endif()
