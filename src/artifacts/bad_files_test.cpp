// Damaged and hostile files: each gives one Error that says what is wrong; random mutations never
// crash and never load as something else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <functional>

#include "src/artifacts/manifest.h"
#include "src/artifacts/npy.h"
#include "src/artifacts/test_support.h"

namespace veloxquant {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// A store that holds one good artifact, with handles to damage it.
class Victim {
 public:
  Victim() {
    good = Artifact{"test",
                    R"({"head_dim":64,"scale":0.5})",
                    {{"x", random_array(DType::float32, {2, 3}, 1)},
                     {"y", random_array(DType::bfloat16, {4}, 2)}}};
    store.save("a", good);
    for (const std::string& name : directory.files()) {
      if (name.starts_with("a.x.")) array_file = name;
    }
  }

  std::string manifest() const { return read_text(directory.file("a.json")); }
  std::string array() const { return read_text(directory.file(array_file)); }
  void set_manifest(const std::string& text) { write_text(directory.file("a.json"), text); }
  void set_array(const std::string& text) { write_text(directory.file(array_file), text); }

  // Replaces text in the manifest and makes its checksum right again, as an attacker would.
  void forge(const std::string& from, const std::string& to) {
    std::string text = manifest();
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    const size_t tail = text.rfind(",\n  \"crc32\"");
    text.resize(tail);
    char crc[9];
    std::snprintf(crc, sizeof crc, "%08x", crc32_of(text));
    set_manifest(text + ",\n  \"crc32\": \"" + crc + "\"\n}\n");
  }

  // Replaces the file of array x, and its size and checksum in the manifest.
  void forge_array(const std::string& bytes) {
    const std::string before = array();
    set_array(bytes);
    char crc[2][9];
    std::snprintf(crc[0], sizeof crc[0], "%08x", crc32_of(before));
    std::snprintf(crc[1], sizeof crc[1], "%08x", crc32_of(bytes));
    forge("\"bytes\": " + std::to_string(before.size()),
          "\"bytes\": " + std::to_string(bytes.size()));
    forge(std::string("\"crc32\": \"") + crc[0], std::string("\"crc32\": \"") + crc[1]);
  }

  // The same for a .npy file with this dict in its header.
  void forge_header(std::string dict, size_t data_bytes = 24) {
    dict.resize(117, ' ');
    forge_array(std::string("\x93NUMPY\x01\x00\x76\x00", 10) + dict + "\n" +
                std::string(data_bytes, 'x'));
  }

  void forge_shape(const std::string& shape) {
    std::string text = manifest();
    const size_t from = text.find("\"shape\": [");
    forge(text.substr(from, text.find(']', from) + 1 - from), "\"shape\": " + shape);
  }

  TemporaryDirectory directory;
  ArtifactStore store{directory.path()};
  Artifact good;
  std::string array_file;
};

struct BadFile {
  const char* name;
  std::function<void(Victim&)> damage;
  const char* message;  // part of the error
};

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  return text.replace(text.find(from), from.size(), to);
}

