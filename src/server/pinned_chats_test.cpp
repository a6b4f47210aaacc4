#include "server/pinned_chats.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "server/fake_engine.h"

namespace relay::server {
namespace {

struct Fixture {
  ~Fixture() { engine->stop(); }
  ChatToPin chat(const std::string& text, int64_t ttl = 0) {
    ChatToPin request;
    request.name = text;
    request.chat.messages_json = text;
    request.ttl_seconds = ttl;
    return request;
  }
  std::vector<std::string> held() const {
    std::vector<std::string> texts;
    for (const engine::PinRequest& pin : engine->pin_requests()) {
      texts.push_back(engine->detokenize(pin.tokens, true));
    }
    return texts;
  }
  std::shared_ptr<FakeEngine> engine = std::make_shared<FakeEngine>(FakeScript{});
  PinnedChats chats{engine};
};

engine::ErrorKind error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const engine::EngineError& error) {
    return error.kind();
  }
  return engine::ErrorKind::kInternal;
}

using Texts = std::vector<std::string>;

TEST(PinnedChats, WhatReadsTheSameStays) {
  Fixture f;
  const std::string id = f.chats.pin(f.chat("rules")).id;
  f.chats.refresh();
  EXPECT_EQ(f.engine->pins, 1);
  EXPECT_EQ(f.chats.get(id).prompt.name, "rules");
}

TEST(PinnedChats, ANewDayIsPinnedInThePlaceOfTheOld) {
  Fixture f;
  f.engine->set_date("Monday ");
  const std::string id = f.chats.pin(f.chat("rules", 600)).id;
  const std::string other = f.chats.pin(f.chat("laws")).id;
  EXPECT_EQ(f.held(), (Texts{"Monday rules", "Monday laws"}));
  f.engine->set_date("Tuesday ");
  f.chats.refresh();
  EXPECT_EQ(f.held(), (Texts{"Tuesday rules", "Tuesday laws"}));
  f.engine->set_date("Wednesday ");
  f.chats.refresh();
  EXPECT_EQ(f.held(), (Texts{"Wednesday rules", "Wednesday laws"}));

  // Its name for clients has stayed, and so has its end.
  const engine::PinnedPrompt prompt = f.chats.get(id).prompt;
  EXPECT_EQ(prompt.name, "rules");
  EXPECT_EQ(prompt.tokens, 15);
  EXPECT_NE(prompt.expires_at, 0);
  EXPECT_EQ(f.chats.list().size(), 2u);
  EXPECT_EQ(f.chats.set_ttl(id, 0).prompt.id, id);
  f.chats.unpin(id);
  EXPECT_EQ(f.held(), (Texts{"Wednesday laws"}));
  EXPECT_EQ(error_of([&] { f.chats.get(id); }), engine::ErrorKind::kNotFound);
  EXPECT_EQ(f.chats.list().at(0).prompt.id, other);
}

TEST(PinnedChats, WhatCannotBePinnedAnewIsTriedAgain) {
  Fixture f;
  const std::string id = f.chats.pin(f.chat("rules")).id;
  f.engine->set_date(std::string(600, 'x'));  // too long for the fake
  f.chats.refresh();
  EXPECT_EQ(f.held(), Texts{});
  EXPECT_EQ(f.chats.list().size(), 0u);
  EXPECT_EQ(error_of([&] { f.chats.set_ttl(id, 5); }), engine::ErrorKind::kNotFound);
  f.engine->set_date("Tuesday ");
  f.chats.refresh();
  EXPECT_EQ(f.held(), Texts{"Tuesday rules"});
  EXPECT_EQ(f.chats.get(id).prompt.tokens, 13);
  f.engine->set_date(std::string(600, 'x'));
  f.chats.refresh();
  f.chats.unpin(id);  // also while it is not held
  f.engine->set_date("");
  f.chats.refresh();
  EXPECT_EQ(f.held(), Texts{});
}

