# What every target of the project is compiled with.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

# Fast-math reorders sums and drops NaN: codes would differ between machines, and masks (-inf)
# would be undefined. Refused wherever it may hide: command line, CXXFLAGS, build type, directory.
get_directory_property(directory_options COMPILE_OPTIONS)
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
foreach(flags CMAKE_CXX_FLAGS CMAKE_CXX_FLAGS_${build_type} CMAKE_CUDA_FLAGS directory_options)
  set(forbidden
    "-Ofast|-f(fast-math|unsafe-math-optimizations|associative-math|finite-math-only|reciprocal-math)|-use_fast_math")
  if("${${flags}}" MATCHES "(^|[ ;-])(${forbidden})($|[ ;])")
    message(FATAL_ERROR
      "VeloxQuant cannot be built with ${CMAKE_MATCH_2} (found in ${flags}): "
      "equal codes on every machine need exact IEEE arithmetic. Remove the flag.")
  endif()
endforeach()

if(VELOXQUANT_SANITIZE)
  set(sanitizer_flags -fsanitize=${VELOXQUANT_SANITIZE} -fno-omit-frame-pointer)
  if(VELOXQUANT_SANITIZE MATCHES "undefined")
    list(APPEND sanitizer_flags -fno-sanitize-recover=undefined)
  endif()
  add_compile_options(${sanitizer_flags})
  add_link_options(${sanitizer_flags})
endif()

function(veloxquant_compile_options target)
  # Codes are equal bit for bit on every SIMD level: nothing may fuse a*b+c behind our back.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-ffp-contract=off>
    # GCC 12 warns of overlapping copies in std::string operator+ (GCC bug 105651).
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)
endfunction()