std::string dict(const std::string& descr, const std::string& order, const std::string& shape) {
  return "{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

const BadFile kBadFiles[] = {
    // The manifest as a file.
    {"ManifestMissing", [](Victim& v) { fs::remove(v.directory.file("a.json")); }, "cannot open"},
    {"ManifestEmpty", [](Victim& v) { v.set_manifest(""); }, "not JSON"},
    {"ManifestTruncated", [](Victim& v) { v.set_manifest(v.manifest().substr(0, 99)); },
     "not JSON"},
    {"ManifestIsADirectory",
     [](Victim& v) {
       fs::remove(v.directory.file("a.json"));
       fs::create_directory(v.directory.file("a.json"));
     },
     "no regular file"},
    {"ManifestIsAPipe",
     [](Victim& v) {
       fs::remove(v.directory.file("a.json"));
       mkfifo(v.directory.file("a.json").c_str(), 0600);
     },
     "no regular file"},
    {"ManifestHuge", [](Victim& v) { fs::resize_file(v.directory.file("a.json"), 1ull << 40); },
     "wanted at most 16777216"},
    {"DirectoryIsAFile",
     [](Victim& v) {
       fs::remove_all(v.directory.path());
       write_text(v.directory.path(), "a file");
     },
     "open the directory"},
    // The manifest as JSON.
    {"NotJson", [](Victim& v) { v.set_manifest("head_dim = 64\n"); }, "not JSON"},
    {"BinaryGarbage", [](Victim& v) { v.set_manifest(std::string(500, '\xff')); }, "not JSON"},
    {"InvalidUtf8",
     [](Victim& v) {
       v.forge("\"head_dim\"",
               "\"head\xff\xfe"
               "dim\"");
     },
     "not JSON"},
    {"TextAfterTheEnd", [](Victim& v) { v.set_manifest(v.manifest() + "{}"); }, "not JSON"},
    {"SpacesAfterTheEnd", [](Victim& v) { v.set_manifest(v.manifest() + "  \n"); },
     "does not end with its checksum"},
    {"JsonIsAnArray", [](Victim& v) { v.set_manifest("[1, 2]"); }, "wanted an object"},
    {"DeepNesting", [](Victim& v) { v.set_manifest(std::string(1000000, '[')); },
     "nested deeper than 32"},
    {"DeepAttributes",
     [](Victim& v) {
       v.forge("\"head_dim\": 64",
               "\"deep\": " + std::string(40, '[') + "1" + std::string(40, ']'));
     },
     "nested deeper than 32"},
    {"DuplicateKeys", [](Victim& v) { v.forge("\"head_dim\": 64", "\"scale\": 1"); },
     "'scale' appears twice"},
    {"DuplicateArrays", [](Victim& v) { v.forge("\"y\": {", "\"x\": {"); }, "'x' appears twice"},
    {"IntegerBeyond64Bits", [](Victim& v) { v.forge(": 64", ": 123456789012345678901"); },
     "does not fit 64 bits"},
    {"NumberBeyondDouble", [](Victim& v) { v.forge(": 64", ": 1e999"); }, "not JSON"},
    // The manifest's fields.
    {"ForeignMagic", [](Victim& v) { v.forge("veloxquant-artifact", "safetensors-index"); },
     "magic: got 'safetensors-index'"},
    {"NoMagic", [](Victim& v) { v.set_manifest("{\"model_type\": \"llama\"}"); },
     "'magic' is missing"},
    {"FutureVersion", [](Victim& v) { v.forge("\"version\": 1", "\"version\": 2"); },
     "version: got 2, wanted 1"},
    {"VersionIsText", [](Victim& v) { v.forge("\"version\": 1", "\"version\": \"1\""); },
     "version: got string, wanted an integer"},
    {"EditedByHand", [](Victim& v) { v.set_manifest(replaced(v.manifest(), ": 64", ": 65")); },
     "the manifest was altered"},
    {"ChecksumMissing",
     [](Victim& v) {
       const std::string text = v.manifest();
       v.set_manifest(text.substr(0, text.rfind(",\n  \"crc32\"")) + "\n}\n");
     },
     "does not end with its checksum"},
    {"AttributesAreAList",
     [](Victim& v) { v.forge("\"attributes\": {", "\"attributes\": [], \"z\": {"); },
     "attributes: got array, wanted object"},
    {"ArraysAreMissing", [](Victim& v) { v.forge("\"arrays\"", "\"other\""); },
     "'arrays' is missing"},
    {"ArrayIsANumber", [](Victim& v) { v.forge("\"arrays\": {", "\"arrays\": {\n \"z\": 3,"); },
     "array 'z': got number, wanted an object"},
    {"KindIsANumber", [](Victim& v) { v.forge("\"kind\": \"test\"", "\"kind\": 5"); },
     "kind: got number, wanted string"},
    {"NulInAnArrayName", [](Victim& v) { v.forge("\"x\": {", "\"x\\u0000\": {"); }, "array name"},
    {"UnknownDType", [](Victim& v) { v.forge("\"float32\"", "\"float64\""); },
     "dtype: got 'float64'"},
    {"WrongDType", [](Victim& v) { v.forge("\"float32\"", "\"int32\""); }, "dtype or shape"},
    {"WrongShape", [](Victim& v) { v.forge_shape("[3, 2]"); }, "dtype or shape"},
    {"NegativeShape", [](Victim& v) { v.forge_shape("[-2, -3]"); }, "a dimension of -2"},
    {"FractionalShape", [](Victim& v) { v.forge_shape("[2.5, 3]"); }, "wanted an integer"},
    {"ShapeThatOverflowsToASmallSize",
     [](Victim& v) { v.forge_shape("[4194305, 4194305, 211106198978564]"); }, "got more than"},
    {"ShapeThatOverflowsBesideAZero",
     [](Victim& v) { v.forge_shape("[0, 4611686018427387904, 4611686018427387904]"); },
     "got more than"},
    {"UnsignedShape", [](Victim& v) { v.forge_shape("[18446744073709551615]"); },
     "a dimension of -1"},
    {"SevenDimensions", [](Victim& v) { v.forge_shape("[1, 1, 1, 1, 1, 2, 3]"); },
     "wanted at most 6"},
    {"SizeMismatch", [](Victim& v) { v.forge("\"bytes\": 152", "\"bytes\": 151"); },
     "size: got 152 bytes, wanted 151"},
    {"CrcIsNoHex", [](Victim& v) { v.forge("\"crc32\": \"", "\"crc32\": \"x"); },
     "wanted eight hex digits"},
    // File names.
    {"PathTraversal", [](Victim& v) { v.forge(v.array_file, "../" + v.array_file); },
     "wanted a plain name"},
    {"AbsolutePath",
     [](Victim& v) { v.forge(v.array_file, v.directory.file(v.array_file).string()); },
     "wanted a plain name"},
    {"NulInAFileName", [](Victim& v) { v.forge(v.array_file, v.array_file + "\\u0000"); },
     "wanted a plain name"},
    {"FileOfAnotherArtifact", [](Victim& v) { v.forge("\"a.x.", "\"b.x."); },
     "wanted a plain name"},
    {"EmptyFileName", [](Victim& v) { v.forge(v.array_file, ""); }, "wanted a plain name"},
    // Array files.
    {"ArrayMissing", [](Victim& v) { fs::remove(v.directory.file(v.array_file)); }, "cannot open"},
    {"ArrayEmpty", [](Victim& v) { v.set_array(""); }, "size: got 0 bytes"},
    {"ArrayTruncated", [](Victim& v) { v.set_array(v.array().substr(0, 140)); },
     "size: got 140 bytes, wanted 152"},
    {"ArrayExtended", [](Victim& v) { v.set_array(v.array() + "x"); }, "size: got 153 bytes"},
    {"ArrayIsADirectory",
     [](Victim& v) {
       fs::remove(v.directory.file(v.array_file));
       fs::create_directory(v.directory.file(v.array_file));
     },
     "no regular file"},
    {"ArrayLinksToNothing",
     [](Victim& v) {
       fs::remove(v.directory.file(v.array_file));
       fs::create_symlink("nowhere", v.directory.file(v.array_file));
     },
     "cannot open"},
    {"ArrayLinksToADevice",
     [](Victim& v) {
       fs::remove(v.directory.file(v.array_file));
       fs::create_symlink("/dev/zero", v.directory.file(v.array_file));
     },
     "no regular file"},
    {"DataBitFlip",
     [](Victim& v) {
       std::string bytes = v.array();
       bytes[150] ^= 4;
       v.set_array(bytes);
     },
     "the file was altered"},
    {"HeaderBitFlip", [](Victim& v) { v.set_array(replaced(v.array(), " ", "\n")); },
     "the file was altered"},
    {"NotNpy", [](Victim& v) { v.forge_array(std::string(152, 'x')); }, "no .npy file"},
    {"ShorterThanAPreamble", [](Victim& v) { v.forge_array("\x93NUMPY"); }, "wanted a .npy file"},
    {"NpyVersion2",
     [](Victim& v) {
       std::string bytes = v.array();
       bytes[6] = 2;
       v.forge_array(bytes);
     },
     ".npy version: got 2.0"},
    {"HeaderLengthTooLarge",
     [](Victim& v) {
       std::string bytes = v.array();
       bytes[9] = '\xff';
       v.forge_array(bytes);
     },
     "wanted at most 4096"},
    {"HeaderLongerThanTheFile",
     [](Victim& v) {
       std::string bytes = v.array();
       bytes[9] = 1;
       v.forge_array(bytes);
     },
     "ends inside its .npy header"},
    {"HeaderClaimsTooMany",
     [](Victim& v) { v.forge_header(dict("<f4", "False", "(1000000000000000000,)")); },
     "dtype or shape"},
    {"HeaderAndManifestClaimTooMany",
     [](Victim& v) {
       v.forge_header(dict("<f4", "False", "(1000000000000000000,)"));
       v.forge_shape("[1000000000000000000]");
     },
     "got more than"},
    {"HeaderAndManifestClaimMore",
     [](Victim& v) {
       v.forge_header(dict("<f4", "False", "(1000000,)"));
       v.forge_shape("[1000000]");
     },
     "got 24 bytes of elements, wanted 4000000"},
    {"HeaderShapeOverflowsItsInteger",
     [](Victim& v) { v.forge_header(dict("<f4", "False", "(99999999999999999999,)")); },
     "no 64-bit integer"},
    {"HeaderShapeNegative", [](Victim& v) { v.forge_header(dict("<f4", "False", "(-2, -3)")); },
     "dtype or shape"},
    {"FortranOrder", [](Victim& v) { v.forge_header(dict("<f4", "True", "(2, 3)")); },
     "wanted a row-major array"},
    {"BigEndian", [](Victim& v) { v.forge_header(dict(">f4", "False", "(2, 3)")); },
     ".npy dtype: got '>f4'"},
    {"PickledObjects", [](Victim& v) { v.forge_header(dict("|O", "False", "(2, 3)")); },
     ".npy dtype: got '|O'"},
    {"HeaderKeyTwice",
     [](Victim& v) { v.forge_header("{'descr': '<f4', 'descr': '<f4', 'shape': (2, 3), }"); },
     "repeated key 'descr'"},
    {"HeaderKeyMissing", [](Victim& v) { v.forge_header("{'descr': '<f4', 'shape': (2, 3), }"); },
     "a key is missing"},
    {"HeaderWithoutEnd", [](Victim& v) { v.forge_header("{'descr': '<f4"); }, "has no end"},
    {"HeaderThenText",
     [](Victim& v) { v.forge_header(dict("<f4", "False", "(2, 3)") + "import os"); },
     "text after the closing brace"},
    {"BoolThatIsNeither",
     [](Victim& v) {
       v.forge_header(dict("|b1", "False", "(24,)"));
       v.forge("\"float32\"", "\"bool\"");
       v.forge_shape("[24]");
     },
     "neither 0 nor 1"},
};

class BadFileTest : public testing::TestWithParam<BadFile> {};

TEST_P(BadFileTest, GivesOneClearError) {
  Victim victim;
  GetParam().damage(victim);
  try {
    victim.store.load("a");
    FAIL() << "loaded";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_THAT(message, HasSubstr(GetParam().message));
    EXPECT_TRUE(message.starts_with("[ArtifactStore::load] 'a' in ")) << message;
    EXPECT_LT(message.size(), 500u) << message;
  }
}

INSTANTIATE_TEST_SUITE_P(All, BadFileTest, testing::ValuesIn(kBadFiles),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(BadArguments, NamesAreRefused) {
  Victim victim;
  for (const std::string& name :
       {std::string(), std::string("../x"), std::string("/etc/passwd"), std::string(".hidden"),
        std::string("a b"), std::string("a\0b", 3), std::string("ä"), std::string(101, 'x')}) {
    EXPECT_THROW(victim.store.save(name, victim.good), Error) << name;
    EXPECT_THROW(victim.store.load(name), Error) << name;
    EXPECT_FALSE(victim.store.exists(name)) << name;
    if (name == "a b" || name.size() == 101) continue;
    EXPECT_THROW(
        victim.store.save("b", {"test", "{}", {{name, random_array(DType::uint8, {}, 1)}}}), Error)
        << name;
  }
  EXPECT_THROW(ArtifactStore(""), Error);
  EXPECT_THROW(ArtifactStore(std::string("a\0b", 3)), Error);
}

TEST(BadArguments, ArtifactsAreRefusedBeforeTheDiskIsTouched) {
  Victim victim;
  const auto refused = [&](const Artifact& artifact, const char* message) {
    try {
      victim.store.save("a", artifact);
      ADD_FAILURE() << "saved: wanted " << message;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(message));
    }
  };
  const Array x = random_array(DType::uint8, {2}, 1);
  refused({"", "{}", {}}, "kind");
  refused({"test", "[]", {}}, "attributes: got JSON of type array");
  refused({"test", "{", {}}, "not JSON");
  refused({"test", R"({"a":1,"a":2})", {}}, "appears twice");
  refused({"test", "{\"a\":" + std::string(31, '[') + std::string(31, ']') + "}", {}},
          "nested deeper");
  refused({"test", "{\"a\":\"" + std::string(kMaxManifestBytes, 'x') + "\"}", {}}, "manifest: got");
  refused({"test", "{}", {{"x", {DType::uint8, {3}, x.bytes}}}}, "bytes: got 2, wanted 3");
  refused({"test", "{}", {{"x", {DType::uint8, {-2}, x.bytes}}}}, "a dimension of -2");
  refused({"test", "{}", {{"x", {DType::boolean, {2}, {0, 2}}}}}, "neither 0 nor 1");
  refused({"test", "{}", {{"x", {DType::uint8, {1, 1, 1, 1, 1, 1, 2}, x.bytes}}}}, "at most 6");
  EXPECT_TRUE(victim.store.load("a") == victim.good);
}

TEST(BadArguments, UnwritableDirectoryIsAnErrorAndNothingChanges) {
  if (geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  Victim victim;
  fs::permissions(victim.directory.path(), fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_THROW(victim.store.save("a", {"test", "{}", {}}), Error);
  EXPECT_TRUE(victim.store.load("a") == victim.good);
  fs::permissions(victim.directory.path(), fs::perms::owner_all);
}

TEST(BadArguments, UnreadableFileIsAnError) {
  if (geteuid() == 0) GTEST_SKIP() << "root may read anything";
  Victim victim;
  fs::permissions(victim.directory.file(victim.array_file), fs::perms::none);
  EXPECT_THROW(victim.store.load("a"), Error);
}

std::string mutate(std::string bytes, std::mt19937& random) {
  const auto position = [&] { return random() % bytes.size(); };
  switch (random() % 6) {
    case 0:
      bytes[position()] ^= static_cast<char>(1u << random() % 8);
      break;
    case 1:
      bytes[position()] = static_cast<char>(random());
      break;
    case 2:
      bytes.erase(position(), 1 + random() % 8);
      break;
    case 3:
      bytes.insert(position(), 1 + random() % 8, static_cast<char>(random()));
      break;
    case 4:
      bytes.resize(position());
      break;
    default:
      for (int i = 0; i < 4; ++i) bytes[position()] = "0123456789[]{}\",:-.eE\\"[random() % 22];
  }
  return bytes;
}

// Loads either throw an Error or give exactly what was saved.
void load_after_damage(Victim& victim, int* survivors) {
  try {
    const Artifact loaded = victim.store.load("a");
    ASSERT_TRUE(loaded == victim.good);
    ++*survivors;
  } catch (const Error&) {
  }
}

TEST(Mutations, NeverCrashAndNeverLoadAsSomethingElse) {
  Victim victim;
  const std::string manifest = victim.manifest(), array = victim.array();
  std::mt19937 random(11);
  int survivors = 0;
  for (int i = 0; i < 10000; ++i) {
    victim.set_manifest(mutate(manifest, random));
    load_after_damage(victim, &survivors);
    victim.set_manifest(manifest);
    victim.set_array(mutate(array, random));
    load_after_damage(victim, &survivors);
    victim.set_array(array);
    if (HasFatalFailure()) return;
  }
  // Only mutations that change nothing survive.
  EXPECT_LT(survivors, 400);
}

// The same behind valid checksums: the parsers themselves must hold. Other contents may load here.
TEST(Mutations, BehindForgedChecksumsNeverCrash) {
  Victim victim;
  const std::string manifest = victim.manifest(), array = victim.array();
  const size_t covered = manifest.rfind(",\n  \"crc32\"");
  std::mt19937 random(12);
  for (int i = 0; i < 10000; ++i) {
    std::string text = mutate(manifest.substr(0, covered), random);
    char crc[9];
    std::snprintf(crc, sizeof crc, "%08x", crc32_of(text));
    text += std::string(",\n  \"crc32\": \"") + crc + "\"\n}\n";
    try {
      read_manifest(text, "a", "test");
    } catch (const Error&) {
    }
    try {
      const NpyHeader header = read_npy_header(mutate(array.substr(0, 128), random), "test");
      EXPECT_GE(checked_array_bytes(header.dtype, header.shape, "test"), 0);
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace veloxquant
