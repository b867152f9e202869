# cmake -DROOT=... "-DFILES=a.h;b.h" -DOUTPUT=... -P embed_metal.cmake
set(text "// Written by cmake/embed_metal.cmake.\n#include \"src/backends/metal/source.h\"\n\n"
  "namespace veloxquant::metal {\n\nconst std::vector<EmbeddedFile>& embedded_files() {\n"
  "  static const std::vector<EmbeddedFile> files = {\n")
string(JOIN "" text ${text})
foreach(file IN LISTS FILES)
  file(READ "${ROOT}/${file}" content)
  string(APPEND text "      {\"${file}\", R\"vq_msl(${content})vq_msl\"},\n")
endforeach()
string(APPEND text "  };\n  return files;\n}\n\n}  // namespace veloxquant::metal\n")
file(WRITE "${OUTPUT}" "${text}")
