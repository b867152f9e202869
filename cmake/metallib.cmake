# veloxquant.metallib: one launch of every family of kernels through Apple's compiler, by MLX's own CMake function. A
# proof that the text compiles there, built by the target veloxquant_metallib; nothing loads it.
set(VELOXQUANT_METAL_TEXT_NAMES append append_seal vecinfer_encode scalar_encode rabitq_encode qjl_encode commvq_encode
  rope_to_slots vecinfer_attend scalar_attend planes_attend rvq_attend merge)

# The program that writes the texts, and where it writes them: metal_texts FOLDER.
function(veloxquant_add_metal_texts)
  add_executable(metal_texts ${PROJECT_SOURCE_DIR}/tests/msl/texts_main.cpp ${PROJECT_SOURCE_DIR}/tests/msl/front_end.cpp)
  veloxquant_compile_options(metal_texts)
  target_include_directories(metal_texts PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(metal_texts PRIVATE veloxquant)
endfunction()

# Needs find_package(MLX).
macro(veloxquant_add_metallib)
  set(metal_compiler 1)
  if(APPLE)
    execute_process(COMMAND xcrun -sdk macosx --find metal RESULT_VARIABLE metal_compiler OUTPUT_QUIET ERROR_QUIET)
  endif()
  if(NOT metal_compiler STREQUAL "0")
    message(STATUS "veloxquant.metallib: not built, no Xcode here (MLX compiles a kernel when it is first used)")
  else()
    veloxquant_add_metal_texts()
    set(metal_text_files ${VELOXQUANT_METAL_TEXT_NAMES})
    list(TRANSFORM metal_text_files PREPEND ${CMAKE_CURRENT_BINARY_DIR}/metal/)
    list(TRANSFORM metal_text_files APPEND .metal)
    file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/metal)
    add_custom_command(OUTPUT ${metal_text_files} COMMAND metal_texts ${CMAKE_CURRENT_BINARY_DIR}/metal VERBATIM)
    mlx_build_metallib(TARGET veloxquant_metallib TITLE veloxquant SOURCES ${metal_text_files}
      OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
  endif()
endmacro()
