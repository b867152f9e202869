// Round trips, the bytes on disk, and saves that are killed.
#include "veloxquant/artifacts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <random>

#include "src/artifacts/npy.h"
#include "src/artifacts/test_support.h"

namespace veloxquant {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;

class Artifacts : public testing::Test {
 protected:
  TemporaryDirectory directory_;
  ArtifactStore store_{directory_.path()};
};

TEST_F(Artifacts, RoundTripIsBitIdenticalForEveryDType) {
  Artifact saved{"test", R"({"model":"m","head_dim":64,"scale":0.1,"list":[1,-2,null,true]})", {}};
  for (DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::uint8, DType::uint16,
                      DType::int32, DType::boolean}) {
    const std::string name = dtype_name(dtype);
    saved.arrays[name] = random_array(dtype, {3, 5, 7}, static_cast<unsigned>(dtype));
    saved.arrays[name + ".scalar"] = random_array(dtype, {}, 1);
    saved.arrays[name + ".empty"] = random_array(dtype, {4, 0, 2}, 2);
    saved.arrays[name + ".six"] = random_array(dtype, {1, 2, 1, 3, 1, 2}, 3);
  }
  store_.save("all-of_them.v1", saved);
  EXPECT_TRUE(store_.load("all-of_them.v1") == saved);
}

TEST_F(Artifacts, ArraysAsLargeAsCodebooksRoundTrip) {
  const Artifact saved{"test", "{}", {{"x", random_array(DType::float16, {30, 8, 32, 256, 4}, 1)}}};
  store_.save("large", saved);
  EXPECT_TRUE(store_.load("large") == saved);
}

TEST_F(Artifacts, NoArraysAndNoAttributesIsAnArtifact) {
  store_.save("bare", {"test", "", {}});
  EXPECT_TRUE(store_.load("bare") == (Artifact{"test", "{}", {}}));
}

TEST_F(Artifacts, AttributesKeepTheirOrder) {
  store_.save("a", {"test", R"({"z": 1, "a": {"y": 2, "b": "\u00e4\u0000"}})", {}});
  EXPECT_EQ(store_.load("a").attributes, "{\"z\":1,\"a\":{\"y\":2,\"b\":\"ä\\u0000\"}}");
}

TEST_F(Artifacts, NamesListsOursOnly) {
  EXPECT_FALSE(store_.exists("a"));
  EXPECT_THAT(ArtifactStore(directory_.path() + "/none").names(), ElementsAre());
  store_.save("b", {"test", "{}", {}});
  store_.save("a", {"test", "{}", {}});
  write_text(directory_.file("config.json"), "{\"model_type\": \"llama\"}");
  EXPECT_THAT(store_.names(), ElementsAre("a", "b"));
  EXPECT_TRUE(store_.exists("a"));
  EXPECT_FALSE(store_.exists("config"));
  EXPECT_FALSE(store_.exists("../a"));
}

TEST_F(Artifacts, SaveDoesNotOverwriteForeignFiles) {
  write_text(directory_.file("config.json"), "{\"model_type\": \"llama\"}");
  EXPECT_THROW(store_.save("config", {"test", "{}", {}}), Error);
  EXPECT_EQ(read_text(directory_.file("config.json")), "{\"model_type\": \"llama\"}");
}

TEST_F(Artifacts, SaveCreatesNestedDirectories) {
  ArtifactStore deep(directory_.path() + "/x/y/z");
  deep.save("a", {"test", "{}", {}});
  EXPECT_TRUE(deep.exists("a"));
}

TEST_F(Artifacts, ReplacingRemovesOldFilesOfThisArtifactOnly) {
  const Artifact one{"test", "{}", {{"b.c", random_array(DType::uint8, {9}, 1)}}};
  const Artifact two{"test", "{}", {{"c", random_array(DType::uint8, {9}, 1)}}};
  store_.save("a", one);
  store_.save("a.b", two);
  write_text(directory_.file("notes.npy"), "the user's own");
  for (unsigned seed = 2; seed < 6; ++seed) {
    store_.save("a", {"test", "{}", {{"b.c", random_array(DType::uint8, {9}, seed)}}});
  }
  EXPECT_TRUE(store_.load("a.b") == two);
  EXPECT_EQ(directory_.files().size(), 5u) << "two manifests, two arrays, notes.npy";
}

TEST_F(Artifacts, CollidingChecksumsGetTheirOwnFiles) {
  const Array x = random_array(DType::uint8, {9}, 1);
  store_.save("a", {"test", "{}", {{"x", x}}});
  fs::path file;
  for (const auto& name : directory_.files()) {
    if (name.ends_with(".npy")) file = directory_.file(name);
  }
  // As if other bytes had the same CRC-32: the file under x's name holds something else.
  write_text(file, "something else");
  store_.save("a", {"test", "{}", {{"x", x}}});
  EXPECT_TRUE(store_.load("a").arrays["x"] == x);
  EXPECT_FALSE(fs::exists(file));
}

TEST_F(Artifacts, UnchangedArraysAreNotWrittenAgain) {
  const Array x = random_array(DType::uint8, {9}, 1);
  store_.save("a", {"test", "{}", {{"x", x}}});
  std::map<std::string, fs::file_time_type> before;
  for (const auto& name : directory_.files()) {
    before[name] = fs::last_write_time(directory_.file(name));
  }
  usleep(20000);
  store_.save("a", {"test", R"({"new":1})", {{"x", x}}});
  for (const auto& [name, time] : before) {
    EXPECT_EQ(fs::last_write_time(directory_.file(name)) == time, name.ends_with(".npy")) << name;
  }
}

