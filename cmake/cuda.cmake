# CUDA kernels, where asked for: every cuda*.cu of a backend, codec or algorithm folder.

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

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90)
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # CMake 3.25 does not know that nvcc has it
endif()
find_package(CUDAToolkit REQUIRED)
target_sources(veloxquant PRIVATE ${VELOXQUANT_CUDA_SOURCES})
set_target_properties(veloxquant PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(veloxquant PRIVATE VELOXQUANT_HAVE_CUDA)
# As -ffp-contract=off on the host: no fused multiply-add that the source does not ask for.
target_compile_options(veloxquant PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false>)
target_link_libraries(veloxquant PRIVATE CUDA::cudart_static)
message(STATUS "VELOXQUANT_CUDA: ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
