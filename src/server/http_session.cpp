#include "server/http_session.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/write.hpp>
#include <cctype>
#include <optional>
#include <tuple>

#include "server/gzip.h"
#include "server/json_log.h"

namespace relay::server {

// GCC 12 may destroy a temporary of a `co_await f(Temporary{...})` twice: what a coroutine is given
// has a name here.

namespace net = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

namespace {

constexpr auto kUse = net::as_tuple(net::use_awaitable);
/// What a client may send ahead while its answer is being made.
constexpr size_t kMaxAhead = 32 * 1024;
/// Of a request that is refused, a body up to this size is read all the same: it has arrived with
/// the header or nearly so, and the connection can go on.
constexpr size_t kMaxSmallBody = 64 * 1024;
constexpr size_t kMaxDiscarded = 64 * 1024 * 1024;
constexpr std::chrono::milliseconds kLingerTime{3000};
constexpr size_t kMaxRequestIdBytes = 256;

/// The client's id where it is fit for a header field, else one of ours.
std::string request_id_of(std::string_view given) {
  bool fit = !given.empty() && given.size() <= kMaxRequestIdBytes;
  for (const char c : given) fit = fit && c > ' ' && c < 0x7f;
  return fit ? std::string(given) : random_id("req_");
}

std::string_view view(boost::beast::string_view text) { return {text.data(), text.size()}; }

/// Whether the body is gzip data; throws for other encodings.
template <typename Request>
bool is_compressed(const Request& request) {
  const auto encoding = request[http::field::content_encoding];
  if (encoding.empty() || boost::beast::iequals(encoding, "identity")) return false;
  if (boost::beast::iequals(encoding, "gzip") || boost::beast::iequals(encoding, "x-gzip")) {
    return true;
  }
  throw ApiError(415, "invalid_request_error", "unsupported_content_encoding",
                 "Only the Content-Encoding gzip is understood.")
      .header("Accept-Encoding", "gzip");
}

/// What a page of this origin needs to read an answer; nothing if it is not allowed to.
HeaderFields cors_fields(const std::vector<std::string>& allowed, std::string_view origin) {
  const auto is = [&](const std::string& one) { return one == "*" || one == origin; };
  if (origin.empty() || std::none_of(allowed.begin(), allowed.end(), is)) return {};
  return {{"Access-Control-Allow-Origin", std::string(origin)},
          {"Access-Control-Expose-Headers", "x-request-id, retry-after"},
          {"Vary", "Origin"}};
}

/// Whether the page that asks is this server's own, on whatever name it was reached by. Browsers
/// say so themselves on HTTPS and on localhost, also where a proxy has changed Host.
template <typename Request>
bool is_own_page(const Request& request) {
  const std::string_view origin = view(request[http::field::origin]);
  const size_t scheme = origin.find("://");
  return view(request["Sec-Fetch-Site"]) == "same-origin" ||
         (scheme != std::string_view::npos &&
          boost::beast::iequals(origin.substr(scheme + 3), request[http::field::host]));
}

bool is_http_error(const error_code& error) {
  static const auto& category = http::make_error_code(http::error::bad_method).category();
  return error.category() == category;
}

}  // namespace

/// A request's body, and its share of the memory for bodies.
struct HttpSession::Body {
  explicit Body(Runtime& r) : runtime(r) {}
  ~Body() { runtime.release_body(reserved); }
  Body(const Body&) = delete;
  Body& operator=(const Body&) = delete;

  /// The share is `bytes` from now on. Throws ApiError 429 if there is not so much left.
  void reserve(size_t bytes) {
    if (bytes <= reserved) {
      runtime.release_body(reserved - bytes);
    } else if (!runtime.reserve_body(bytes - reserved)) {
      throw ApiError(429, "rate_limit_error", "rate_limit_exceeded",
                     "Too many large requests are being read.")
          .retry_after(1);
    }
    reserved = bytes;
  }
  void clear() {
    std::string().swap(text);
    reserve(0);
  }

