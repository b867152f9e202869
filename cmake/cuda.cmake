# CUDA kernels, where asked for: every .cu of a backend, codec or algorithm folder.

set(VELOXQUANT_HAVE_CUDA FALSE)
if(NOT VELOXQUANT_CUDA)
  return()
endif()

file(GLOB VELOXQUANT_CUDA_SOURCES CONFIGURE_DEPENDS src/*/cuda*.cu src/*/*/*.cu)
if(NOT VELOXQUANT_CUDA_SOURCES)
  message(STATUS "VELOXQUANT_CUDA: there are no CUDA sources in this version; the CPU library is complete without")
  return()
endif()

include(CheckLanguage)
find_program(VELOXQUANT_NVCC nvcc PATHS /usr/local/cuda/bin)
if(VELOXQUANT_NVCC AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "${VELOXQUANT_NVCC}")
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "VELOXQUANT_CUDA: nvcc was not found; the CUDA kernels are left out")
  return()
endif()

# Machine code for each, so that nothing waits for the driver to compile: A100, Hopper, Blackwell cards.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 120-real)
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # CMake 3.25 does not know that nvcc has it
endif()
find_package(CUDAToolkit REQUIRED)
set(VELOXQUANT_HAVE_CUDA TRUE)
target_sources(veloxquant PRIVATE ${VELOXQUANT_CUDA_SOURCES})
set_target_properties(veloxquant PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(veloxquant PRIVATE VELOXQUANT_HAVE_CUDA)
# As -ffp-contract=off on the host: where codes are made, no fused multiply-add that the source does
# not ask for. Attention is held by tolerance and may fuse.
file(GLOB codec_cuda_sources src/codecs/*/*.cu src/cache/*.cu)
set_source_files_properties(${codec_cuda_sources} PROPERTIES COMPILE_OPTIONS --fmad=false)
target_link_libraries(veloxquant PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})  # NVRTC is loaded when first needed
message(STATUS "VELOXQUANT_CUDA: ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

# What tools/gpu runs on a GPU machine: `cmake --build … --target cuda_check cuda_bench`.
foreach(program cuda_check cuda_bench)
  add_executable(${program} EXCLUDE_FROM_ALL tools/gpu/${program}.cpp tools/gpu/problem.cpp
    tools/gpu/append_check.cpp)
  target_include_directories(${program} PRIVATE ${PROJECT_SOURCE_DIR})
  veloxquant_compile_options(${program})
  target_link_libraries(${program} PRIVATE veloxquant CUDA::cudart_static)
endforeach()
foreach(program general_check general_bench)
  add_executable(${program} EXCLUDE_FROM_ALL tools/gpu/${program}.cpp)
  target_include_directories(${program} PRIVATE ${PROJECT_SOURCE_DIR})
  veloxquant_compile_options(${program})
  target_link_libraries(${program} PRIVATE veloxquant CUDA::cudart_static)
endforeach()
target_sources(general_check PRIVATE tools/gpu/general_append.cpp)
