// What a connection's bytes go through: TCP, with or without TLS. A stream in the sense of Asio and
// Beast; one reading and one writing operation may be under way, on the socket's executor.
#pragma once

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <optional>
#include <utility>

namespace relay::server {

class Transport {
 public:
  using Socket = boost::asio::ip::tcp::socket;
  using executor_type = Socket::executor_type;

  /// tls: null for none; outlives this.
  Transport(Socket socket, boost::asio::ssl::context* tls) : socket_(std::move(socket)) {
    if (tls != nullptr) tls_.emplace(socket_, *tls);
  }

  executor_type get_executor() { return socket_.get_executor(); }
  Socket& socket() { return socket_; }

  template <typename Buffers, typename Token>
  auto async_read_some(const Buffers& buffers, Token&& token) {
    if (tls_) return tls_->async_read_some(buffers, std::forward<Token>(token));
    return socket_.async_read_some(buffers, std::forward<Token>(token));
  }
  template <typename Buffers, typename Token>
  auto async_write_some(const Buffers& buffers, Token&& token) {
    if (tls_) return tls_->async_write_some(buffers, std::forward<Token>(token));
    return socket_.async_write_some(buffers, std::forward<Token>(token));
  }

  /// Before anything else is read or written.
  boost::asio::awaitable<boost::system::error_code> handshake() {
    if (!tls_) co_return boost::system::error_code();
    const auto [error] =
        co_await tls_->async_handshake(boost::asio::ssl::stream_base::server, kUse);
    co_return error;
  }
  /// Says that nothing more is sent. With TLS it also waits for the other side to say so, or to
  /// send something else.
  boost::asio::awaitable<void> end_sending() {
    if (tls_) co_await tls_->async_shutdown(kUse);
    boost::system::error_code ignored;
    socket_.shutdown(Socket::shutdown_send, ignored);
  }

 private:
  static constexpr auto kUse = boost::asio::as_tuple(boost::asio::use_awaitable);

  Socket socket_;
  std::optional<boost::asio::ssl::stream<Socket&>> tls_;
};

}  // namespace relay::server
