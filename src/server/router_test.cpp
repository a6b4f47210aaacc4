#include "server/router.h"

#include <gtest/gtest.h>

#include "server/errors.h"

namespace relay::server {
namespace {

int status_of(const char* method, const char* target) {
  try {
    find_route(method, target);
  } catch (const ApiError& error) {
    return error.status();
  }
  return 200;
}

TEST(Router, Finds) {
  EXPECT_EQ(find_route("GET", "/health").access, Access::kAnyone);
  EXPECT_EQ(find_route("GET", "/").endpoint, Endpoint::kPage);
  EXPECT_EQ(find_route("GET", "/state").access, Access::kOperator);
  EXPECT_EQ(find_route("GET", "/v1/models?x=1").endpoint, Endpoint::kModels);
  EXPECT_EQ(find_route("GET", "/v1/models/").endpoint, Endpoint::kModels);
  EXPECT_EQ(find_route("GET", "/v1/models/org%2Fname").argument, "org/name");
  EXPECT_EQ(find_route("GET", "/v1/models/a%zz%4").argument, "a%zz%4");
  EXPECT_TRUE(find_route("POST", "/v1/chat/completions").takes_body);
  EXPECT_EQ(find_route("POST", "/v1/messages").error_form, ErrorForm::kAnthropic);
  EXPECT_EQ(find_route("POST", "/v1/messages/count_tokens").endpoint, Endpoint::kCountTokens);
  EXPECT_EQ(find_route("GET", "/v1/responses/resp_1").endpoint, Endpoint::kStoredResponse);
  EXPECT_EQ(find_route("DELETE", "/v1/cached_prompts/cp_1").access, Access::kAdmin);
}

TEST(Router, Refuses) {
  EXPECT_EQ(status_of("GET", "/nothing"), 404);
  EXPECT_EQ(status_of("GET", "/v1/embeddings"), 405);
  EXPECT_EQ(status_of("POST", "/health"), 405);
  EXPECT_EQ(status_of("get", "/health"), 405);
  EXPECT_EQ(status_of("GET", ""), 400);
  EXPECT_EQ(status_of("GET", "health"), 400);
  EXPECT_EQ(status_of("GET", "http://example.org/health"), 400);
  try {
    find_route("PUT", "/v1/cached_prompts/cp_1");
    FAIL();
  } catch (const ApiError& error) {
    ASSERT_EQ(error.headers().size(), 1u);
    EXPECT_EQ(error.headers()[0].second, "GET, PATCH, DELETE");
  }
}

}  // namespace
}  // namespace relay::server