  Runtime& runtime;
  std::string text;
  size_t reserved = 0;
};

template <typename Work>
HttpSession::Awaitable<std::invoke_result_t<Work&>> HttpSession::run_on(net::thread_pool& pool,
                                                                        Work& work) {
  std::optional<std::invoke_result_t<Work&>> result;
  std::exception_ptr failure;
  auto strand = net::bind_executor(transport_.get_executor(), net::use_awaitable);
  auto there = net::bind_executor(pool.get_executor(), net::use_awaitable);
  co_await net::post(there);
  try {
    result.emplace(work());
  } catch (...) {
    failure = std::current_exception();
  }
  co_await net::post(strand);
  if (failure) std::rethrow_exception(failure);
  co_return std::move(*result);
}

HttpSession::HttpSession(net::ip::tcp::socket socket, Runtime& runtime)
    : transport_(std::move(socket), runtime.tls.get()),
      runtime_(runtime),
      options_(runtime.service.options()),
      buffer_(options_.max_header_bytes + 2 * kMaxAhead),
      deadline_(transport_.get_executor()),
      notice_timer_(transport_.get_executor()) {}

HttpSession::~HttpSession() { runtime_.remove(this); }

void HttpSession::start() {
  runtime_.add(this, weak_from_this());
  net::co_spawn(
      transport_.get_executor(), [self = shared_from_this()] { return self->run(); },
      [self = shared_from_this()](const std::exception_ptr& failure) {
        self->disarm();
        self->close_socket();
        try {
          if (failure) std::rethrow_exception(failure);
        } catch (const std::exception& error) {
          spdlog::error("a connection failed: {}", error.what());
        }
      });
}

void HttpSession::close(bool at_once) {
  net::post(transport_.get_executor(), [self = shared_from_this(), at_once] {
    self->closing_ = true;
    if (!at_once && self->busy_) return;
    self->on_gone();
    self->close_socket();
    self->notify();
  });
}

void HttpSession::close_socket() {
  error_code ignored;
  transport_.socket().close(ignored);
}

HttpSession::Awaitable<void> HttpSession::run() {
  error_code ignored;
  transport_.socket().set_option(net::ip::tcp::no_delay(true), ignored);
  arm(options_.header_timeout, OnExpiry::kClose);
  const error_code failure = co_await transport_.handshake();
  disarm();
  if (failure) {
    spdlog::debug("a connection without a TLS handshake: {}", failure.message());
    co_return;
  }
  while (!closing_ && !gone_) {
    if (!co_await serve_one()) break;
  }
  if (!gone_) co_await linger();
}

HttpSession::Awaitable<bool> HttpSession::serve_one() {
  Parser parser;
  parser.header_limit(static_cast<uint32_t>(options_.max_header_bytes));
  parser.body_limit(boost::none);  // checked in read_body(), where it can be answered
  Exchange exchange;
  body_unread_ = false;

  struct Idle {
    HttpSession& session;
    ~Idle() {
      if (session.busy_) --session.runtime_.busy;
      session.busy_ = false;
    }
  } idle_at_end{*this};
  std::optional<ApiError> failure;
  try {
    if (!co_await read_header(parser, exchange)) co_return false;
    co_await handle(parser, exchange);
  } catch (const ApiError& error) {
    failure = error;
  } catch (const std::exception& error) {
    spdlog::error("{} {}: {} [{}]", exchange.method, exchange.target, error.what(),
                  exchange.request_id);
    failure = from_engine(engine::ErrorKind::kInternal, "The server failed on this request.");
  }
  disarm();
  co_await stop_watching();
  if (body_unread_) exchange.keep_alive = false;
  if (failure && !gone_ && !exchange.header_sent) {
    Answer answer = answer_error(*failure, exchange.error_form);
    co_await write_answer(std::move(answer), exchange);
  }
  log_exchange(exchange);
  co_return exchange.keep_alive && !gone_;
}

void HttpSession::log_exchange(const Exchange& exchange) const {
  const std::chrono::duration<double, std::milli> took = Clock::now() - exchange.begin;
  const bool is_probe = exchange.target == "/health";  // 503 is what it says until all is loaded
  const auto level = gone_                                 ? spdlog::level::info
                     : exchange.status >= 500 && !is_probe ? spdlog::level::warn
                                                           : spdlog::level::debug;
  if (!spdlog::should_log(level)) return;
  if (options_.json_logs) {
    log_json(level, Json{{"message", gone_ ? "client left" : "request"},
                         {"request_id", exchange.request_id},
                         {"method", exchange.method},
                         {"path", exchange.target},
                         {"status", gone_ ? Json(nullptr) : Json(exchange.status)},
                         {"duration_ms", took.count()}});
  } else if (gone_) {
    spdlog::log(level, "{} {} client left after {:.0f} ms [{}]", exchange.method, exchange.target,
                took.count(), exchange.request_id);
  } else {
    spdlog::log(level, "{} {} {} {:.0f} ms [{}]", exchange.method, exchange.target, exchange.status,
                took.count(), exchange.request_id);
  }
}

std::optional<Answer> HttpSession::preflight(const Parser& parser, const Exchange& exchange) const {
  const auto& request = parser.get();
  const auto method = request[http::field::access_control_request_method];
  if (exchange.method != "OPTIONS" || method.empty() || exchange.cors.empty()) return std::nullopt;
  // Clients send header fields of their own (x-stainless-..., anthropic-version); all may come.
  std::string wanted(view(request[http::field::access_control_request_headers]));
  const auto unfit = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '-' && c != '_' && c != ',' &&
           c != ' ';
  };
  if (std::any_of(wanted.begin(), wanted.end(), unfit)) wanted.clear();
  Answer answer;
  answer.status = 204;
  answer.headers = {{"Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE"},
                    {"Access-Control-Allow-Headers", wanted},
                    {"Access-Control-Max-Age", "600"}};
  return answer;
}

