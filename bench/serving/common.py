"""What the figures share: a server, and what it is asked."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/demo"))  # its servers and users

from servers import Server, clean_environment, free_port  # noqa: E402


def relay_server(args, log: Path, *more: str) -> Server:
    command = [str(args.relay), "serve", "-m", str(args.model), "--port", str(free_port())]
    command += ["--drain-timeout", "0", *more, *args.more]
    return Server("relay serve", command, clean_environment(), log)


def words(tokens: int) -> str:
    """A text of about so many tokens: a short word and a number of three digits are two."""
    return " ".join(f"word {i % 900 + 100}" for i in range(tokens // 2))


def chat(content: str, tokens: int, system: str | None = None) -> dict:
    """A streaming question, whose answer has exactly so many tokens."""
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {
        "messages": messages,
        "max_tokens": tokens,
        "ignore_eos": True,
        "logprobs": True,  # so that a token without a whole character is sent as well
        "stream": True,
        "stream_options": {"include_usage": True},
    }
