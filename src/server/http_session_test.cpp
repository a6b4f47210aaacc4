// The server as a client sees it, over real sockets, in the clear and through TLS, with an engine
// that needs no model.
#include "server/http_session.h"

#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>

#include <atomic>
#include <boost/asio/connect.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <memory>
#include <thread>

#include "relay/types.h"
#include "server/fake_engine.h"
#include "server/json.h"
#include "server/server.h"

namespace relay::server {
namespace {

namespace net = boost::asio;
using boost::system::error_code;
using namespace std::chrono_literals;

struct Reply {
  int status = 0;
  std::string head;
  std::string body;  ///< chunks put together

  Json json() const { return Json::parse(body); }
  std::string code() const { return json()["error"]["code"]; }
  bool has(const std::string& text) const { return head.find(text) != std::string::npos; }
};

struct KeyPair {
  std::string certificate_file;
  std::string key_file;
};

/// A certificate that vouches for itself, and its key, in files.
KeyPair make_key_pair(const std::string& name) {
  const KeyPair pair{testing::TempDir() + name + ".crt", testing::TempDir() + name + ".key"};
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(X509_new(), X509_free);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600);
  X509_set_pubkey(certificate.get(), key.get());
  const auto* host = reinterpret_cast<const unsigned char*>("localhost");
  X509_NAME* subject = X509_get_subject_name(certificate.get());
  X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, host, -1, -1, 0);
  X509_set_issuer_name(certificate.get(), subject);
  X509_sign(certificate.get(), key.get(), EVP_sha256());
  std::FILE* file = std::fopen(pair.certificate_file.c_str(), "w");
  PEM_write_X509(file, certificate.get());
  std::fclose(file);
  file = std::fopen(pair.key_file.c_str(), "w");
  PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
  std::fclose(file);
  return pair;
}

const KeyPair& key_pair() {
  static const KeyPair pair = make_key_pair("server");
  return pair;
}

/// A client that says exactly what it is told.
class Client {
 public:
  enum class Tls { kNone, k1_1, kNewest };

