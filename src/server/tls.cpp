#include "server/tls.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509err.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "relay/types.h"

namespace relay::server {

namespace ssl = boost::asio::ssl;

namespace {

void check_readable(const std::string& path, const char* what) {
  errno = 0;
  std::ifstream file(path);
  char first = 0;
  if (!file.get(first)) {
    throw Error(std::string(what) + " '" + path + "' " +
                (errno != 0 ? std::string("cannot be read: ") + std::strerror(errno) : "is empty"));
  }
}

}  // namespace

std::unique_ptr<ssl::context> make_tls_context(const std::string& certificate_file,
                                               const std::string& key_file) {
  const char* certificate = "the TLS certificate";
  const char* key = "the TLS key";
  check_readable(certificate_file, certificate);
  check_readable(key_file, key);
  auto context = std::make_unique<ssl::context>(ssl::context::tls_server);
  SSL_CTX_set_min_proto_version(context->native_handle(), TLS1_2_VERSION);
  context->set_options(ssl::context::default_workarounds | SSL_OP_NO_RENEGOTIATION);
  // Clients keep what resumes a session (tickets); nothing of it is kept here.
  SSL_CTX_set_session_cache_mode(context->native_handle(), SSL_SESS_CACHE_OFF);
  boost::system::error_code error;
  context->use_certificate_chain_file(certificate_file, error);
  if (error) {
    throw Error(std::string(certificate) + " '" + certificate_file +
                "' is no certificate in PEM (" + error.message() + ")");
  }
  // Without this OpenSSL would ask the terminal.
  bool encrypted = false;
  context->set_password_callback([&encrypted](size_t, ssl::context::password_purpose) {
    encrypted = true;
    return std::string();
  });
  context->use_private_key_file(key_file, ssl::context::pem, error);
  context->set_password_callback([](size_t, auto) { return std::string(); });
  if (encrypted) {
    throw Error(std::string(key) + " '" + key_file +
                "' is encrypted; give one without a password (openssl pkey -in KEY -out PLAIN)");
  }
  if (ERR_GET_LIB(error.value()) == ERR_LIB_X509 &&
      ERR_GET_REASON(error.value()) == X509_R_KEY_VALUES_MISMATCH) {
    throw Error(std::string(key) + " '" + key_file + "' does not belong to the certificate '" +
                certificate_file + "'");
  }
  if (error) {
    throw Error(std::string(key) + " '" + key_file + "' is no key in PEM (" + error.message() +
                ")");
  }
  return context;
}

}  // namespace relay::server
