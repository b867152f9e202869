#include "src/artifacts/durable_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>

#include "veloxquant/error.h"

namespace veloxquant {
namespace {

[[noreturn]] void fail_errno(const std::string& what, const char* verb) {
  const int code = errno;
  fail(what, ": cannot ", verb, ": ", std::generic_category().message(code));
}

// A signal may interrupt any of these calls before it did anything.
template <class Call>
auto retry(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// Linux transfers at most 2^31 - 4096 bytes a call; macOS refuses more than 2^31 - 1.
constexpr size_t kMaxTransfer = size_t{1} << 30;

void write_all(int fd, std::string_view bytes, const std::string& what) {
  while (!bytes.empty()) {
    const ssize_t n =
        retry([&] { return ::write(fd, bytes.data(), std::min(bytes.size(), kMaxTransfer)); });
    if (n < 0) fail_errno(what, "write");
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

void sync(int fd, const std::string& what) {
#ifdef F_FULLFSYNC
  // macOS: fsync leaves data in the drive's own cache. Not every file system knows this call.
  if (::fcntl(fd, F_FULLFSYNC) == 0) return;
#endif
  if (retry([&] { return ::fsync(fd); }) < 0) fail_errno(what, "sync");
}

}  // namespace

FileHandle::~FileHandle() { ::close(fd_); }

DirectoryLock::DirectoryLock(int directory_fd, bool exclusive) : fd_(directory_fd) {
  retry([&] { return ::flock(fd_, exclusive ? LOCK_EX : LOCK_SH); });
}

// Not left to close(): a child forked meanwhile would keep the lock.
DirectoryLock::~DirectoryLock() { ::flock(fd_, LOCK_UN); }

int open_directory(const std::string& path, const std::string& what) {
  const int fd = retry([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (fd < 0) fail_errno(what, "open the directory");
  return fd;
}

int open_file_at(int directory_fd, const std::string& name, const std::string& what) {
  // O_NONBLOCK: opening a pipe must not wait for a writer.
  const int fd = retry(
      [&] { return ::openat(directory_fd, name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  if (fd < 0) fail_errno(what, "open");
  struct stat status;
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd);
    fail(what, ": this is no regular file");
  }
  return fd;
}

int64_t file_bytes(int fd, const std::string& what) {
  struct stat status;
  if (::fstat(fd, &status) != 0) fail_errno(what, "stat");
  return status.st_size;
}

void read_exactly(int fd, void* data, size_t n, int64_t offset, const std::string& what) {
  auto* to = static_cast<uint8_t*>(data);
  while (n > 0) {
    const ssize_t got = retry([&] { return ::pread(fd, to, std::min(n, kMaxTransfer), offset); });
    if (got < 0) fail_errno(what, "read");
    require(got > 0, what, ": the file ended while it was read");
    to += got;
    offset += got;
    n -= static_cast<size_t>(got);
  }
}

void write_file_at(int directory_fd, const std::string& name,
                   const std::vector<std::string_view>& pieces, const std::string& what) {
  const std::string temporary = "." + name + ".tmp";
  // Removed first, so that nothing (a link, a file of another owner) is written through.
  ::unlinkat(directory_fd, temporary.c_str(), 0);
  const int fd = retry([&] {
    return ::openat(directory_fd, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  });
  if (fd < 0) fail_errno(what, "create");
  const FileHandle file(fd);
  try {
    for (std::string_view piece : pieces) write_all(fd, piece, what);
    sync(fd, what);
    if (::renameat(directory_fd, temporary.c_str(), directory_fd, name.c_str()) != 0) {
      fail_errno(what, "rename to its final name");
    }
  } catch (...) {
    ::unlinkat(directory_fd, temporary.c_str(), 0);
    throw;
  }
}

std::string target_of_temporary_file(std::string_view name) {
  constexpr std::string_view extension = ".tmp";
  if (!name.starts_with('.') || !name.ends_with(extension) || name.size() <= 1 + extension.size())
    return "";
  name.remove_prefix(1);
  name.remove_suffix(extension.size());
  return std::string(name);
}

void sync_directory(int directory_fd, const std::string& what) { sync(directory_fd, what); }

}  // namespace veloxquant
