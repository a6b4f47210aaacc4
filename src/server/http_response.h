// What answers look like on the wire: Beast's messages with the header fields that all share.
#pragma once

#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/string_body.hpp>
#include <string>

#include "server/service.h"

namespace relay::server {

boost::beast::http::response<boost::beast::http::string_body> whole_response(
    Answer answer, const std::string& request_id, bool keep_alive);

/// The header before a stream of events; an unchunked one ends with the connection (HTTP/1.0).
boost::beast::http::response<boost::beast::http::empty_body> stream_response(
    const std::string& request_id, bool keep_alive, bool chunked);

}  // namespace relay::server