HttpSession::Awaitable<bool> HttpSession::read_header(Parser& parser, Exchange& exchange) {
  if (buffer_.size() == 0) {
    arm(options_.idle_timeout, OnExpiry::kClose);
    const auto [error, count] = co_await transport_.async_read_some(buffer_.prepare(4096), kUse);
    if (error) co_return false;
    buffer_.commit(count);
  }
  exchange.begin = Clock::now();
  exchange.request_id = random_id("req_");
  exchange.keep_alive = false;  // until the header is known to be in order
  busy_ = true;
  ++runtime_.busy;
  arm(options_.header_timeout, OnExpiry::kStopReading);
  const auto [error, count] = co_await http::async_read_header(transport_, buffer_, parser, kUse);
  disarm();
  if (deadline_expired_) {
    throw ApiError(408, "invalid_request_error", "request_timeout",
                   "The request's header did not arrive in time.");
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    throw ApiError(431, "invalid_request_error", "header_too_large",
                   "The request's header is larger than " +
                       std::to_string(options_.max_header_bytes) + " bytes.");
  }
  if (error == http::error::end_of_stream || error == http::error::partial_message) {
    gone_ = true;
    co_return false;
  }
  if (is_http_error(error)) {
    throw invalid_request("", "This is not a valid HTTP/1.1 request: " + error.message() + ".",
                          "invalid_http");
  }
  if (error) {
    gone_ = true;
    co_return false;
  }

  const auto& request = parser.get();
  exchange.method = std::string(view(request.method_string()));
  exchange.target = std::string(view(request.target()).substr(0, 256));
  exchange.http_1_0 = request.version() < 11;
  exchange.request_id = request_id_of(view(request["x-request-id"]));
  exchange.keep_alive = parser.keep_alive();
  exchange.cors = cors_fields(options_.cors_origins, view(request[http::field::origin]));
  co_return true;
}

