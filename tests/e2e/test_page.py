"""The page at / in headless Chromium, and the state behind it."""

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import LONG_PROMPT, ROOT, eventually
from playwright.sync_api import expect, sync_playwright
from test_lora import files  # noqa: F401 (a fixture)

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SIZES = {"desk": (1280, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium; on Debian scripts/setup.sh installs chromium-headless-shell")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


class Page:
    """The page of a server, and what the browser complains of."""

    def __init__(self, browser, server, size="desk", scheme="light"):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            is_mobile=size == "phone",
            has_touch=size == "phone",
        )
        self.page = self.context.new_page()
        self.problems = []
        self.requests = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url + "/")

    def _on_console(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def ask(self, text):
        answers = self.page.locator("#talk .assistant")
        count = answers.count()
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_role("button", name="Send").click()
        expect(answers).to_have_count(count + 1)
        expect(answers.last).to_have_text(re.compile(r"\S{3}"), timeout=60000)
        # The model talks on and on.
        self.page.get_by_role("button", name="Stop").click()
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()

    def screenshot(self, name):
        folder = ROOT / "build/page"
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.fixture
def open_page(browser):
    pages = []

    def open_one(*arguments):
        pages.append(Page(browser, *arguments))
        return pages[-1]

    yield open_one
    for page in pages:
        page.context.close()


# Of all texts that are seen, those that WCAG 2 (AA) would call hard to read.
FAINT_TEXTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = channels(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.disabled) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(channels(style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(element.textContent.trim() + ": " + ratio.toFixed(2));
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_page(server, client, open_page, size, scheme):
    opened = open_page(server, size, scheme)
    page = opened.page
    seen = threading.Event()

    def chat(i):
        stream = client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "system", "content": LONG_PROMPT},
                {"role": "user", "content": f"Question {i}"},
            ],
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            for _ in stream:
                if seen.is_set():
                    break

    with ThreadPoolExecutor(4) as pool:
        chats = [pool.submit(chat, i) for i in range(4)]
        try:
            expect(page.locator("#group")).to_have_text("4", timeout=30000)
            expect(page.locator("#group-label")).to_contain_text("share one prefix of")
            expect(page.locator("#tree tr.shared")).not_to_have_count(0)
            expect(page.locator("#running")).to_have_text("4")
            opened.screenshot(f"{size}-{scheme}")
        finally:
            seen.set()
        for running in chats:
            running.result()
    expect(page.locator("#running")).to_have_text("0")

    text = page.inner_text("main")
    for part in ("rules.txt", "pinned", "without sharing", "Relay", "tokens/s"):
        assert part in text
    opened.ask("Hello")
    eventually(lambda: server.metric("vllm:num_requests_running") == 0, 5)
    opened.ask("A word that is far too long for a phone: " + "donau" * 40)
    opened.screenshot(f"{size}-{scheme}-chat")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert page.evaluate(FAINT_TEXTS) == []
    assert page.locator("#tree-section").bounding_box()["height"] < 600, "however long the tree"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(13, 13, 13)") == (scheme == "dark")
    assert opened.problems == []
    assert all(url.startswith((server.url, "data:")) for url in opened.requests)


def test_page_with_keys(start_server, open_page):
    server = start_server("--api-key", "user", "--admin-key", "admin", "-c", "2048")
    opened = open_page(server, "phone")
    page = opened.page
    key = page.get_by_label("API key")
    expect(key).to_be_visible()
    expect(page.locator("#figures")).to_be_hidden()
    key.fill("user")
    page.get_by_role("button", name="Use").click()
    expect(page.locator("#status")).to_have_text("the state is for admins")
    opened.ask("Hello")
    opened.screenshot("phone-keys")
    key.fill("admin")
    page.get_by_role("button", name="Use").click()
    expect(page.locator("#figures")).to_be_visible()
    expect(page.locator("#keys")).to_be_hidden()
    assert server.stop() == 0
    expect(page.locator("#status")).to_have_text("the server does not answer", timeout=20000)


def test_a_new_key_takes_over_from_a_look_under_way(start_server, open_page):
    server = start_server("--admin-key", "admin", "-c", "2048")
    page = open_page(server).page
    key = page.get_by_label("API key")
    expect(key).to_be_visible()
    looks = []

    def answer_the_second(look):
        looks.append(look)
        if len(looks) == 2:
            look.continue_()

    page.route("**/state", answer_the_second)
    eventually(lambda: page.wait_for_timeout(50) or looks, 20)  # without a key
    key.fill("admin")
    page.get_by_role("button", name="Use").click()
    expect(page.locator("#figures")).to_be_visible()
    looks[0].fulfill(status=401, json={"error": {"message": "no key"}})
    page.wait_for_timeout(500)
    expect(page.locator("#keys")).to_be_hidden()
    assert server.stop() == 0


def test_chat_shows_thoughts_until_the_reply_begins(server, open_page):
    page = open_page(server).page

    def ask(*deltas):
        frames = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        text = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames) + "data: [DONE]\n\n"
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(content_type="text/event-stream", body=text),
        )
        page.get_by_label("Message").fill("Hello")
        page.get_by_role("button", name="Send").click()
        return page.locator("#talk .assistant").last

    line = ask({"reasoning_content": "Let me "}, {"reasoning_content": "think."})
    expect(line).to_have_text("Let me think.")
    expect(line).to_have_class("assistant thoughts")
    line = ask({"reasoning_content": "Hm."}, {"content": "Four."})
    expect(line).to_have_text("Four.")
    expect(line).to_have_class("assistant")


def test_page_of_several_models(start_server, open_page, files):  # noqa: F811
    server = start_server("--lora", files["polite"], "-c", "2048", "--max-model-len", "512")
    opened = open_page(server, "phone")
    page = opened.page
    choice = page.get_by_label("Model", exact=True)
    expect(choice.locator("option")).to_have_text(["tiny", "polite"])
    opened.ask("Hello")
    choice.select_option("polite")
    with page.expect_request("**/v1/chat/completions") as asked:
        opened.ask("Hello again")
    assert asked.value.post_data_json["model"] == "polite"
    expect(page.locator("#tree-model")).to_be_visible()
    for name in ("tiny", "polite"):
        expect(page.locator("#tree").get_by_role("cell", name=name, exact=True)).not_to_have_count(
            0
        )
    opened.screenshot("phone-models")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"][0]
    assert page.evaluate(FAINT_TEXTS) == []
    assert opened.problems == []
    assert server.stop() == 0


def test_state_is_for_operators(server, start_server):
    open_to_all = httpx.get(server.url + "/state", timeout=30)
    assert open_to_all.status_code == 200
    state = open_to_all.json()
    assert sum(node["pinned"] for node in state["prefix_tree"]) >= 1
    assert state["kv_bytes_read"] <= state["kv_bytes_read_unshared"]
    kept = start_server("--api-key", "user", "--admin-key", "admin", "-c", "2048")
    assert httpx.get(kept.url + "/", timeout=30).status_code == 200, "the page itself tells nothing"
    for key, status in ((None, 401), ("user", 403), ("admin", 200)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert httpx.get(kept.url + "/state", headers=headers, timeout=30).status_code == status
    assert kept.stop() == 0
