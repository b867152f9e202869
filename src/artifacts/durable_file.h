// POSIX files: whole or absent after a crash.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace veloxquant {

// An open file or directory. Functions throw Error, starting with `what`, naming errno's reason.
class FileHandle {
 public:
  FileHandle(int fd) : fd_(fd) {}
  ~FileHandle();
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

// Holds an advisory lock on a directory: one saver, or any number of loaders, at a time. File
// systems without locks (some network mounts) go unlocked.
class DirectoryLock {
 public:
  DirectoryLock(int directory_fd, bool exclusive);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  int fd_;
};

int open_directory(const std::string& path, const std::string& what);

// A regular file opened for reading; symbolic links are followed (shared stores use them).
int open_file_at(int directory_fd, const std::string& name, const std::string& what);
int64_t file_bytes(int fd, const std::string& what);
// Exactly n bytes from `offset`.
void read_exactly(int fd, void* data, size_t n, int64_t offset, const std::string& what);

// Writes the pieces to ".<name>.tmp", syncs it and renames it to <name>; the caller syncs the
// directory. On an error the temporary file is removed.
void write_file_at(int directory_fd, const std::string& name,
                   const std::vector<std::string_view>& pieces, const std::string& what);
// The name that a leftover temporary file was meant to get; empty for any other file name.
std::string target_of_temporary_file(std::string_view name);

void sync_directory(int directory_fd, const std::string& what);

}  // namespace veloxquant
