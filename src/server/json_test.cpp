#include "server/json.h"

#include <gtest/gtest.h>

#include "base/utf8.h"
#include "server/errors.h"

namespace relay::server {
namespace {

std::string message_of(std::string_view text) {
  try {
    parse_json(text);
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status(), 400);
    EXPECT_EQ(error.code(), "invalid_json");
    return error.what();
  }
  return "(parsed)";
}

TEST(Json, NamesTheByteAtFault) {
  EXPECT_NE(message_of(R"({"a": tru})").find("byte 9"), std::string::npos)
      << message_of(R"({"a": tru})");
  EXPECT_NE(message_of(R"({"a": 1)").find("unexpected end at byte 7"), std::string::npos)
      << message_of(R"({"a": 1)");
  EXPECT_NE(message_of("").find("byte 0"), std::string::npos);
  EXPECT_NE(message_of(std::string_view("{}\0 x", 5)).find("byte 2"), std::string::npos);
  EXPECT_NE(message_of("{} x").find("byte 3"), std::string::npos) << message_of("{} x");
}

TEST(Json, RefusesWhatWouldHurtLater) {
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  EXPECT_NE(message_of(deep).find("nested deeper than 64"), std::string::npos);
  EXPECT_NE(message_of("\"\xff\""), "(parsed)");
  EXPECT_NE(message_of("\"\\ud800\""), "(parsed)");
  EXPECT_NE(message_of("1e999"), "(parsed)");
  EXPECT_EQ(message_of(std::string(64, '[') + std::string(64, ']')), "(parsed)");
  EXPECT_EQ(message_of(R"("[[[[\"[[[[")"), "(parsed)");  // brackets in strings do not nest
}

std::string object_of(int members) {
  std::string text = "{";
  for (int i = 0; i < members; ++i) {
    text += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":[]";
  }
  return text + "}";
}

TEST(Json, RefusesObjectsThatTakeForEver) {
  EXPECT_EQ(message_of(object_of(5'000)), "(parsed)");
  EXPECT_NE(message_of(object_of(1'000'000)).find("too many members"), std::string::npos);
  std::string many = "[0";
  for (int i = 0; i < 1'000; ++i) many += "," + object_of(3'000);
  EXPECT_NE(message_of(many + "]").find("too many members"), std::string::npos);
  // Each object has its own: those of a list do not add up to a large one.
  std::string small = "[0";
  for (int i = 0; i < 100'000; ++i) small += "," + object_of(3);
  EXPECT_EQ(message_of(small + "]"), "(parsed)");
}

TEST(Json, Utf8) {
  for (const char* good : {"", "abc", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"}) {
    EXPECT_TRUE(is_valid_utf8(good)) << good;
  }
  for (const char* bad : {"\x80", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xc0\x80", "\xe0\x80\x80",
                          "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff", "a\xc3z"}) {
    EXPECT_FALSE(is_valid_utf8(bad));
  }
}

TEST(Json, LinesAreAscii) {
  const Json value{{"a", "x\u2028y\u0085\n\xff"}};
  const std::string line = dump_line(value);
  EXPECT_EQ(line, R"({"a":"x\u2028y\u0085\n\ufffd"})");
}

TEST(Json, ErrorMessagesAreBoundedAtACharacter) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += "\xe2\x82\xac";
  const ApiError error = invalid_request("p", text);
  EXPECT_LE(std::string(error.what()).size(), 1024u);
  EXPECT_TRUE(is_valid_utf8(error.what()));
  const Json body = Json::parse(error.body());
  EXPECT_EQ(body["error"]["param"], "p");
  EXPECT_EQ(body["error"]["type"], "invalid_request_error");
  EXPECT_TRUE(body["error"]["code"].is_string());
}

}  // namespace
}  // namespace relay::server
