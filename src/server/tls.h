// The server's certificate and key.
#pragma once

#include <boost/asio/ssl/context.hpp>
#include <memory>
#include <string>

namespace relay::server {

/// TLS 1.2 and newer with the certificate (PEM, its chain behind it) and its key (PEM, not
/// encrypted). Throws Error, saying which file is wrong and how.
std::unique_ptr<boost::asio::ssl::context> make_tls_context(const std::string& certificate_file,
                                                            const std::string& key_file);

}  // namespace relay::server
