#include "server/gzip.h"

#include <gtest/gtest.h>

#include <string>

#include "server/errors.h"

namespace relay::server {
namespace {

using namespace std::string_literals;

// Written by gzip.
const std::string kHello =
    "\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xcb\x48\xcd\xc9\xc9\x57"
    "\xc8\x40\x90\x00\x80\x88\xf9\xe5\x11\x00\x00\x00"
    ""s;
const std::string kNamed =
    "\x1f\x8b\x08\x08\x00\x00\x00\x00\x02\xff\x6e\x61\x6d\x65\x2e\x74"
    "\x78\x74\x00\xcb\x4b\xcc\x4d\x4d\x01\x00\x87\xcc\xe0\x71\x05\x00"
    "\x00\x00"
    ""s;

int status_of(const std::string& data, size_t max_bytes = 1000) {
  try {
    gunzip(data, max_bytes);
  } catch (const ApiError& error) {
    return error.status();
  }
  return 200;
}

TEST(Gzip, Reads) {
  EXPECT_EQ(gunzip(kHello, 1000), "hello hello hello");
  EXPECT_EQ(gunzip(kNamed, 1000), "named");
  EXPECT_EQ(gunzip(kHello, 17), "hello hello hello");
}

TEST(Gzip, ContentIsBounded) { EXPECT_EQ(status_of(kHello, 16), 413); }

TEST(Gzip, DamageIsAnError) {
  for (size_t length = 0; length < kNamed.size(); ++length) {
    EXPECT_EQ(status_of(kNamed.substr(0, length)), 400) << length;
  }
  for (size_t at = 0; at < kHello.size(); ++at) {
    for (const char flip : {'\x01', '\x10', '\x80'}) {
      std::string damaged = kHello;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      // The time and the system it was written on mean nothing, but the content is right.
      try {
        EXPECT_EQ(gunzip(damaged, 1000), "hello hello hello") << at;
      } catch (const ApiError& error) {
        EXPECT_EQ(error.status(), error.code() == "payload_too_large" ? 413 : 400) << at;
      }
    }
  }
  EXPECT_EQ(status_of(kHello + "x"), 400);
}

}  // namespace
}  // namespace relay::server