HttpSession::Awaitable<void> HttpSession::handle(Parser& parser, Exchange& exchange) {
  const auto& request = parser.get();
  // Everything that can be said without the body is said before it is read.
  body_unread_ = !parser.is_done();
  if (request.target().size() > options_.max_target_bytes) {
    throw ApiError(414, "invalid_request_error", "uri_too_long",
                   "The request target is longer than " +
                       std::to_string(options_.max_target_bytes) + " bytes.");
  }
  if (std::optional<Answer> allowed = preflight(parser, exchange)) {
    body_unread_ = !parser.is_done();
    co_await write_answer(std::move(*allowed), exchange);
    co_return;
  }
  const Route route = find_route(exchange.method, view(request.target()));
  exchange.error_form = route.error_form;
  if (!request[http::field::origin].empty() && exchange.cors.empty() && !is_own_page(request)) {
    // To hide the answer from that page is not enough: to ask may cost minutes of computing.
    throw ApiError(403, "invalid_request_error", "origin_not_allowed",
                   "Pages of this origin may not use this server; --cors-origin allows them.");
  }
  const Caller caller = runtime_.service.authorize(route, view(request[http::field::authorization]),
                                                   view(request["x-api-key"]));
  if (route.takes_body) runtime_.service.require_ready();

  const bool compressed = is_compressed(request);
  if (parser.content_length().value_or(0) > options_.max_body_bytes) {
    throw payload_too_large(options_.max_body_bytes);
  }
  if (route.work == Work::kGeneration && parser.content_length().value_or(0) > kMaxSmallBody) {
    runtime_.service.require_room();
  }
  Body body(runtime_);
  if (!parser.is_done()) {
    co_await read_body(parser, body, exchange);
    if (gone_) co_return;
  }
  body_unread_ = false;
  body.text = std::move(parser.get().body());
  if (compressed) {
    body.reserve(body.text.size() + options_.max_body_bytes);
    const auto unpack = [&] { return gunzip(body.text, options_.max_body_bytes); };
    body.text = co_await run_on(runtime_.workers, unpack);
    body.reserve(body.text.size());
  }
  if (route.work == Work::kGeneration) {
    co_await answer_generation(route.endpoint, body, caller, exchange);
  } else {
    co_await answer_plain(route, body.text, caller, exchange);
  }
}

HttpSession::Awaitable<void> HttpSession::read_body(Parser& parser, Body& body,
                                                    Exchange& exchange) {
  parser.body_limit(options_.max_body_bytes);
  const auto expect = parser.get()[http::field::expect];
  if (!expect.empty()) {
    if (!boost::beast::iequals(expect, "100-continue")) {
      throw ApiError(417, "invalid_request_error", "expectation_failed",
                     "Only Expect: 100-continue is understood.");
    }
    if (!exchange.http_1_0) {
      const http::response<http::empty_body> go_on(http::status::continue_, 11);
      begin_write(0);
      const auto [error, count] = co_await http::async_write(transport_, go_on, kUse);
      end_write(error);
      if (gone_) co_return;
    }
  }
  const size_t length = parser.content_length().value_or(options_.max_body_bytes);
  arm(with_rate(options_.body_timeout, length), OnExpiry::kStopReading);
  error_code error;
  while (!error && !parser.is_done()) {
    size_t count = 0;
    std::tie(error, count) = co_await http::async_read_some(transport_, buffer_, parser, kUse);
    body.reserve(parser.get().body().size());
  }
  disarm();
  if (deadline_expired_) {
    throw ApiError(408, "invalid_request_error", "request_timeout",
                   "The request's body did not arrive in time.");
  }
  if (error == http::error::body_limit) throw payload_too_large(options_.max_body_bytes);
  if (error == http::error::partial_message) {
    gone_ = true;
    co_return;
  }
  if (is_http_error(error)) {
    throw invalid_request("", "The request's body is malformed: " + error.message() + ".",
                          "invalid_http");
  }
  if (error) gone_ = true;
}

HttpSession::Awaitable<void> HttpSession::answer_plain(const Route& route, const std::string& body,
                                                       const Caller& caller, Exchange& exchange) {
  Answer answer;
  const auto work = [&] { return runtime_.service.answer(route, body, caller); };
  if (route.work == Work::kHere) {
    answer = work();
  } else {
    // Pinning computes for as long as the prompt is; it goes on if the client leaves.
    net::thread_pool& pool = route.work == Work::kPinner   ? runtime_.pinners
                             : route.work == Work::kWaiter ? runtime_.waiters
                                                           : runtime_.workers;
    answer = co_await run_on(pool, work);
  }
  co_await write_answer(std::move(answer), exchange);
}

