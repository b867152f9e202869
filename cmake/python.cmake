# veloxquant_mlx._ext: MLX primitives over the core, bound with nanobind. Built through
# scikit-build-core (pyproject.toml), which passes the Python to build for.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

# MLX's C++ ABI changes between patch releases, so the extension is built against exactly the
# release that pyproject.toml pins and that will be there at run time.
file(STRINGS pyproject.toml mlx_pin REGEX "mlx\\[cpu\\]==[0-9.]+" LIMIT_COUNT 1)
string(REGEX MATCH "==([0-9.]+)" mlx_pin "${mlx_pin}")
set(mlx_pin "${CMAKE_MATCH_1}")

function(python_output variable what)
  execute_process(COMMAND "${Python_EXECUTABLE}" ${ARGN}
    OUTPUT_VARIABLE output OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${what} is not installed for ${Python_EXECUTABLE}: run `make setup`")
  endif()
  set(${variable} "${output}" PARENT_SCOPE)
endfunction()

python_output(mlx_version "mlx"
  -c "print(__import__('importlib.metadata').metadata.version('mlx'))")
python_output(MLX_ROOT "mlx" -m mlx --cmake-dir)
python_output(nanobind_ROOT "nanobind" -m nanobind --cmake_dir)
if(NOT mlx_version STREQUAL mlx_pin)
  message(FATAL_ERROR "mlx: got ${mlx_version}, wanted ${mlx_pin} (pyproject.toml): run `make setup`")
endif()
find_package(nanobind 3.0 CONFIG REQUIRED)
find_package(MLX CONFIG REQUIRED)
include(${PROJECT_SOURCE_DIR}/cmake/metallib.cmake)
veloxquant_add_metallib()

file(GLOB extension_sources CONFIGURE_DEPENDS src/mlx/*.cpp python/bindings/*.cpp)
list(FILTER extension_sources EXCLUDE REGEX "_test\\.cpp$")

# What Python sees of the extension, so that one built from other bindings than those beside the
# package is told apart (veloxquant_mlx/_runtime.py computes the same).
file(GLOB bindings CONFIGURE_DEPENDS python/bindings/*.cpp)
set(digests "")
foreach(binding IN LISTS bindings)
  file(SHA256 ${binding} digest)
  string(APPEND digests ${digest})
endforeach()
string(SHA256 bindings_digest "${digests}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${bindings})

# NB_DOMAIN mlx: shares MLX's type registry, without which mx.array is no known argument type.
nanobind_add_module(_ext NB_STATIC NB_DOMAIN mlx NOMINSIZE ${extension_sources})
veloxquant_compile_options(_ext)
target_include_directories(_ext PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(_ext PRIVATE
  VELOXQUANT_VERSION="${PROJECT_VERSION}" VELOXQUANT_MLX_VERSION="${mlx_pin}")
set_source_files_properties(python/bindings/module.cpp PROPERTIES
  COMPILE_DEFINITIONS VELOXQUANT_BINDINGS="${bindings_digest}")
target_link_libraries(_ext PRIVATE veloxquant mlx)
if(APPLE)
  set(origin "@loader_path")
else()
  set(origin "$ORIGIN")
endif()
# site-packages/veloxquant_mlx/_ext.so finds site-packages/mlx/lib/libmlx.so.
set_target_properties(_ext PROPERTIES INSTALL_RPATH "${origin}/../mlx/lib")
install(TARGETS _ext LIBRARY DESTINATION veloxquant_mlx COMPONENT python)
# Beside the package: OpenBLAS is loaded before MLX, whoever imports MLX first.
install(FILES python/_veloxquant_preload.py python/veloxquant_preload.pth DESTINATION . COMPONENT python)
