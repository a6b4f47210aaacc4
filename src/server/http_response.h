// What answers look like on the wire: Beast's messages with the header fields that all share.
#pragma once

#include <boost/beast/http/message.hpp>
#include <boost/beast/http/string_body.hpp>
#include <string>
#include <utility>
#include <vector>

#include "server/service.h"

namespace relay::server {

using HeaderFields = std::vector<std::pair<std::string, std::string>>;

boost::beast::http::response<boost::beast::http::string_body> whole_response(
    Answer answer, const std::string& request_id, bool keep_alive);

// Pieces of a stream of events, as bytes: a header goes out together with the first events.

/// The header; a stream that is not chunked ends with the connection (HTTP/1.0).
std::string stream_head(const std::string& request_id, bool keep_alive, bool chunked,
                        const HeaderFields& more);
std::string chunk(const std::string& data);
std::string last_chunk();

}  // namespace relay::server
