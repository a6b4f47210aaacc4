"""Users who ask at the same time, and what each of them sees."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from console import DemoError, Ticker
from servers import Server

# What each user wants to know; the numbers make every request different.
QUESTIONS = [
    "May I sell copies of a program that I changed, and what must go with them?",
    "Which duties begin when I give somebody only the compiled program?",
    "What happens to my rights if I break the terms once and then stop?",
    "Does running the program on my own machines need anybody's permission?",
    "How are patents of contributors treated?",
    "What counts as the corresponding source, and what does not?",
    "May I add terms of my own, and which ones?",
    "Who gives a warranty for the program?",
]

# Seconds. Where a server computes a long prompt once for each of many users, the last one waits for
# half an hour.
LONGEST_WAIT = 3600


@dataclass
class Answer:
    """What one user saw. Times in seconds since the round began."""

    user: int
    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of what was sent, text or not
    error: str = ""
    retry_after: float = 0.0  # with an error: what the server asks to wait, 0 if it does not say

    @property
    def text(self) -> str:
        return "".join(self.pieces)


CHAT = "/v1/chat/completions"


def ask(server: Server, body: dict, answer: Answer, begin: float, path: str = CHAT) -> None:
    """Sends one streaming request and fills `answer`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONGEST_WAIT)
    try:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"{response.status} {response.read(500).decode(errors='replace')}"
            answer.retry_after = float(response.getheader("Retry-After", "0"))
            return
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                break
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = json.dumps(event["error"])
                return
            now = time.monotonic() - begin
            if event.get("choices"):
                answer.times.append(now)
            for choice in event.get("choices", []):
                delta = choice.get("delta") or {}
                piece = delta.get("content") or delta.get("reasoning_content") or choice.get("text")
                if piece:
                    answer.first = answer.first or now
                    answer.last = now
                    answer.pieces.append(piece)
            if usage := event.get("usage"):
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.completion_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                answer.cached_tokens = details.get("cached_tokens", 0)
        if not answer.completion_tokens:
            answer.error = "the stream ended without a usage"
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.error = repr(error)
    finally:
        connection.close()


def chat_body(prompt: str, user: int, round_number: int, tokens: int) -> dict:
    question = QUESTIONS[user % len(QUESTIONS)]
    return {
        "messages": [
            {"role": "system", "content": prompt},
            {"role": "user", "content": f"Question {round_number}.{user}: {question}"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }


def at_once(server: Server, client: Callable[..., None], arguments: list[tuple]) -> None:
    """client(*each) in a thread of its own; raises if the server ends before they do."""
    threads = [threading.Thread(target=client, args=each, daemon=True) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # short, so that Ctrl-C is heard
            server.check_alive()


def run_round(server: Server, bodies: list[dict], label: str) -> list[Answer]:
    answers = [Answer(user) for user in range(len(bodies))]
    begin = time.monotonic()

    def status() -> str:
        begun = sum(1 for answer in answers if answer.pieces)
        pieces = sum(len(answer.pieces) for answer in answers)
        return f"{label}: {begun} of {len(answers)} users served, about {pieces} tokens"

    with Ticker(status):
        asked = zip(bodies, answers, strict=True)
        at_once(server, ask, [(server, body, answer, begin) for body, answer in asked])
    if failed := [answer for answer in answers if answer.error]:
        raise DemoError(
            f"{server.name}: {len(failed)} of {len(answers)} requests failed, the first with\n"
            f"    {failed[0].error}"
        )
    return answers
