// ArtifactStore: save, load and list. README.md explains why the order of steps in save survives
// a kill at any moment.
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "src/artifacts/durable_file.h"
#include "src/artifacts/manifest.h"
#include "src/artifacts/npy.h"
#include "src/artifacts/printable.h"
#include "veloxquant/artifacts.h"

namespace veloxquant {
namespace {

std::string manifest_file(const std::string& name) { return name + ".json"; }

void check_name(const char* function, const std::string& name) {
  require(valid_name(name), "[ArtifactStore::", function, "] name: got '", printable(name),
          "', wanted up to ", kMaxNameBytes,
          " letters, digits, '_', '-', '.', not starting with '.'");
}

std::string_view text_of(const std::vector<uint8_t>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void check_elements(const Array& array, const std::string& what) {
  if (array.dtype != DType::boolean) return;
  require(std::all_of(array.bytes.begin(), array.bytes.end(), [](uint8_t b) { return b <= 1; }),
          what, ": got a bool that is neither 0 nor 1");
}

// The first bytes of a file, or nothing where it cannot be read.
std::string start_of_file(int directory_fd, const std::string& file, size_t n) {
  try {
    const FileHandle handle(open_file_at(directory_fd, file, ""));
    std::string start(std::min<size_t>(n, file_bytes(handle.fd(), "")), '\0');
    read_exactly(handle.fd(), start.data(), start.size(), 0, "");
    return start;
  } catch (const Error&) {
    return "";
  }
}

bool has_manifest(int directory_fd, const std::string& name) {
  return looks_like_manifest(start_of_file(directory_fd, manifest_file(name), 64));
}

bool file_exists(int directory_fd, const std::string& file) {
  return ::faccessat(directory_fd, file.c_str(), F_OK, 0) == 0;
}

bool file_equals(int directory_fd, const std::string& file,
                 const std::vector<std::string_view>& pieces) {
  try {
    const FileHandle handle(open_file_at(directory_fd, file, ""));
    size_t total = 0;
    for (std::string_view piece : pieces) total += piece.size();
    if (static_cast<size_t>(file_bytes(handle.fd(), "")) != total) return false;
    std::vector<char> chunk(size_t{1} << 20);
    int64_t offset = 0;
    for (std::string_view piece : pieces) {
      while (!piece.empty()) {
        const size_t n = std::min(piece.size(), chunk.size());
        read_exactly(handle.fd(), chunk.data(), n, offset, "");
        if (piece.substr(0, n) != std::string_view(chunk.data(), n)) return false;
        piece.remove_prefix(n);
        offset += static_cast<int64_t>(n);
      }
    }
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Writes one array under a name that no other content has. `written` gets the name of a file that
// was not there before.
ManifestEntry save_array(int directory_fd, const std::string& artifact, const std::string& name,
                         const Array& array, const std::string& what,
                         std::vector<std::string>* written) {
  const std::string header = write_npy_header(array.dtype, array.shape);
  const std::vector<std::string_view> pieces = {header, text_of(array.bytes)};
  ManifestEntry entry;
  entry.dtype = array.dtype;
  entry.shape = array.shape;
  entry.file_bytes = static_cast<int64_t>(header.size() + array.bytes.size());
  entry.crc = crc32_of(pieces[1], crc32_of(pieces[0]));
  for (int attempt = 0;; ++attempt) {
    entry.file = array_file_name(artifact, name, entry.crc, attempt);
    if (!file_exists(directory_fd, entry.file)) break;
    if (file_equals(directory_fd, entry.file, pieces)) return entry;
  }
  write_file_at(directory_fd, entry.file, pieces, what);
  written->push_back(entry.file);
  return entry;
}

Array load_array(int directory_fd, const ManifestEntry& entry, const std::string& what) {
  const FileHandle handle(open_file_at(directory_fd, entry.file, what));
  const int64_t size = file_bytes(handle.fd(), what);
  require(size == entry.file_bytes, what, ": size: got ", size, " bytes, wanted ",
          entry.file_bytes);
  std::string start(std::min<size_t>(size, 10 + kMaxNpyHeaderBytes), '\0');
  read_exactly(handle.fd(), start.data(), start.size(), 0, what);
  const NpyHeader header = read_npy_header(start, what);
  require(header.dtype == npy_dtype(entry.dtype) && header.shape == entry.shape, what,
          ": dtype or shape of the .npy file differ from the manifest's");
  const int64_t bytes = checked_array_bytes(entry.dtype, entry.shape, what);
  require(size - static_cast<int64_t>(header.data_offset) == bytes, what, ": got ",
          size - static_cast<int64_t>(header.data_offset), " bytes of elements, wanted ", bytes);

  Array array{entry.dtype, entry.shape, std::vector<uint8_t>(static_cast<size_t>(bytes))};
  read_exactly(handle.fd(), array.bytes.data(), array.bytes.size(),
               static_cast<int64_t>(header.data_offset), what);
  const uint32_t crc = crc32_of(text_of(array.bytes),
                                crc32_of(std::string_view(start).substr(0, header.data_offset)));
  require(crc == entry.crc, what, ": checksum: the file was altered");
  check_elements(array, what);
  return array;
}

bool is_directory(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored);
}

std::vector<std::string> files_in(const std::string& directory) {
  std::vector<std::string> files;
  std::error_code error;
  for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end;
       it.increment(error)) {
    files.push_back(it->path().filename().string());
  }
  return files;
}

// Called with the lock held: nobody else is writing, so every temporary file is a leftover.
// Failing to remove one costs space only.
void remove_dead_files(int directory_fd, const std::string& directory, const std::string& name,
                       const Manifest& manifest) {
  std::set<std::string> alive;
  for (const auto& [array, entry] : manifest.arrays) alive.insert(entry.file);
  for (const std::string& file : files_in(directory)) {
    const std::string target = target_of_temporary_file(file);
    const bool leftover =
        !owner_of_array_file(target).empty() || (target.ends_with(".json") && valid_name(target));
    const bool replaced = owner_of_array_file(file) == name && !alive.contains(file);
    if (leftover || replaced) ::unlinkat(directory_fd, file.c_str(), 0);
  }
}

}  // namespace

TensorView Array::view() const {
  require(bytes.size() == static_cast<size_t>(checked_array_bytes(dtype, shape, "[Array::view]")),
          "[Array::view] bytes: got ", bytes.size(), ", wanted those of the shape");
  TensorView view;
  view.data = bytes.data();
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  int64_t step = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.stride[d] = step;
    step *= shape[d];
  }
  return view;
}

ArtifactStore::ArtifactStore(const std::string& directory) : directory_(directory) {
  require(!directory.empty() && directory.find('\0') == std::string::npos,
          "[ArtifactStore] directory: got an empty text or one with a NUL, wanted a path");
}

void ArtifactStore::save(const std::string& name, const Artifact& artifact) const {
  check_name("save", name);
  const std::string what = "[ArtifactStore::save] '" + name + "' in " + directory_;
  for (const auto& [array_name, array] : artifact.arrays) {
    const std::string array_what = what + ": array '" + printable(array_name) + "'";
    const int64_t bytes = checked_array_bytes(array.dtype, array.shape, array_what);
    require(array.bytes.size() == static_cast<size_t>(bytes), array_what, ": bytes: got ",
            array.bytes.size(), ", wanted ", bytes);
    check_elements(array, array_what);
  }
  Manifest manifest{artifact.kind, artifact.attributes, {}};
  // Names, kind and attributes are refused before the disk is touched.
  for (const auto& [array_name, array] : artifact.arrays) manifest.arrays[array_name] = {};
  write_manifest(manifest, what);

  std::error_code error;
  std::filesystem::create_directories(directory_, error);
  require(!error, what, ": cannot create the directory: ", error.message());
  const FileHandle directory(open_directory(directory_, what));
  const DirectoryLock lock(directory.fd(), /*exclusive=*/true);
  require(!file_exists(directory.fd(), manifest_file(name)) || has_manifest(directory.fd(), name),
          what, ": ", manifest_file(name),
          " is there and is not ours: remove it or choose another name");

  std::vector<std::string> written;
  try {
    for (const auto& [array_name, array] : artifact.arrays) {
      manifest.arrays[array_name] = save_array(directory.fd(), name, array_name, array,
                                               what + ": array '" + array_name + "'", &written);
    }
    sync_directory(directory.fd(), what);
    write_file_at(directory.fd(), manifest_file(name), {write_manifest(manifest, what)},
                  what + ": manifest");
  } catch (...) {
    for (const std::string& file : written) ::unlinkat(directory.fd(), file.c_str(), 0);
    throw;
  }
  sync_directory(directory.fd(), what);
  remove_dead_files(directory.fd(), directory_, name, manifest);
}

Artifact ArtifactStore::load(const std::string& name) const {
  check_name("load", name);
  const std::string what = "[ArtifactStore::load] '" + name + "' in " + directory_;
  const FileHandle directory(open_directory(directory_, what));
  const DirectoryLock lock(directory.fd(), /*exclusive=*/false);

  const std::string manifest_what = what + ": manifest " + manifest_file(name);
  const FileHandle handle(open_file_at(directory.fd(), manifest_file(name), manifest_what));
  const int64_t size = file_bytes(handle.fd(), manifest_what);
  require(size <= static_cast<int64_t>(kMaxManifestBytes), manifest_what, ": got ", size,
          " bytes, wanted at most ", kMaxManifestBytes);
  std::string text(static_cast<size_t>(size), '\0');
  read_exactly(handle.fd(), text.data(), text.size(), 0, manifest_what);
  Manifest manifest = read_manifest(text, name, manifest_what);

  Artifact artifact{manifest.kind, manifest.attributes, {}};
  for (const auto& [array_name, entry] : manifest.arrays) {
    artifact.arrays[array_name] = load_array(
        directory.fd(), entry, what + ": array '" + array_name + "' (" + entry.file + ")");
  }
  return artifact;
}

bool ArtifactStore::exists(const std::string& name) const {
  if (!valid_name(name) || !is_directory(directory_)) return false;
  const FileHandle directory(open_directory(directory_, "[ArtifactStore::exists] " + directory_));
  return has_manifest(directory.fd(), name);
}

std::vector<std::string> ArtifactStore::names() const {
  constexpr std::string_view extension = ".json";
  std::vector<std::string> names;
  if (!is_directory(directory_)) return names;
  const FileHandle directory(open_directory(directory_, "[ArtifactStore::names] " + directory_));
  for (const std::string& file : files_in(directory_)) {
    if (!file.ends_with(extension)) continue;
    const std::string name = file.substr(0, file.size() - extension.size());
    if (valid_name(name) && has_manifest(directory.fd(), name)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace veloxquant
