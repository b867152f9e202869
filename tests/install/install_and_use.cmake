# Installs the library from BUILD_DIR to a fresh prefix, builds examples/cpp against that prefix
# and runs it. Needs: SOURCE_DIR BUILD_DIR GENERATOR SANITIZE.

set(work "${BUILD_DIR}/install_and_use")
file(REMOVE_RECURSE "${work}")

function(step)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "failed (${status}): ${ARGN}")
  endif()
endfunction()

set(flags "")
if(SANITIZE)
  set(flags "-fsanitize=${SANITIZE}")
endif()

step(${CMAKE_COMMAND} --install "${BUILD_DIR}" --component core --prefix "${work}/prefix")
step(${CMAKE_COMMAND} -S "${SOURCE_DIR}/examples/cpp" -B "${work}/example" -G "${GENERATOR}"
  -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS=${flags}" "-DCMAKE_PREFIX_PATH=${work}/prefix")
step(${CMAKE_COMMAND} --build "${work}/example")
step("${work}/example/first_cache")
