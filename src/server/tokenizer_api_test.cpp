#include "server/tokenizer_api.h"

#include <gtest/gtest.h>

#include "server/errors.h"
#include "server/fake_engine.h"

namespace relay::server {
namespace {

const RequestLimits kLimits{.vocab_size = 256};

Json ask(const std::string& body) {
  FakeEngine engine({});  // bytes are tokens
  return tokenize_json(engine, parse_tokenize(body, kLimits));
}

TEST(Tokenize, InEachForm) {
  EXPECT_EQ(ask(R"({"content":"hi"})"), (Json{{"tokens", {104, 105}}}));
  EXPECT_EQ(ask(R"({"content":"h","with_pieces":true})"),
            (Json{{"tokens", Json::array({{{"id", 104}, {"piece", "h"}}})}}));
  const Json half = ask(R"({"content":"é","with_pieces":true})");
  EXPECT_EQ(half["tokens"][0]["piece"], Json::array({0xc3})) << "part of a character";
  const Json prompt = ask(R"({"prompt":"hi","return_token_strs":true})");
  EXPECT_EQ(prompt["count"], 2);
  EXPECT_EQ(prompt["max_model_len"], 1000);
  EXPECT_EQ(prompt["token_strs"], (Json{"h", "i"}));
  EXPECT_TRUE(ask(R"({"prompt":"hi"})")["token_strs"].is_null());
  EXPECT_GT(ask(R"({"messages":[{"role":"user","content":"hi"}]})")["count"], 10);
}

TEST(Tokenize, Refuses) {
  EXPECT_THROW(parse_tokenize("{}", kLimits), ApiError);
  EXPECT_THROW(parse_tokenize(R"({"content":7})", kLimits), ApiError);
  EXPECT_THROW(parse_tokenize(R"({"messages":[]})", kLimits), ApiError);
  EXPECT_THROW(parse_detokenize("{}", kLimits), ApiError);
  EXPECT_THROW(parse_detokenize(R"({"tokens":[256]})", kLimits), ApiError);
  EXPECT_THROW(parse_detokenize(R"({"tokens":["a"]})", kLimits), ApiError);
  EXPECT_EQ(parse_detokenize(R"({"tokens":[1,2]})", kLimits).tokens.size(), 2u);
  RequestLimits short_lists = kLimits;
  short_lists.max_tokens = 2;
  EXPECT_NO_THROW(parse_detokenize(R"({"tokens":[1,2]})", short_lists));
  EXPECT_THROW(parse_detokenize(R"({"tokens":[1,2,3]})", short_lists), ApiError);
}

}  // namespace
}  // namespace relay::server