TEST_F(Artifacts, LinkedFilesLoadAndSaveReplacesTheLink) {
  const Artifact saved{"test", "{}", {{"x", random_array(DType::uint8, {9}, 1)}}};
  store_.save("a", saved);
  const TemporaryDirectory hub;
  for (const auto& name : directory_.files()) {
    fs::create_symlink(directory_.file(name), hub.file(name));
  }
  const ArtifactStore linked(hub.path());
  EXPECT_TRUE(linked.load("a") == saved);
  linked.save("a", {"test", "{}", {}});
  EXPECT_TRUE(store_.load("a") == saved) << "the file behind the link was written";
}

TEST_F(Artifacts, ViewIsRowMajor) {
  const Array x = random_array(DType::int32, {2, 3, 4}, 1);
  const TensorView view = x.view();
  EXPECT_EQ(view.ndim, 3);
  EXPECT_EQ(view.nbytes(), 96);
  EXPECT_EQ(view.at(1, 2, 3), x.bytes.data() + 4 * 23);
  EXPECT_THROW((Array{DType::int32, {2}, {}}.view()), Error);
}

// What numpy 2.4 writes for zeros of these shapes.
TEST(Npy, HeadersAreNumpysByteForByte) {
  const auto golden = [](const char* dict) {
    std::string text = dict;
    text.resize(117, ' ');
    return std::string("\x93NUMPY\x01\x00\x76\x00", 10) + text + "\n";
  };
  EXPECT_EQ(write_npy_header(DType::float32, {2, 3}),
            golden("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"));
  EXPECT_EQ(write_npy_header(DType::boolean, {7}),
            golden("{'descr': '|b1', 'fortran_order': False, 'shape': (7,), }"));
  EXPECT_EQ(write_npy_header(DType::bfloat16, {0, 5}),
            golden("{'descr': '<u2', 'fortran_order': False, 'shape': (0, 5), }"));
  EXPECT_EQ(write_npy_header(DType::uint8, {100000, 1, 1, 1, 1, 1}),
            golden("{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 1, 1, 1, 1, 1), }"));
  EXPECT_EQ(write_npy_header(DType::int32, {}),
            std::string("\x93NUMPY\x01\x00\x76\x00", 10) +
                "{'descr': '<i4', 'fortran_order': False, 'shape': (), }" + std::string(62, ' ') +
                "\n");
}

TEST(Npy, ReadsAnyOrderOfKeysAndSpacing) {
  const std::string dict = "{\"shape\":( 2,3,),'fortran_order' : False,'descr':'<f2'}\n";
  const std::string text =
      std::string("\x93NUMPY\x01\x00", 8) + static_cast<char>(dict.size()) + '\0' + dict;
  const NpyHeader header = read_npy_header(text, "test");
  EXPECT_EQ(header.dtype, DType::float16);
  EXPECT_THAT(header.shape, ElementsAre(2, 3));
  EXPECT_EQ(header.data_offset, text.size());
}

// A child saves two versions in turn, for ever; it is killed at a random moment. What is loaded
// must be one of the two, whole.
TEST_F(Artifacts, KilledSavesLeaveTheOldOrTheNewVersion) {
  const auto version = [](unsigned v) {
    Artifact artifact{"test", "{\"version\":" + std::to_string(v) + "}", {}};
    for (const char* name : {"keys", "values", "lambda"}) {
      artifact.arrays[name] = random_array(DType::float16, {20000 + 3 * v}, v);
    }
    return artifact;
  };
  const Artifact versions[2] = {version(0), version(1)};
  // Kills fall within the first few saves, however slow the disk and the build are.
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 4; ++i) store_.save("a", versions[i % 2]);
  const auto four_saves = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - start);
  std::mt19937 random(7);
  int seen[2] = {0, 0};
  for (int round = 0; round < 200; ++round) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (unsigned i = round;; ++i) store_.save("a", versions[i % 2]);
    }
    usleep(static_cast<useconds_t>(random() % (2 * four_saves.count())));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const Artifact loaded = store_.load("a");
    const int which = loaded == versions[0] ? 0 : 1;
    ASSERT_TRUE(loaded == versions[which]) << "round " << round;
    ++seen[which];
  }
  EXPECT_GT(seen[0], 0);
  EXPECT_GT(seen[1], 0);
  store_.save("a", versions[0]);
  EXPECT_EQ(directory_.files().size(), 4u) << "leftovers of the killed saves";
}

TEST_F(Artifacts, LoadersNeverSeeAHalfReplacedArtifact) {
  const auto version = [](unsigned v) {
    return Artifact{"test", "{}", {{"x", random_array(DType::uint8, {5000}, v)}}};
  };
  const Artifact versions[2] = {version(0), version(1)};
  store_.save("a", versions[0]);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    for (unsigned i = 0;; ++i) store_.save("a", versions[i % 2]);
  }
  for (int i = 0; i < 500; ++i) {
    Artifact loaded;
    EXPECT_NO_THROW(loaded = store_.load("a"));
    EXPECT_TRUE(loaded == versions[0] || loaded == versions[1]);
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace veloxquant
