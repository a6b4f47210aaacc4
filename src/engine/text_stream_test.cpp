#include "engine/text_stream.h"

#include <gtest/gtest.h>

#include <random>

#include "engine/sha256.h"

namespace relay::engine {
namespace {

TEST(TextStream, HoldsBackPartsOfCharacters) {
  TextStream stream;
  EXPECT_EQ(stream.push("a\xE2\x82"), "a");
  EXPECT_EQ(stream.push("\xAC"), "\xE2\x82\xAC");
  EXPECT_EQ(stream.push("\xF0\x9F"), "");
  EXPECT_EQ(stream.finish(), "\xEF\xBF\xBD\xEF\xBF\xBD") << "cut off for good";
}

TEST(TextStream, ReplacesWhatIsNoUtf8) {
  EXPECT_EQ(sanitize_utf8("a\x80z"), "a\xEF\xBF\xBDz");
  EXPECT_EQ(sanitize_utf8("\xC0\xAF"), "\xEF\xBF\xBD\xEF\xBF\xBD") << "overlong";
  EXPECT_EQ(sanitize_utf8("\xED\xA0\x80").find("\xED"), std::string::npos) << "surrogate";
  EXPECT_EQ(sanitize_utf8("\xF4\x90\x80\x80").find("\xF4"), std::string::npos) << "beyond Unicode";
}

TEST(TextStream, AStopStringNeverLeaks) {
  TextStream stream({"END", "\n\n"});
  EXPECT_EQ(stream.push("go E"), "go ");
  EXPECT_EQ(stream.push("N"), "");
  EXPECT_EQ(stream.push("E"), "EN") << "only the new E may still become one";
  EXPECT_EQ(stream.push("NDless"), "");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.stop_string(), "END");
  EXPECT_EQ(stream.push("more"), "");
}

TEST(TextStream, TheEarliestStopWins) {
  TextStream stream({"zz", "b"});
  EXPECT_EQ(stream.push("abzz"), "a");
  EXPECT_EQ(stream.stop_string(), "b");
}

TEST(TextStream, AnyCuttingGivesTheSameText) {
  const std::string whole = "caf\xC3\xA9 \xE2\x82\xAC STO ST STOPPED \xF0\x9F\x98\x80";
  std::mt19937 random(7);
  for (int round = 0; round < 500; ++round) {
    TextStream plain;
    TextStream stopping({"STOP"});
    std::string a;
    std::string b;
    for (size_t at = 0; at < whole.size();) {
      const size_t n = 1 + random() % 5;
      a += plain.push(whole.substr(at, n));
      b += stopping.push(whole.substr(at, n));
      at += n;
    }
    a += plain.finish();
    EXPECT_EQ(a, whole);
    EXPECT_EQ(b, whole.substr(0, whole.find("STOP")));
    EXPECT_TRUE(stopping.stopped());
  }
}

TEST(Sha256, KnownVectors) {
  const auto hash = [](const std::string& s) {
    return sha256_hex({reinterpret_cast<const uint8_t*>(s.data()), s.size()});
  };
  EXPECT_EQ(hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(hash(std::string(1000000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

}  // namespace
}  // namespace relay::engine