TEST(PinnedChats, WhatHasExpiredIsForgotten) {
  Fixture f;
  const std::string id = f.chats.pin(f.chat("rules", 600)).id;
  f.engine->unpin(id);  // as the engine does by itself
  f.engine->set_date("Tuesday ");
  f.chats.refresh();
  EXPECT_EQ(f.held(), Texts{});
  EXPECT_EQ(error_of([&] { f.chats.unpin(id); }), engine::ErrorKind::kNotFound);
}

TEST(PinnedChats, WhatExpiresWhileItIsNotHeldIsForgottenToo) {
  Fixture f;
  f.chats.pin(f.chat("rules", 1));
  f.engine->set_date(std::string(600, 'x'));  // too long for the fake
  f.chats.refresh();
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  f.engine->set_date("Tuesday ");
  f.chats.refresh();
  EXPECT_EQ(f.held(), Texts{});
}

/// Work during which a prompt is computed: begins, and ends when `during` has returned.
void while_pinning(Fixture& f, const std::function<void()>& pin,
                   const std::function<void()>& during) {
  const int before = f.engine->pins_begun;
  f.engine->pins_wait = true;
  std::thread thread(pin);
  while (f.engine->pins_begun == before) std::this_thread::yield();
  during();
  f.engine->pins_wait = false;
  thread.join();
}

TEST(PinnedChats, NobodyWaitsForAPromptThatIsComputed) {
  Fixture f;
  const std::string rules = f.chats.pin(f.chat("rules")).id;
  const std::string laws = f.chats.pin(f.chat("laws")).id;
  while_pinning(
      f, [&] { f.chats.pin(f.chat("customs")); },
      [&] {
        EXPECT_EQ(f.chats.list().size(), 2u);
        EXPECT_EQ(f.chats.get(rules).prompt.name, "rules");
        EXPECT_EQ(f.chats.set_ttl(rules, 60).prompt.id, rules);
        f.chats.unpin(laws);
      });
  EXPECT_EQ(f.held(), (Texts{"rules", "customs"}));
}

TEST(PinnedChats, WhatIsUnpinnedWhileItIsPinnedAnewIsNotHeld) {
  Fixture f;
  const std::string rules = f.chats.pin(f.chat("rules")).id;
  const std::string laws = f.chats.pin(f.chat("laws")).id;
  f.engine->set_date("Tuesday ");
  while_pinning(
      f, [&] { f.chats.refresh(); },
      [&] {
        EXPECT_FALSE(f.chats.get(rules).ready);
        EXPECT_TRUE(f.chats.get(laws).ready);
        f.chats.unpin(rules);
      });
  EXPECT_EQ(f.held(), Texts{"Tuesday laws"});
  EXPECT_EQ(f.chats.list().at(0).prompt.id, laws);
}

TEST(PinnedChats, ATimeToLiveThatIsSetMeanwhileCounts) {
  Fixture f;
  const std::string id = f.chats.pin(f.chat("rules", 600)).id;
  f.engine->set_date("Tuesday ");
  while_pinning(
      f, [&] { f.chats.refresh(); },
      [&] { EXPECT_EQ(f.chats.set_ttl(id, 0).prompt.expires_at, 0); });
  EXPECT_EQ(f.chats.get(id).prompt.expires_at, 0);
  f.engine->set_date("Wednesday ");
  while_pinning(f, [&] { f.chats.refresh(); }, [&] { f.chats.set_ttl(id, 600); });
  EXPECT_NE(f.chats.get(id).prompt.expires_at, 0);
}

TEST(PinnedChats, WhatHasExpiredIsForgottenWithoutRefreshes) {
  Fixture f;
  for (int i = 0; i < 20; ++i) {
    const std::string text = "rules " + std::to_string(i);
    f.engine->unpin(f.chats.pin(f.chat(text, 600)).id);  // as the engine does by itself
    EXPECT_LE(f.chats.known(), 1u);
  }
}

TEST(PinnedChats, TheSameRenderingIsOnePrompt) {
  Fixture f;
  const std::string id = f.chats.pin(f.chat("rules")).id;
  EXPECT_EQ(f.chats.pin(f.chat("rules", 60)).id, id);
  EXPECT_EQ(f.chats.list().size(), 1u);
}

}  // namespace
}  // namespace relay::server
