"""The page at / in headless Chromium, and the state behind it."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import httpx
import pytest
from conftest import ROOT

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Browser:
    """Chromium over its debugging pipe: no driver, no port."""

    def __init__(self, program, profile):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def place_pipe():
            # Chromium reads from descriptor 3 and writes to 4; the copies keep them apart.
            reader = fcntl.fcntl(to_browser, fcntl.F_DUPFD, 10)
            writer = fcntl.fcntl(from_browser, fcntl.F_DUPFD, 10)
            os.dup2(reader, 3)
            os.dup2(writer, 4)

        self.process = subprocess.Popen(
            [program, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
            + ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}"],
            preexec_fn=place_pipe,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last = 0
        self._session = None
        self.problems = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(answer["params"]["exceptionDetails"])
            elif answer.get("method") == "Log.entryAdded":
                self.problems.append(answer["params"]["entry"])

    def _read(self):
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 60)[0], "the browser does not answer"
            data = os.read(self._in, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url, width, height, scheme):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=url)

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not self.evaluate(f"!!({expression})"):
            assert time.monotonic() < end, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.1)

    def screenshot(self, path):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium; Debian: apt install chromium-headless-shell")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(1280, 900, "light"), (1280, 900, "dark"), (360, 740, "dark")]
)
def test_page(server, client, browser, width, height, scheme):
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )
    browser.problems.clear()
    browser.open(server.url + "/", width, height, scheme)
    browser.wait_for("document.querySelectorAll('#tree tr').length > 0")
    text = browser.evaluate("document.body.innerText")
    assert "rules.txt" in text and "pinned" in text and "without sharing" in text
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(13, 13, 13)") == (scheme == "dark")
    browser.evaluate("at('prompt').value = 'Hi'; at('chat').requestSubmit()")
    browser.wait_for("!at('send').disabled && at('talk').lastChild.className === 'assistant'")
    browser.wait_for("at('talk').lastChild.textContent.length > 1")
    assert browser.problems == []
    shots = ROOT / "build/page"
    shots.mkdir(parents=True, exist_ok=True)
    browser.screenshot(shots / f"{width}-{scheme}.png")


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
