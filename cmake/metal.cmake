# The text of the Metal kernels and of the headers they share with the CPU, as strings of the
# library: compiled on the user's machine, when first used.
file(GLOB VELOXQUANT_METAL_TEXTS CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}
  src/math/*.h src/backends/metal/common.h src/backends/metal/cuda_prelude.h src/backends/metal/cuda_types.h
  src/codecs/metal*.h src/codecs/*/metal*.h src/codecs/vecinfer/cuda_layout.h src/attention/metal*.h src/cache/metal*.h)
set(metal_texts ${PROJECT_BINARY_DIR}/metal_texts.cpp)
set(metal_files ${VELOXQUANT_METAL_TEXTS})
list(TRANSFORM metal_files PREPEND ${PROJECT_SOURCE_DIR}/)
add_custom_command(OUTPUT ${metal_texts}
  COMMAND ${CMAKE_COMMAND} -DROOT=${PROJECT_SOURCE_DIR} "-DFILES=${VELOXQUANT_METAL_TEXTS}"
    -DOUTPUT=${metal_texts} -P ${PROJECT_SOURCE_DIR}/cmake/embed_metal.cmake
  DEPENDS ${metal_files} cmake/embed_metal.cmake VERBATIM)
target_sources(veloxquant PRIVATE ${metal_texts})
