#include "server/gzip.h"

#include <algorithm>
#include <boost/beast/zlib/inflate_stream.hpp>
#include <boost/crc.hpp>
#include <cstdint>

#include "server/errors.h"

namespace relay::server {

namespace zlib = boost::beast::zlib;

namespace {

[[noreturn]] void damaged() {
  throw invalid_request("", "The body is not valid gzip data.", "invalid_content_encoding");
}

uint32_t little_endian(std::string_view bytes) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value |= uint32_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  return value;
}

/// Bytes of the header of a member (RFC 1952).
size_t header_size(std::string_view data) {
  constexpr size_t kFixed = 10;
  if (data.size() < kFixed || data.substr(0, 3) != "\x1f\x8b\x08") damaged();
  const auto flags = static_cast<unsigned char>(data[3]);
  if ((flags & 0xE0) != 0) damaged();
  size_t at = kFixed;
  const auto skip = [&](size_t bytes) {
    if (bytes > data.size() - at) damaged();
    at += bytes;
  };
  if ((flags & 4) != 0) {  // extra field
    skip(2);
    skip(static_cast<unsigned char>(data[at - 2]) | size_t{static_cast<unsigned char>(data[at - 1])}
                                                        << 8);
  }
  for (const int text : {8, 16}) {  // name, comment
    if ((flags & text) == 0) continue;
    const size_t end = data.find('\0', at);
    if (end == std::string_view::npos) damaged();
    at = end + 1;
  }
  if ((flags & 2) != 0) skip(2);  // checksum of the header
  return at;
}

}  // namespace

std::string gunzip(std::string_view data, size_t max_bytes) {
  constexpr size_t kTrailer = 8;  // checksum and length of the content
  data.remove_prefix(header_size(data));
  if (data.size() < kTrailer) damaged();
  const std::string_view trailer = data.substr(data.size() - kTrailer);
  data.remove_suffix(kTrailer);

  std::string content;
  zlib::inflate_stream stream;
  zlib::z_params params;
  params.next_in = data.data();
  params.avail_in = data.size();
  for (bool over = false; !over;) {
    const size_t done = content.size();
    if (done > max_bytes) throw payload_too_large(max_bytes);
    content.resize(std::min(max_bytes + 1, done + std::max<size_t>(done, 4096)));
    params.next_out = content.data() + done;
    params.avail_out = content.size() - done;
    const size_t left = params.avail_in;
    boost::system::error_code error;
    stream.write(params, zlib::Flush::sync, error);
    content.resize(content.size() - params.avail_out);
    // The end of the data is not always said; whether all is there the checksum tells.
    over =
        error == zlib::error::end_of_stream || (content.size() == done && params.avail_in == left);
    if (error && !over && error != zlib::error::need_buffers) damaged();
  }
  if (content.size() > max_bytes) throw payload_too_large(max_bytes);
  boost::crc_32_type checksum;
  checksum.process_bytes(content.data(), content.size());
  if (little_endian(trailer) != checksum.checksum() ||
      little_endian(trailer.substr(4)) != static_cast<uint32_t>(content.size())) {
    damaged();
  }
  return content;
}

}  // namespace relay::server