HttpSession::Awaitable<void> HttpSession::answer_generation(Endpoint endpoint, Body& body,
                                                            const Caller& caller,
                                                            Exchange& exchange) {
  auto wake = [weak = weak_from_this(), executor = transport_.get_executor()] {
    net::post(executor, [weak] {
      const auto self = weak.lock();
      if (self == nullptr) return;
      self->cut_off_slow_reader();
      self->notify();
    });
  };

  std::optional<Service::Place> place(std::in_place, runtime_.service);
  start_watching();
  const auto begin = [&] {
    auto generation = runtime_.service.generate(endpoint, body.text, caller, wake);
    place.reset();  // the engine counts it now
    return generation;
  };
  const std::unique_ptr<Generation> generation = co_await run_on(runtime_.workers, begin);
  body.clear();
  if (gone_) co_return;  // ~Generation cancels

  struct Current {
    Generation*& slot;
    ~Current() { slot = nullptr; }
  } current{generation_};
  generation_ = generation.get();
  cut_off_slow_reader();  // the one wake that tells of an overflow may have come before
  co_await follow(*generation, exchange);
}

HttpSession::Awaitable<void> HttpSession::follow(Generation& generation, Exchange& exchange) {
  if (generation.stream()) {
    co_await follow_stream(generation, exchange);
    co_return;
  }
  std::string unused;
  for (;;) {
    const Generation::State state = generation.advance(unused);
    if (gone_) co_return;
    if (state == Generation::State::kFailed) throw generation.error();
    if (state == Generation::State::kDone) break;
    co_await wait_for_notice();
  }
  Answer answer;
  answer.body = generation.body();
  co_await write_answer(std::move(answer), exchange);
}

HttpSession::Awaitable<void> HttpSession::follow_stream(Generation& generation,
                                                        Exchange& exchange) {
  Clock::time_point next_sign = Clock::now() + options_.first_byte_delay;
  for (;;) {
    std::string frames;
    const Generation::State state = generation.advance(frames);
    if (gone_) co_return;
    if (state == Generation::State::kFailed) {
      if (!exchange.header_sent && frames.empty()) throw generation.error();
      frames += generation.error_frame();
      exchange.keep_alive = false;
    }
    const bool running = state == Generation::State::kRunning;
    if (running && frames.empty()) {
      if (Clock::now() < next_sign) {
        co_await wait_for_notice(next_sign);
        continue;
      }
      frames = kKeepAliveFrame;
    }
    std::string out;
    if (!exchange.header_sent) out = stream_header(exchange);
    out += exchange.http_1_0 ? frames : chunk(frames);
    if (!running && !exchange.http_1_0) out += last_chunk();
    // For the log: the header came too early to tell.
    if (state == Generation::State::kFailed) exchange.status = generation.error().status();
    begin_write(out.size());
    const auto bytes = net::buffer(out);
    const auto [error, count] = co_await net::async_write(transport_, bytes, kUse);
    end_write(error);
    if (!running || gone_) co_return;
    next_sign = Clock::now() + options_.keep_alive_interval;
  }
}

std::string HttpSession::stream_header(Exchange& exchange) {
  exchange.header_sent = true;
  exchange.status = 200;
  if (exchange.http_1_0 || runtime_.service.draining()) exchange.keep_alive = false;
  return stream_head(exchange.request_id, exchange.keep_alive, /*chunked=*/!exchange.http_1_0,
                     exchange.cors);
}

HttpSession::Awaitable<void> HttpSession::write_answer(Answer answer, Exchange& exchange) {
  exchange.header_sent = true;
  exchange.status = answer.status;
  if (body_unread_ || closing_ || runtime_.service.draining()) exchange.keep_alive = false;
  answer.headers.insert(answer.headers.end(), exchange.cors.begin(), exchange.cors.end());
  const auto response = whole_response(std::move(answer), exchange.request_id, exchange.keep_alive);
  http::response_serializer<http::string_body> serializer(response);
  error_code failure;
  if (exchange.method == "HEAD") {
    begin_write(0);
    const auto [error, count] = co_await http::async_write_header(transport_, serializer, kUse);
    failure = error;
  } else {
    begin_write(response.body().size());
    const auto [error, count] = co_await http::async_write(transport_, serializer, kUse);
    failure = error;
  }
  end_write(failure);
}

