# veloxquant._core: the core for Python without MLX (NumPy, PyTorch; CUDA where asked for), bound with
# nanobind. Built through scikit-build-core (python/core/pyproject.toml), for the tests of the
# package, and by tools/gpu/run.sh.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "nanobind is not installed for ${Python_EXECUTABLE}: pip install 'nanobind>=3,<4'")
endif()
find_package(nanobind 3.0 CONFIG REQUIRED)
file(GLOB core_binding_sources CONFIGURE_DEPENDS python/core_bindings/*.cpp)
nanobind_add_module(_core NB_STATIC NOMINSIZE ${core_binding_sources})
veloxquant_compile_options(_core)
target_include_directories(_core PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(_core PRIVATE VELOXQUANT_VERSION="${PROJECT_VERSION}")
target_link_libraries(_core PRIVATE veloxquant)
install(TARGETS _core LIBRARY DESTINATION veloxquant COMPONENT core_python)
install(DIRECTORY python/veloxquant DESTINATION . COMPONENT core_python FILES_MATCHING PATTERN "*.py")

# The package as it will be installed, to be imported from the build folder: what the tests do.
set(core_python_dir ${PROJECT_BINARY_DIR}/core_python)
file(MAKE_DIRECTORY ${core_python_dir}/veloxquant)
foreach(name __init__.py bench.py eval.py torch)
  file(CREATE_LINK ${PROJECT_SOURCE_DIR}/python/veloxquant/${name} ${core_python_dir}/veloxquant/${name} SYMBOLIC)
endforeach()
set_target_properties(_core PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${core_python_dir}/veloxquant)
if(VELOXQUANT_BUILD_TESTS)
  # Without PyTorch the tests of veloxquant.torch are skipped, those of the bindings are not.
  add_test(NAME core_python COMMAND ${Python_EXECUTABLE} -m pytest -q -p no:cacheprovider
    ${PROJECT_SOURCE_DIR}/python/tests_core)
  set_tests_properties(core_python PROPERTIES TIMEOUT 600
    ENVIRONMENT "PYTHONPATH=${core_python_dir};PYTHONDONTWRITEBYTECODE=1")
endif()
