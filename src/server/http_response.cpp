#include "server/http_response.h"

#include <boost/beast/core/buffers_to_string.hpp>
#include <boost/beast/http/chunk_encode.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/write.hpp>
#include <ctime>
#include <sstream>
#include <utility>

#include "base/unix_time.h"

namespace relay::server {

namespace http = boost::beast::http;

namespace {

std::string http_date() {
  const std::time_t now = unix_now();
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[64];
  const size_t length = std::strftime(text, sizeof(text), "%a, %d %b %Y %H:%M:%S GMT", &utc);
  return std::string(text, length);
}

void set_common_fields(http::fields& fields, const std::string& content_type,
                       const std::string& request_id, bool keep_alive) {
  fields.set(http::field::server, "relay");
  fields.set(http::field::date, http_date());
  fields.set(http::field::content_type, content_type);
  fields.set("x-request-id", request_id);
  fields.set(http::field::connection, keep_alive ? "keep-alive" : "close");
}

}  // namespace

http::response<http::string_body> whole_response(Answer answer, const std::string& request_id,
                                                 bool keep_alive) {
  http::response<http::string_body> response;
  response.result(static_cast<unsigned>(answer.status));
  set_common_fields(response, answer.content_type, request_id, keep_alive);
  for (const auto& [name, value] : answer.headers) response.insert(name, value);
  response.body() = std::move(answer.body);
  if (answer.status != 204) response.content_length(response.body().size());
  return response;
}

std::string stream_head(const std::string& request_id, bool keep_alive, bool chunked,
                        const HeaderFields& more) {
  http::response<http::empty_body> response;
  set_common_fields(response, "text/event-stream; charset=utf-8", request_id, keep_alive);
  response.set(http::field::cache_control, "no-cache");
  response.set("X-Accel-Buffering", "no");  // nginx would gather the events otherwise
  for (const auto& [name, value] : more) response.insert(name, value);
  if (chunked) response.chunked(true);
  std::ostringstream head;
  head << response.base();
  return head.str();
}

std::string chunk(const std::string& data) {
  return boost::beast::buffers_to_string(http::make_chunk(boost::asio::buffer(data)));
}

std::string last_chunk() { return boost::beast::buffers_to_string(http::make_chunk_last()); }

}  // namespace relay::server