  explicit Client(uint16_t port, Tls tls = Tls::kNone) : socket_(io_) {
    socket_.connect({net::ip::address_v4::loopback(), port});
    const timeval timeout{20, 0};  // a server that says nothing fails the test, not hangs it
    setsockopt(socket_.native_handle(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    if (tls != Tls::kNone) shake_hands(tls == Tls::k1_1);
  }

  void send(const std::string& bytes) {
    if (tls_) {
      SSL_write(tls_.get(), bytes.data(), static_cast<int>(bytes.size()));
      return;
    }
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t count =
          ::send(socket_.native_handle(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (count <= 0) return;
      sent += static_cast<size_t>(count);
    }
  }
  void close() { socket_.close(); }
  net::ip::tcp::socket& socket() { return socket_; }

  bool read_more() {
    char data[4096];
    const ssize_t count = tls_ ? SSL_read(tls_.get(), data, sizeof(data))
                               : ::recv(socket_.native_handle(), data, sizeof(data), 0);
    if (count <= 0) return false;
    buffer_.append(data, static_cast<size_t>(count));
    return true;
  }
  std::string take_buffer() { return std::exchange(buffer_, {}); }
  bool at_end() { return buffer_.empty() && !read_more(); }
  std::string read_until(const std::string& mark) {
    size_t at = 0;
    while ((at = buffer_.find(mark)) == std::string::npos) {
      if (!read_more()) {
        ADD_FAILURE() << "the connection ended before " << mark << ": " << buffer_;
        return "";
      }
    }
    const std::string found = buffer_.substr(0, at + mark.size());
    buffer_.erase(0, at + mark.size());
    return found;
  }
  std::string read_exactly(size_t count) {
    while (buffer_.size() < count) {
      if (!read_more()) {
        ADD_FAILURE() << "the connection ended too early";
        break;
      }
    }
    const std::string found = buffer_.substr(0, count);
    buffer_.erase(0, count);
    return found;
  }

  Reply read_reply() {
    Reply reply;
    reply.head = read_until("\r\n\r\n");
    if (reply.head.size() < 12) return reply;
    reply.status = std::stoi(reply.head.substr(9, 3));
    const size_t length = reply.head.find("Content-Length: ");
    if (length != std::string::npos) {
      reply.body = read_exactly(std::stoul(reply.head.substr(length + 16)));
    } else if (reply.has("Transfer-Encoding: chunked")) {
      for (;;) {
        const std::string line = read_until("\r\n");
        if (line.empty()) break;
        const size_t size = std::stoul(line, nullptr, 16);
        reply.body += read_exactly(size);
        read_until("\r\n");
        if (size == 0) break;
      }
    }
    return reply;
  }

  Reply ask(const std::string& request) {
    send(request);
    return read_reply();
  }
  Reply get(const std::string& path, const std::string& header = "") {
    return ask("GET " + path + " HTTP/1.1\r\nHost: x\r\n" + header + "\r\n");
  }
  static std::string post_text(const std::string& path, const std::string& body,
                               const std::string& header = "", const char* method = "POST") {
    return std::string(method) + " " + path + " HTTP/1.1\r\nHost: x\r\n" + header +
           "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  }
  Reply post(const std::string& path, const std::string& body, const std::string& header = "") {
    return ask(post_text(path, body, header));
  }

 private:
  void shake_hands(bool old) {
    tls_context_.reset(SSL_CTX_new(TLS_client_method()));
    SSL_CTX_set_cipher_list(tls_context_.get(),
                            "DEFAULT:@SECLEVEL=0");  // lets TLS 1.1 be asked for
    if (old) SSL_CTX_set_max_proto_version(tls_context_.get(), TLS1_1_VERSION);
    SSL_CTX_load_verify_locations(tls_context_.get(), key_pair().certificate_file.c_str(), nullptr);
    SSL_CTX_set_verify(tls_context_.get(), SSL_VERIFY_PEER, nullptr);
    tls_.reset(SSL_new(tls_context_.get()));
    SSL_set_fd(tls_.get(), socket_.native_handle());
    if (SSL_connect(tls_.get()) != 1) throw std::runtime_error("no TLS handshake");
  }

  template <auto Free>
  struct Deleter {
    template <typename T>
    void operator()(T* object) const {
      Free(object);
    }
  };
  net::io_context io_;
  net::ip::tcp::socket socket_;
  std::unique_ptr<SSL_CTX, Deleter<SSL_CTX_free>> tls_context_;
  std::unique_ptr<SSL, Deleter<SSL_free>> tls_;
  std::string buffer_;
};

constexpr const char* kChat = "/v1/chat/completions";
std::string chat(const std::string& fields = "") {
  return R"({"messages":[{"role":"user","content":"hi"}])" + fields + "}";
}

/// The parameter: through TLS?
class HttpSessionTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { std::signal(SIGPIPE, SIG_IGN); }  // SSL_write knows no MSG_NOSIGNAL
  void start(FakeScript script = {}, ServerOptions options = {}, bool ready = true) {
    options.port = 0;
    if (GetParam()) {
      options.tls_certificate_file = key_pair().certificate_file;
      options.tls_key_file = key_pair().key_file;
    }
    server_ = std::make_unique<Server>(options);
    server_->listen();
    engine_ = std::make_shared<FakeEngine>(std::move(script));
    if (ready) server_->service().set_engine(engine_);
  }
  void TearDown() override {
    if (engine_) engine_->stop();
    if (server_) server_->shutdown(1s);
  }
  static Client connect_to(uint16_t port) {
    return Client(port, GetParam() ? Client::Tls::kNewest : Client::Tls::kNone);
  }
  Client connect() { return connect_to(server_->port()); }

  /// True once nothing runs in the engine.
  bool idle_within(std::chrono::milliseconds time) { return engine_->drain(time); }
  void wait_running(int count) {
    const auto until = std::chrono::steady_clock::now() + 10s;
    while (engine_->running < count && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(1ms);
    }
    ASSERT_EQ(engine_->running, count);
  }
  /// Starts with a single place, which is taken as long as the client lives.
  std::unique_ptr<Client> start_full() {
    FakeScript script = endless();
    script.max_requests = 1;
    start(script);
    std::unique_ptr<Client> first(new Client(connect()));  // which cannot be moved
    first->send(Client::post_text(kChat, chat()));
    wait_running(1);
    return first;
  }
  static FakeScript endless() {
    FakeScript script;
    script.endless = true;
    script.step = 2ms;
    return script;
  }

  std::unique_ptr<Server> server_;
  std::shared_ptr<FakeEngine> engine_;
};

TEST_P(HttpSessionTest, HealthAndModels) {
  start();
  Client client = connect();
  EXPECT_EQ(client.get("/health").status, 200);
  const Reply models = client.get("/v1/models");
  EXPECT_EQ(models.json()["data"][0]["id"], "fake");
  EXPECT_EQ(models.json()["data"][0]["root"], "/models/fake.gguf");
  EXPECT_EQ(models.json()["data"][0]["max_model_len"], 1000);
  EXPECT_EQ(client.get("/v1/models/fake").json()["id"], "fake");
  EXPECT_EQ(client.get("/v1/models/nope").code(), "model_not_found");
  const Reply metrics = client.get("/metrics");
  EXPECT_NE(metrics.body.find("vllm:num_requests_running"), std::string::npos);
  EXPECT_TRUE(metrics.has("text/plain; version=0.0.4"));
}

TEST_P(HttpSessionTest, AnAdapterIsAModelBesideItsBase) {
  FakeScript script;
  script.adapters = {{"polite", "/adapters/polite.gguf"}, {"rude", "/adapters/rude.gguf"}};
  ServerOptions options;
  options.model_names = {"base", "alias"};
  options.admin_keys = {"root"};
  start(script, options);
  const std::string key = "Authorization: Bearer root\r\n";
  Client client = connect();
  const Json models = client.get("/v1/models").json()["data"];
  ASSERT_EQ(models.size(), 4u);
  EXPECT_EQ(models[0]["id"], "base");
  EXPECT_FALSE(models[0].contains("parent"));
  EXPECT_EQ(models[3]["id"], "rude");
  EXPECT_EQ(models[3]["root"], "/adapters/rude.gguf");
  EXPECT_EQ(models[3]["parent"], "base");
  EXPECT_EQ(client.get("/v1/models/polite").json()["parent"], "base");
  EXPECT_EQ(client.get("/v1/models/nope").code(), "model_not_found");

  const auto answer = [&](const std::string& path, const std::string& model) {
    const Reply reply = client.post(path, chat(R"(,"max_tokens":9,"model":")" + model + '"'));
    EXPECT_EQ(reply.status, 200) << reply.body;
    EXPECT_EQ(reply.json()["model"], model);
    return engine_->last_request().adapter;
  };
  EXPECT_EQ(answer(kChat, "base"), 0);
  EXPECT_EQ(answer(kChat, "polite"), 1);
  EXPECT_EQ(answer(kChat, "rude"), 2);
  EXPECT_EQ(answer(kChat, "alias"), 0);
  EXPECT_EQ(answer("/v1/messages", "rude"), 2);
  const Reply text = client.post("/v1/completions", R"({"prompt":"a","model":"polite"})");
  EXPECT_EQ(engine_->last_request().adapter, 1);
  const Reply responses = client.post("/v1/responses", R"({"input":"a","model":"rude"})");
  EXPECT_EQ(responses.json()["model"], "rude");
  EXPECT_EQ(engine_->last_request().adapter, 2);
  const Reply unknown = client.post(kChat, chat(R"(,"model":"kind")"));
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(unknown.code(), "model_not_found");
  const auto fingerprint = [&](const std::string& model) {
    return client.post(kChat, chat(R"(,"model":")" + model + '"')).json()["system_fingerprint"];
  };
  EXPECT_NE(fingerprint("polite"), fingerprint("base"));
  EXPECT_NE(fingerprint("polite"), fingerprint("rude"));
  EXPECT_EQ(fingerprint("polite"), fingerprint("polite"));

  EXPECT_EQ(client.post("/v1/cached_prompts", chat(), key).json()["model"], "base");
  const Reply pinned = client.post("/v1/cached_prompts", chat(R"(,"model":"rude")"), key);
  EXPECT_EQ(pinned.json()["model"], "rude");
  EXPECT_EQ(engine_->pin_requests().back().adapter, 2);
  EXPECT_EQ(client.get("/v1/cached_prompts", key).json()["data"].size(), 2u);
  const Json state = client.get("/state", key).json();
  EXPECT_EQ(state["models"], Json::array({"base", "polite", "rude"}));
  EXPECT_EQ(state["prefix_tree"][0]["model"], "base");
  EXPECT_EQ(state["prefix_tree"][2]["model"], "rude");
  EXPECT_EQ(state["pinned"][0]["model"], "base");
  EXPECT_EQ(state["pinned"][1]["model"], "rude");
  EXPECT_NE(client.get("/metrics")
                .body.find(R"(max_lora="2",running_lora_adapters="polite,rude",)"
                           R"(waiting_lora_adapters="")"),
            std::string::npos);
  start();
  EXPECT_EQ(connect().get("/metrics").body.find("lora"), std::string::npos);
}

TEST_P(HttpSessionTest, ChatOnOneConnection) {
  start();
  Client client = connect();
  for (int i = 0; i < 3; ++i) {
    const Reply whole = client.post(kChat, chat());
    EXPECT_EQ(whole.status, 200);
    EXPECT_EQ(whole.json()["choices"][0]["message"]["content"], "Hello, world!");
    const Reply stream = client.post(kChat, chat(R"(,"stream":true)"));
    EXPECT_TRUE(stream.has("text/event-stream"));
    EXPECT_EQ(stream.body.substr(stream.body.size() - 14), "data: [DONE]\n\n");
  }
}

TEST_P(HttpSessionTest, PagesOfAllowedOriginsMayAsk) {
  ServerOptions options;
  options.cors_origins = {"https://a.example"};
  start({}, options);
  Client client = connect();
  const std::string asking =
      "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-api-key\r\n";
  const Reply allowed = client.ask(
      "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
      "Origin: https://a.example\r\n" +
      asking + "\r\n");
  EXPECT_EQ(allowed.status, 204);
  EXPECT_TRUE(allowed.has("Access-Control-Allow-Origin: https://a.example\r\n"));
  EXPECT_TRUE(allowed.has("Access-Control-Allow-Headers: x-api-key\r\n"));
  EXPECT_TRUE(client.get("/health", "Origin: https://a.example\r\n")
                  .has("Access-Control-Allow-Origin: https://a.example\r\n"));
  EXPECT_FALSE(connect().get("/health", "Origin: https://b.example\r\n").has("Access-Control"));
  EXPECT_FALSE(client.get("/health").has("Access-Control"));
  const Reply refused = client.ask(
      "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
      "Origin: https://b.example\r\n" +
      asking + "\r\n");
  EXPECT_EQ(refused.status, 405);
  EXPECT_FALSE(refused.has("Access-Control"));
}

TEST_P(HttpSessionTest, PagesOfOtherOriginsAreRefused) {
  ServerOptions options;
  options.cors_origins = {"https://a.example"};
  start({}, options);
  // A browser asks for no leave to send text.
  const auto status = [&](const std::string& host, const std::string& more) {
    const std::string body = chat();
    const Reply reply = connect().ask(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: text/plain\r\n" +
        more + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
    EXPECT_TRUE(reply.status == 200 || reply.code() == "origin_not_allowed");
    return reply.status;
  };
  EXPECT_EQ(status("x", "Origin: https://evil.example\r\n"), 403);
  EXPECT_EQ(status("x", "Origin: null\r\n"), 403);
  EXPECT_EQ(status("x", "Origin: http://x:8080\r\n"), 403);
  EXPECT_EQ(status("x", "Origin: http://x.evil.example\r\n"), 403);
  EXPECT_EQ(status("x", "Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n"), 403);
  EXPECT_EQ(status("x", "Origin: https://evil.x\r\nSec-Fetch-Site: same-site\r\n"), 403);
  EXPECT_EQ(status("x", "Origin: https://a.example\r\n"), 200);
  EXPECT_EQ(status("x", ""), 200) << "no browser";
  // Its own page, by whatever name; behind a proxy that changes Host, too.
  EXPECT_EQ(status("127.0.0.1:8080", "Origin: http://127.0.0.1:8080\r\n"), 200);
  EXPECT_EQ(status("Relay.example", "Origin: https://relay.example\r\n"), 200);
  EXPECT_EQ(status("[::1]:80", "Origin: http://[::1]:80\r\n"), 200);
  EXPECT_EQ(
      status("10.0.0.7:80", "Origin: https://relay.example\r\nSec-Fetch-Site: same-origin\r\n"),
      200);
}

TEST_P(HttpSessionTest, PageAndState) {
  start();
  Client client = connect();
  const Reply page = client.get("/");
  EXPECT_EQ(page.status, 200);
  EXPECT_TRUE(page.has("Content-Type: text/html"));
  EXPECT_TRUE(page.has("Content-Security-Policy: default-src 'none'"));
  const Json state = client.get("/state").json();
  EXPECT_EQ(state["prefix_tree"][1]["parent"], 0);
  EXPECT_EQ(state["prefix_tree"][0]["running"], 2);
}

TEST_P(HttpSessionTest, NothingWaitsForAPromptThatIsPinned) {
  ServerOptions options;
  options.admin_keys = {"root"};
  start({}, options);
  const std::string key = "Authorization: Bearer root\r\n";
  Client client = connect();
  ASSERT_EQ(client.post("/v1/cached_prompts", chat(), key).status, 201);
  engine_->pins_wait = true;
  Client slow = connect();
  slow.send(Client::post_text("/v1/cached_prompts", chat(R"(,"cache_salt":"s")"), key));
  while (engine_->pins_begun < 2) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(client.get("/state", key).json()["pinned"].size(), 1u);
  EXPECT_EQ(client.get("/v1/cached_prompts", key).json()["data"].size(), 1u);
  EXPECT_EQ(client.ask(Client::post_text("/v1/cached_prompts/cp_0", R"({"ttl":60})", key, "PATCH"))
                .status,
            200);
  engine_->pins_wait = false;
  EXPECT_EQ(slow.read_reply().status, 201);
}

TEST_P(HttpSessionTest, HeadIsGetWithoutTheBody) {
  start();
  Client client = connect();
  client.send("HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n");
  const std::string head = client.read_until("\r\n\r\n");
  EXPECT_NE(head.find("200 OK"), std::string::npos) << head;
  EXPECT_NE(head.find("Content-Length: 15"), std::string::npos) << head;
  EXPECT_EQ(client.get("/health").status, 200);  // nothing came in between
}

TEST_P(HttpSessionTest, RequestIdIsEchoedIfFit) {
  start();
  Client client = connect();
  EXPECT_TRUE(client.get("/health", "X-Request-Id: abc-1\r\n").has("x-request-id: abc-1\r\n"));
  EXPECT_TRUE(client.get("/health").has("x-request-id: req_"));
  const std::string odd = "X-Request-Id: " + std::string(300, 'a') + "\r\n";
  EXPECT_TRUE(client.get("/health", odd).has("x-request-id: req_"));
}

TEST_P(HttpSessionTest, PipelinedRequestsAreAnsweredInOrder) {
  start();
  Client client = connect();
  client.send(Client::post_text(kChat, chat(R"(,"stream":true)")) +
              Client::post_text("/v1/completions", R"({"prompt":"a"})") +
              "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(client.read_reply().has("text/event-stream"));
  EXPECT_EQ(client.read_reply().json()["object"], "text_completion");
  EXPECT_EQ(client.read_reply().json()["status"], "ok");
}

TEST_P(HttpSessionTest, RequestInSmallPieces) {
  start();
  Client client = connect();
  client.socket().set_option(net::ip::tcp::no_delay(true));
  const std::string request = Client::post_text(kChat, chat());
  for (size_t i = 0; i < request.size(); i += 7) {
    client.send(request.substr(i, 7));
    if (i % 70 == 0) std::this_thread::sleep_for(1ms);
  }
  EXPECT_EQ(client.read_reply().status, 200);
}

TEST_P(HttpSessionTest, ChunkedRequestBody) {
  start();
  Client client = connect();
  const std::string body = chat();
  char size[16];
  std::snprintf(size, sizeof(size), "%zx\r\n", body.size());
  EXPECT_EQ(client
                .ask(std::string("POST ") + kChat +
                     " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + size + body +
                     "\r\n0\r\n\r\n")
                .status,
            200);
}

TEST_P(HttpSessionTest, Expect100Continue) {
  start();
  Client client = connect();
  const std::string body = chat();
  client.send(std::string("POST ") + kChat + " HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" +
              "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n");
  EXPECT_EQ(client.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  EXPECT_EQ(client.ask(body).status, 200);
}

TEST_P(HttpSessionTest, Http10) {
  start();
  Client client = connect();
  const std::string body = chat(R"(,"stream":true)");
  client.send(std::string("POST ") + kChat +
              " HTTP/1.0\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
  const Reply reply = client.read_reply();
  EXPECT_EQ(reply.status, 200);
  EXPECT_FALSE(reply.has("chunked"));
  EXPECT_NE(client.read_until("data: [DONE]\n\n"), "");
  EXPECT_TRUE(client.at_end());
}

TEST_P(HttpSessionTest, ErrorsInOpenAisForm) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  start({}, options);
  const auto fresh = [&](auto ask) {
    Client client = connect();
    return ask(client);
  };
  const auto post = [&](const std::string& body) {
    return fresh([&](Client& client) { return client.post(kChat, body); });
  };
  EXPECT_EQ(fresh([](Client& c) { return c.get("/nope"); }).code(), "not_found");
  const Reply method = fresh([](Client& c) { return c.get(kChat); });
  EXPECT_EQ(method.status, 405);
  EXPECT_TRUE(method.has("Allow: POST\r\n"));
  const Reply malformed = post(R"({"messages": [}])");
  EXPECT_EQ(malformed.status, 400);
  EXPECT_EQ(malformed.code(), "invalid_json");
  EXPECT_NE(malformed.body.find("byte 14"), std::string::npos) << malformed.body;
  EXPECT_EQ(post(chat(R"(,"model":"gpt")")).status, 404);
  EXPECT_EQ(post(chat(R"(,"max_tokens":5000)")).code(), "context_length_exceeded");
  EXPECT_EQ(post(chat(R"(,"temperature":9)")).json()["error"]["param"], "temperature");
  EXPECT_EQ(post("").code(), "invalid_json");
  const Reply big = post(std::string(5000, ' '));
  EXPECT_EQ(big.status, 413);
  EXPECT_TRUE(big.has("Connection: close"));
  const Reply garbage = fresh([](Client& c) { return c.ask("\x16\x03\x01 hello\r\n\r\n"); });
  EXPECT_EQ(garbage.status, 400);
  const Reply header = fresh(
      [](Client& c) { return c.get("/health", "X-Long: " + std::string(40000, 'a') + "\r\n"); });
  EXPECT_EQ(header.status, 431);
  const Reply target = fresh([](Client& c) { return c.get("/" + std::string(5000, 'a')); });
  EXPECT_EQ(target.status, 414);
  const Reply smuggled = fresh([](Client& c) {
    return c.ask(std::string("POST ") + kChat +
                 " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n");
  });
  EXPECT_EQ(smuggled.status, 400);
}

TEST_P(HttpSessionTest, ABodyFarTooLargeStillReadsItsAnswer) {
  start();
  Client client = connect();
  // The client sends all of it before it reads, as most do.
  std::thread sender([&] { client.send(Client::post_text(kChat, std::string(20 << 20, 'x'))); });
  const Reply reply = client.read_reply();
  sender.join();
  EXPECT_EQ(reply.status, 413);
}

TEST_P(HttpSessionTest, ChunkedBodyBeyondTheLimit) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  start({}, options);
  Client client = connect();
  client.send(std::string("POST ") + kChat +
              " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 20; ++i) client.send("64\r\n" + std::string(100, ' ') + "\r\n");
  EXPECT_EQ(client.read_reply().status, 413);
}

TEST_P(HttpSessionTest, Keys) {
  ServerOptions options;
  options.api_keys = {"k1"};
  options.admin_keys = {"root"};
  start({}, options);
  Client client = connect();
  EXPECT_EQ(client.get("/health").status, 200);
  EXPECT_EQ(client.get("/v1/models").code(), "invalid_api_key");
  EXPECT_EQ(client.get("/metrics").status, 401);
  EXPECT_EQ(client.get("/v1/models", "Authorization: Bearer nope\r\n").status, 401);
  EXPECT_EQ(client.get("/v1/models", "Authorization: Bearer k1\r\n").status, 200);
  EXPECT_EQ(client.get("/v1/cached_prompts", "Authorization: Bearer k1\r\n").status, 403);
  EXPECT_EQ(client.get("/v1/cached_prompts", "Authorization: Bearer root\r\n").status, 200);
  const Reply refused = client.post(kChat, chat());
  EXPECT_EQ(refused.status, 401);
  EXPECT_EQ(connect().post(kChat, chat(), "Authorization: Bearer k1\r\n").status, 200);
}

TEST_P(HttpSessionTest, WhoSharesWithWhomIsForOperators) {
  const auto tells = [&](const std::string& key) {
    const Reply reply = connect().get("/metrics", "Authorization: Bearer " + key + "\r\n");
    EXPECT_EQ(reply.status, 200);
    EXPECT_NE(reply.body.find("vllm:num_requests_running"), std::string::npos);
    int found = 0;
    for (const char* part :
         {"relay:shared_group_size", "relay:shared_prefix_tokens", "relay:kv_bytes_unshared",
          "relay:kv_bytes_read_total", "relay:kv_bytes_saved_total"}) {
      found += reply.body.find(part) != std::string::npos ? 1 : 0;
    }
    return found;
  };
  start();
  EXPECT_EQ(tells("anything"), 5) << "no keys: everybody is an operator";
  ServerOptions options;
  options.api_keys = {"k1"};
  start({}, options);
  EXPECT_EQ(tells("k1"), 0) << "no admin key: nobody is";
  options.admin_keys = {"root"};
  start({}, options);
  EXPECT_EQ(tells("k1"), 0);
  EXPECT_EQ(tells("root"), 5);
}

// The timer's work runs on a thread that nobody waits for.
TEST_P(HttpSessionTest, ATimerThatFailsGoesOn) {
  ServerOptions options;
  options.admin_keys = {"root"};
  options.pin_refresh = std::chrono::milliseconds(2);
  start({}, options);
  const std::string key = "Authorization: Bearer root\r\n";
  ASSERT_EQ(connect().post("/v1/cached_prompts", chat(), key).status, 201);
  engine_->pin_lookups_fail = true;
  const int before = engine_->pin_lookups;
  for (int i = 0; i < 2000 && engine_->pin_lookups < before + 3; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_GE(engine_->pin_lookups, before + 3);
  EXPECT_EQ(connect().get("/v1/cached_prompts", key).status, 500);
  engine_->pin_lookups_fail = false;
  EXPECT_EQ(connect().get("/v1/cached_prompts", key).json()["data"].size(), 1u);
}

TEST_P(HttpSessionTest, CachedPrompts) {
  ServerOptions options;
  options.admin_keys = {"root"};
  start({}, options);
  const std::string key = "Authorization: Bearer root\r\n";
  Client client = connect();
  const Reply made = client.post("/v1/cached_prompts", chat(R"(,"name":"n","ttl":5)"), key);
  EXPECT_EQ(made.status, 201) << made.body;
  EXPECT_EQ(made.json()["object"], "cached_prompt");
  EXPECT_EQ(client.get("/v1/cached_prompts", key).json()["data"].size(), 1u);
  EXPECT_EQ(client.get("/v1/cached_prompts/cp_0", key).json()["name"], "n");
  EXPECT_EQ(client.get("/v1/cached_prompts/cp_9", key).status, 404);
  const Reply patched =
      client.ask(Client::post_text("/v1/cached_prompts/cp_0", R"({"ttl":60})", key, "PATCH"));
  EXPECT_EQ(patched.json()["expires_at"], FakeEngine::kFarAway + 60);
  EXPECT_EQ(
      client
          .post("/v1/cached_prompts",
                R"({"messages":[{"role":"system","content":")" + std::string(600, 'x') + R"("}]})",
                key)
          .code(),
      "pin_budget_exceeded");
  EXPECT_EQ(
      client.ask("DELETE /v1/cached_prompts/cp_0 HTTP/1.1\r\nHost: x\r\n" + key + "\r\n").status,
      200);
  EXPECT_EQ(client.get("/v1/cached_prompts", key).json()["data"].size(), 0u);
}

TEST_P(HttpSessionTest, LoadingAndDraining) {
  start({}, {}, /*ready=*/false);
  Client client = connect();
  server_->service().set_progress(0.5, "loading model");
  const Reply health = client.get("/health");
  EXPECT_EQ(health.status, 503);
  EXPECT_TRUE(health.has("Retry-After: "));
  EXPECT_EQ(health.json()["status"], "loading");
  EXPECT_EQ(health.json()["progress"], 0.5);
  EXPECT_EQ(connect().post(kChat, chat()).code(), "loading");
  EXPECT_EQ(connect().get("/v1/models").status, 503);
  EXPECT_EQ(connect().get("/metrics").status, 200);
  server_->service().set_engine(engine_);
  EXPECT_EQ(connect().post(kChat, chat()).status, 200);
  server_->service().begin_drain();
  const Reply refused = connect().post(kChat, chat());
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.code(), "shutting_down");
  EXPECT_EQ(connect().get("/health").json()["status"], "draining");
}

TEST_P(HttpSessionTest, QueueFull) {
  const std::unique_ptr<Client> first = start_full();
  const Reply refused = connect().post(kChat, chat());
  EXPECT_EQ(refused.status, 429);
  EXPECT_EQ(refused.code(), "rate_limit_exceeded");
  EXPECT_TRUE(refused.has("Retry-After: 7\r\n"));
}

TEST_P(HttpSessionTest, AFullQueueIsToldBeforeALargeBodyIsSent) {
  const std::unique_ptr<Client> first = start_full();
  const auto refused = [&](size_t body) {
    Client client = connect();
    client.send(std::string("POST ") + kChat +
                " HTTP/1.1\r\nHost: x\r\nContent-Length: " + std::to_string(body) + "\r\n\r\n{");
    return client.read_reply();
  };
  const Reply large = refused(1 << 20);
  EXPECT_EQ(large.status, 429);
  EXPECT_TRUE(large.has("Retry-After: 7\r\n"));
  EXPECT_TRUE(large.has("Connection: close\r\n"));
  // After a small one the connection goes on.
  Client small = connect();
  EXPECT_TRUE(small.post(kChat, chat()).has("Connection: keep-alive\r\n"));
  EXPECT_EQ(small.post(kChat, chat()).status, 429);
}

TEST_P(HttpSessionTest, MorePromptsThanHaveAPlaceAreNoMatterOfTrying) {
  start();
  std::string prompts = R"("a")";
  for (int i = 1; i < 16; ++i) prompts += R"(,"a")";
  Client client = connect();
  EXPECT_EQ(client.post("/v1/completions", R"({"prompt":[)" + prompts + "]}").status, 200);
  EXPECT_EQ(client.post("/v1/completions", R"({"prompt":[)" + prompts + R"(,"a"]})").status, 400);
}

TEST_P(HttpSessionTest, AFullQueueIsToldBeforeThePromptIsMade) {
  FakeScript script = endless();
  script.max_requests = 2;
  start(script);
  engine_->hold_renders = true;
  Client first = connect();
  Client second = connect();
  for (Client* client : {&first, &second}) {
    const int renders = engine_->renders;
    client->send(Client::post_text(kChat, chat()));
    while (engine_->renders == renders) std::this_thread::sleep_for(1ms);
  }
  Client third = connect();
  EXPECT_EQ(third.post(kChat, chat()).status, 429) << "those that are prepared have the places";
  EXPECT_EQ(third.post("/v1/messages", chat()).json()["error"]["type"], "rate_limit_error");
  EXPECT_EQ(engine_->renders, 2);
  engine_->hold_renders = false;
  wait_running(2);
  EXPECT_EQ(third.post(kChat, chat()).status, 429);
  first.close();
  second.close();
  ASSERT_TRUE(idle_within(10s));
  // Whoever fails while its prompt is made leaves its place.
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(third.post(kChat, chat(R"(,"model":"another")")).status, 404);
  }
  third.send(Client::post_text(kChat, chat()));
  wait_running(1);
}

TEST_P(HttpSessionTest, AClientThatLeavesIsNoticed) {
  start(endless());
  Client streaming = connect();
  streaming.send(Client::post_text(kChat, chat(R"(,"stream":true)")));
  streaming.read_until("data: ");
  streaming.close();
  EXPECT_TRUE(idle_within(1s));

  Client waiting = connect();
  waiting.send(Client::post_text(kChat, chat()));
  wait_running(1);
  waiting.close();
  EXPECT_TRUE(idle_within(1s));

  Client pipelining = connect();
  pipelining.send(Client::post_text(kChat, chat()) + "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
  wait_running(1);
  pipelining.close();
  EXPECT_TRUE(idle_within(1s));
  EXPECT_EQ(engine_->cancelled, 3);
}

TEST_P(HttpSessionTest, AReaderThatStopsReadingIsCutOff) {
  FakeScript script;
  script.endless = true;
  script.pieces = {std::string(20'000, 'x')};  // the system takes some MB before it takes no more
  ServerOptions options;
  options.max_queued_bytes = 2'000'000;
  start(script, options);
  Client client = connect();
  client.socket().set_option(net::socket_base::receive_buffer_size(4096));
  client.send(Client::post_text(kChat, chat(R"(,"stream":true)")));
  client.read_until("data: ");
  EXPECT_TRUE(idle_within(10s));  // and reads no more
  EXPECT_EQ(engine_->cancelled, 1);
  EXPECT_EQ(connect().get("/health").status, 200);
}

TEST_P(HttpSessionTest, ErrorInMidStream) {
  FakeScript script;
  script.fail_after = 2;
  script.step = 5ms;
  start(script);
  Client client = connect();
  const Reply reply = client.post(kChat, chat(R"(,"stream":true)"));
  EXPECT_EQ(reply.status, 200);
  const size_t error = reply.body.find("data: {\"error\":");
  ASSERT_NE(error, std::string::npos) << reply.body;
  EXPECT_EQ(reply.body.find("[DONE]"), std::string::npos);
  EXPECT_TRUE(client.at_end());
}

TEST_P(HttpSessionTest, ErrorBeforeTheFirstTokenHasItsStatus) {
  FakeScript script;
  script.fail_after = 0;
  start(script);
  const Reply reply = connect().post(kChat, chat(R"(,"stream":true)"));
  EXPECT_EQ(reply.status, 500);
  EXPECT_EQ(reply.code(), "internal_error");
}

TEST_P(HttpSessionTest, SilentStreamsShowThatTheyLive) {
  FakeScript script;
  script.pieces = {"a"};
  script.step = 300ms;
  ServerOptions options;
  options.first_byte_delay = 20ms;
  options.keep_alive_interval = 20ms;
  start(script, options);
  const Reply reply = connect().post(kChat, chat(R"(,"stream":true)"));
  EXPECT_NE(reply.body.find(": waiting\n\n"), std::string::npos) << reply.body;
  EXPECT_NE(reply.body.find("data: [DONE]"), std::string::npos);
}

TEST_P(HttpSessionTest, SlowSendersAreTimedOut) {
  ServerOptions options;
  options.header_timeout = 100ms;
  options.body_timeout = 100ms;
  options.idle_timeout = 100ms;
  options.min_body_bytes_per_second = 1 << 20;
  start({}, options);
  Client header = connect();
  header.send("GET /health HTT");
  EXPECT_EQ(header.read_reply().status, 408);
  Client body = connect();
  body.send(std::string("POST ") + kChat + " HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{");
  EXPECT_EQ(body.read_reply().status, 408);
  Client idle = connect();
  EXPECT_TRUE(idle.at_end());
}

TEST_P(HttpSessionTest, ConnectionsAreBounded) {
  ServerOptions options;
  options.max_connections = 2;
  start({}, options);
  Client a = connect();
  Client b = connect();
  EXPECT_EQ(a.get("/health").status, 200);
  EXPECT_EQ(b.get("/health").status, 200);
  if (GetParam()) {
    EXPECT_THROW(connect(), std::runtime_error) << "no handshake for one too many";
  } else {
    EXPECT_EQ(connect().read_reply().status, 503);
  }
  a.close();
  const auto until = std::chrono::steady_clock::now() + 5s;
  int status = 0;
  while (status != 200 && std::chrono::steady_clock::now() < until) {
    try {
      status = connect().get("/health").status;
    } catch (const std::runtime_error&) {  // still one too many
    }
  }
  EXPECT_EQ(status, 200);
}

TEST_P(HttpSessionTest, BuffersForBodiesAreBounded) {
  ServerOptions options;
  options.max_buffered_body_bytes = 1000;
  start({}, options);
  Client holder = connect();
  holder.send(std::string("POST ") + kChat + " HTTP/1.1\r\nHost: x\r\nContent-Length: 901\r\n\r\n" +
              std::string(900, ' '));
  std::this_thread::sleep_for(100ms);
  const std::string body = chat(",\"user\":\"" + std::string(200, 'u') + "\"");
  EXPECT_EQ(connect().post(kChat, body).status, 429);
  holder.close();
  const auto until = std::chrono::steady_clock::now() + 5s;
  int status = 0;
  while (status != 200 && std::chrono::steady_clock::now() < until) {
    status = connect().post(kChat, body).status;
  }
  EXPECT_EQ(status, 200);
}

TEST_P(HttpSessionTest, ABodyTakesMemoryAsItArrivesAndUntilItIsRead) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  options.max_buffered_body_bytes = 1000;
  start(endless(), options);
  // Announced, not sent.
  Client slow = connect();
  slow.send(std::string("POST ") + kChat + " HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{");
  // Of unknown length, and then answered for a long time.
  const std::string body = chat(",\"stream\":true,\"user\":\"" + std::string(200, 'u') + "\"");
  char size[16];
  std::snprintf(size, sizeof(size), "%zx", body.size());
  std::vector<std::unique_ptr<Client>> streams;
  for (int i = 0; i < 8; ++i) {
    streams.push_back(std::unique_ptr<Client>(new Client(connect())));
    streams.back()->send(std::string("POST ") + kChat +
                         " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + size +
                         "\r\n" + body + "\r\n0\r\n\r\n");
    EXPECT_NE(streams.back()->read_until("data: ").find(" 200 "), std::string::npos);
  }
}

TEST_P(HttpSessionTest, ManyStreamsOnFewThreads) {
  FakeScript script;
  script.pieces.assign(20, "x");
  script.step = 2ms;
  start(script);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 300; ++i) {
    clients.push_back(std::unique_ptr<Client>(new Client(connect())));
    clients.back()->send(Client::post_text(kChat, chat(R"(,"stream":true)")));
  }
  for (const auto& client : clients) {
    const Reply reply = client->read_reply();
    EXPECT_EQ(reply.status, 200);
    EXPECT_EQ(reply.body.substr(reply.body.size() - 14), "data: [DONE]\n\n");
  }
}

TEST_P(HttpSessionTest, ShutdownLetsAnswersFinish) {
  FakeScript script;
  script.pieces.assign(50, "x");
  script.step = 5ms;
  start(script);
  Client idle = connect();
  EXPECT_EQ(idle.get("/health").status, 200);
  Client client = connect();
  client.send(Client::post_text(kChat, chat(R"(,"stream":true)")));
  client.read_until("data: ");
  server_->service().begin_drain();
  EXPECT_TRUE(engine_->drain(10s));
  engine_->stop();
  server_->shutdown(5s);
  client.read_until("data: [DONE]\n\n");
  EXPECT_TRUE(idle.at_end());
}

TEST_P(HttpSessionTest, ShutdownEndsWhatDoesNotFinish) {
  start(endless());
  Client client = connect();
  client.send(Client::post_text(kChat, chat(R"(,"stream":true)")));
  client.read_until("data: ");
  engine_->stop();  // cancels: the stream ends with an error
  server_->shutdown(5s);
  EXPECT_NE(client.read_until("data: {\"error\""), "");
}

TEST_P(HttpSessionTest, ShutdownWhileClientsComeAndGo) {
  // For the sanitizers above all: connections are accepted, work is on other threads and clients
  // leave in the middle of it, all while the server ends.
  for (int round = 0; round < 5; ++round) {
    start(endless());
    const uint16_t port = server_->port();
    std::atomic<bool> over{false};
    std::vector<std::thread> clients;
    for (int i = 0; i < 6; ++i) {
      clients.emplace_back([&, i] {
        while (!over) {
          const std::string body = chat(i % 2 == 0 ? R"(,"stream":true)" : R"(,"max_tokens":5)");
          try {
            Client client = connect_to(port);
            client.send(Client::post_text(kChat, body));
            if (i % 3 == 0) client.read_more();
          } catch (const std::exception&) {  // the server is gone, or closed in the handshake
          }
        }
      });
    }
    while (engine_->cancelled < 5 * (round + 1)) std::this_thread::sleep_for(1ms);
    engine_->stop();
    server_->shutdown(round % 2 == 0 ? 0ms : 100ms);
    over = true;
    for (std::thread& client : clients) client.join();
    net::io_context io;
    error_code error;
    net::ip::tcp::socket(io).connect({net::ip::address_v4::loopback(), port}, error);
    EXPECT_TRUE(error) << "it still listens";
    server_.reset();
  }
}

TEST_P(HttpSessionTest, PortInUseSaysSo) {
  start();
  ServerOptions options;
  options.port = server_->port();
  Server second(options);
  try {
    second.listen();
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("in use"), std::string::npos);
  }
}

INSTANTIATE_TEST_SUITE_P(Plain, HttpSessionTest, testing::Values(false));
INSTANTIATE_TEST_SUITE_P(Tls, HttpSessionTest, testing::Values(true));

class TlsTest : public HttpSessionTest {};
INSTANTIATE_TEST_SUITE_P(Tls, TlsTest, testing::Values(true));

TEST_P(TlsTest, OnlyNewVersionsAndNothingInTheClear) {
  start();
  EXPECT_EQ(server_->url().substr(0, 8), "https://");
  EXPECT_THROW(Client(server_->port(), Client::Tls::k1_1), std::runtime_error);
  Client clear(server_->port());
  clear.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
  while (clear.read_more()) {
  }
  EXPECT_FALSE(clear.take_buffer().starts_with("HTTP"));
  EXPECT_EQ(connect().get("/health").status, 200);
}

TEST_P(TlsTest, AClientThatDoesNotShakeHandsIsLetGo) {
  ServerOptions options;
  options.header_timeout = 50ms;
  start({}, options);
  Client silent(server_->port());
  EXPECT_TRUE(silent.at_end());
  EXPECT_EQ(connect().get("/health").status, 200);
}

TEST(Tls, WrongFilesAreNamed) {
  const auto message = [](const std::string& certificate, const std::string& key) -> std::string {
    ServerOptions options;
    options.tls_certificate_file = certificate;
    options.tls_key_file = key;
    try {
      Server server(options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const KeyPair& good = key_pair();
  const KeyPair other = make_key_pair("other");
  const std::string empty = testing::TempDir() + "empty.pem";
  std::ofstream(empty).flush();
  const std::string encrypted = testing::TempDir() + "encrypted.key";
  {
    const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(EVP_EC_gen("P-256"),
                                                                  EVP_PKEY_free);
    std::FILE* file = std::fopen(encrypted.c_str(), "w");
    PEM_write_PKCS8PrivateKey(file, key.get(), EVP_aes_256_cbc(), "secret", 6, nullptr, nullptr);
    std::fclose(file);
  }
  EXPECT_EQ(message(good.certificate_file, good.key_file), "");
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos ? "" : text;
  };
  EXPECT_EQ(contains(message("/no/such.crt", good.key_file),
                     "the TLS certificate '/no/such.crt' cannot be read: No such file"),
            "");
  EXPECT_EQ(contains(message(good.certificate_file, "/no/such.key"),
                     "the TLS key '/no/such.key' cannot be read"),
            "");
  EXPECT_EQ(contains(message(testing::TempDir(), good.key_file), "cannot be read: Is a dir"), "");
  EXPECT_EQ(contains(message(empty, good.key_file), "is empty"), "");
  EXPECT_EQ(contains(message(good.key_file, good.key_file), "is no certificate in PEM"), "");
  EXPECT_EQ(contains(message(good.certificate_file, good.certificate_file), "is no key in PEM"),
            "");
  EXPECT_EQ(contains(message(good.certificate_file, other.key_file), "does not belong to"), "");
  EXPECT_EQ(contains(message(good.certificate_file, encrypted), "is encrypted"), "");
}

}  // namespace
}  // namespace relay::server
