// Bodies that a client sent compressed.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace relay::server {

/// The content of a gzip file (of one member, as clients write them). Throws ApiError: 413 for more
/// than `max_bytes` of it, 400 for what is no gzip file or was damaged.
std::string gunzip(std::string_view data, size_t max_bytes);

}  // namespace relay::server