void HttpSession::begin_write(size_t bytes) {
  arm(with_rate(options_.write_timeout, bytes), OnExpiry::kClose);
}

void HttpSession::end_write(const error_code& error) {
  disarm();
  if (error) on_gone();
}

HttpSession::Awaitable<void> HttpSession::linger() {
  if (!transport_.socket().is_open()) co_return;
  arm(kLingerTime, OnExpiry::kClose);
  co_await transport_.end_sending();
  buffer_.clear();
  for (size_t discarded = 0; discarded < kMaxDiscarded;) {
    // With TLS this is noise, but nobody looks at it.
    auto& socket = transport_.socket();
    const auto [error, count] = co_await socket.async_read_some(buffer_.prepare(16384), kUse);
    if (error) break;
    discarded += count;
  }
  disarm();
}

void HttpSession::start_watching() {
  watching_ = true;
  watch();
}

void HttpSession::watch() {
  if (buffer_.size() >= kMaxAhead) return;  // then only a failing write tells
  watch_idle_ = false;
  transport_.async_read_some(
      buffer_.prepare(4096),
      net::bind_cancellation_slot(
          watch_cancel_.slot(), [self = shared_from_this()](const error_code& error, size_t count) {
            self->buffer_.commit(count);
            self->watch_idle_ = true;
            if (error && error != net::error::operation_aborted) self->on_gone();
            if (!error && self->watching_) self->watch();
            self->notify();
          }));
}

HttpSession::Awaitable<void> HttpSession::stop_watching() {
  watching_ = false;
  while (!watch_idle_) {
    // TLS lets no other kind through. What it has read by then it keeps for the next read.
    watch_cancel_.emit(net::cancellation_type::terminal);
    co_await wait_for_notice();
  }
}

// A reader that has fallen too far behind is cut off: the write it does not take would wait for
// ever, and the engine must not.
void HttpSession::cut_off_slow_reader() {
  if (generation_ == nullptr || !generation_->overflowed()) return;
  spdlog::warn("a client reads too slowly; its stream is cut off");
  on_gone();
  close_socket();
}

void HttpSession::on_gone() {
  gone_ = true;
  if (generation_ != nullptr) generation_->cancel();
}

void HttpSession::notify() {
  noticed_ = true;
  notice_timer_.cancel();
}

HttpSession::Awaitable<void> HttpSession::wait_for_notice(Clock::time_point until) {
  if (!noticed_) {
    notice_timer_.expires_at(until);
    co_await notice_timer_.async_wait(kUse);
  }
  noticed_ = false;
}

std::chrono::milliseconds HttpSession::with_rate(std::chrono::milliseconds base,
                                                 size_t bytes) const {
  return base + std::chrono::milliseconds(bytes * 1000 / options_.min_body_bytes_per_second);
}

void HttpSession::arm(std::chrono::milliseconds after, OnExpiry action) {
  deadline_expired_ = false;
  const uint64_t turn = ++deadline_turn_;
  deadline_.expires_after(after);
  deadline_.async_wait([weak = weak_from_this(), turn, action](const error_code& error) {
    const auto self = weak.lock();
    if (error || self == nullptr || turn != self->deadline_turn_) return;
    self->deadline_expired_ = true;
    if (action == OnExpiry::kClose) {
      self->close_socket();
    } else {
      // Reading ends, so that the coroutine goes on, and an answer can still be written.
      error_code ignored;
      self->transport_.socket().shutdown(net::ip::tcp::socket::shutdown_receive, ignored);
    }
  });
}

void HttpSession::disarm() {
  ++deadline_turn_;
  deadline_.cancel();
}

}  // namespace relay::server
