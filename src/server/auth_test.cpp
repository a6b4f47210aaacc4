#include "server/auth.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

#include "relay/types.h"

namespace relay::server {
namespace {

TEST(Auth, ConstantTimeComparisonIsAComparison) {
  EXPECT_TRUE(equal_constant_time("secret", "secret"));
  for (const char* wrong : {"", "s", "secre", "secrets", "Secret", "secreT", "secretsecret"}) {
    EXPECT_FALSE(equal_constant_time(wrong, "secret")) << wrong;
  }
  EXPECT_FALSE(equal_constant_time("", ""));  // an empty secret opens nothing
}

TEST(Auth, OpenWithoutKeys) {
  const KeyRing ring;
  const Caller caller = ring.identify("", "");
  EXPECT_TRUE(caller.allowed);
  EXPECT_FALSE(caller.admin);
  EXPECT_EQ(caller.salt, "");
}

TEST(Auth, KeysAdminsAndSalts) {
  const KeyRing ring({"alpha", "beta"}, {"root"});
  EXPECT_FALSE(ring.identify("", "").allowed);
  EXPECT_FALSE(ring.identify("Bearer gamma", "").allowed);
  EXPECT_FALSE(ring.identify("Basic alpha", "").allowed);
  EXPECT_TRUE(ring.identify("Bearer alpha", "").allowed);
  EXPECT_TRUE(ring.identify("bearer  beta ", "").allowed);
  EXPECT_TRUE(ring.identify("", "beta").allowed);
  EXPECT_FALSE(ring.identify("Bearer alpha", "").admin);
  EXPECT_TRUE(ring.identify("Bearer root", "").admin);
  EXPECT_TRUE(ring.identify("Bearer root", "").allowed);
  EXPECT_NE(ring.identify("Bearer alpha", "").salt, ring.identify("Bearer beta", "").salt);
  EXPECT_EQ(KeyRing({"new", "beta", "alpha"}, {}).identify("Bearer alpha", "").salt,
            ring.identify("Bearer alpha", "").salt)
      << "what is on disk is still for the same key when the list has changed";
  EXPECT_EQ(ring.identify("Bearer alpha", "").salt.find("alpha"), std::string::npos);
}

TEST(Auth, AdminKeyAloneLeavesTheRestOpen) {
  const KeyRing ring({}, {"root"});
  EXPECT_TRUE(ring.identify("", "").allowed);
  EXPECT_FALSE(ring.identify("", "").admin);
}

TEST(Auth, KeyFile) {
  const std::string path = testing::TempDir() + "relay_keys.txt";
  std::ofstream(path) << "# keys\n\n  one \r\ntwo\n";
  EXPECT_EQ(read_key_file(path), (std::vector<std::string>{"one", "two"}));
  std::ofstream(path) << "# none\n";
  EXPECT_THROW(read_key_file(path), Error);
  std::remove(path.c_str());
  EXPECT_THROW(read_key_file(path), Error);
}

}  // namespace
}  // namespace relay::server
