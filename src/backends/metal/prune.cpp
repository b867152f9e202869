#include "src/backends/metal/prune.h"

#include <cctype>
#include <set>
#include <sstream>
#include <vector>

namespace veloxquant::metal {
namespace {

// A definition, or lines that always stay (name empty): directives, namespaces.
struct Part {
  std::string name, text;
  bool kept = false;
};

bool in_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

std::string word_from(const std::string& text, size_t at) {
  while (at < text.size() && !in_word(text[at])) ++at;
  size_t end = at;
  while (end < text.size() && in_word(text[end])) ++end;
  return text.substr(at, end - at);
}

// The last word before one of `ends`, looking from `mark` on.
std::string word_before(const std::string& text, const char* mark, const char* ends) {
  const size_t from = text.find(mark);
  if (from == std::string::npos) return {};
  size_t end = text.find_first_of(ends, from + std::string(mark).size());
  if (end == std::string::npos) return {};
  while (end > from && !in_word(text[end - 1])) --end;
  size_t begin = end;
  while (begin > from && in_word(text[begin - 1])) --begin;
  return text.substr(begin, end - begin);
}

std::string name_of(const std::string& text) {
  for (const char* mark : {"VQ_FN ", "__forceinline__ "}) {
    const std::string name = word_before(text, mark, "(");
    if (!name.empty()) return name;
  }
  const std::string constant = word_before(text, "VQ_CONSTANT ", "[={");
  if (!constant.empty()) return constant;
  const size_t at = text.find("struct ");
  return at == std::string::npos ? std::string() : word_from(text, at + 7);
}

std::vector<Part> parts_of(const std::string& header) {
  std::vector<Part> parts;
  std::istringstream lines(header);
  std::string text;
  int depth = 0;
  for (std::string line; std::getline(lines, line);) {
    const bool outside = text.empty();
    const bool stays = line.rfind("#", 0) == 0 || line.rfind("namespace", 0) == 0 || line == "}";
    if (outside && stays) {
      while (line.back() == '\\') {
        std::string more;
        if (!std::getline(lines, more)) break;
        line += "\n" + more;
      }
      parts.push_back({{}, line + "\n"});
      continue;
    }
    if (outside && line.empty()) continue;
    text += line + "\n";
    for (char c : line) {
      depth += (c == '{' || c == '(' ? 1 : 0) - (c == '}' || c == ')' ? 1 : 0);
    }
    if (depth == 0 && !line.empty() && (line.back() == ';' || line.back() == '}')) {
      parts.push_back({name_of(text), text});
      text.clear();
    }
  }
  if (!text.empty()) parts.push_back({{}, text});
  return parts;
}

void add_words(const std::string& text, std::set<std::string>& words) {
  for (size_t at = 0; at < text.size();) {
    if (!in_word(text[at])) {
      ++at;
      continue;
    }
    const std::string word = word_from(text, at);
    words.insert(word);
    at += word.size();
  }
}

}  // namespace

std::string needed_by(const std::string& body, const std::string& header) {
  std::vector<Part> parts = parts_of(header);
  std::set<std::string> words;
  add_words(body, words);
  for (bool changed = true; changed;) {
    changed = false;
    for (Part& part : parts) {
      if (part.kept || !(part.name.empty() || words.count(part.name) > 0)) continue;
      part.kept = changed = true;
      add_words(part.text, words);
    }
  }
  std::string text;
  for (const Part& part : parts) text += part.kept ? part.text : std::string();
  return text;
}

std::string flush_left(const std::string& text) {
  std::istringstream lines(text);
  std::string out;
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find_first_not_of(' ');
    if (first != std::string::npos) out += line.substr(first) + "\n";
  }
  return out;
}

}  // namespace veloxquant::metal
