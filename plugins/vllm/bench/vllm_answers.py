"""A whole vLLM, with Relay and without: what it answers.

    ~/.cache/relay/vllm-0.32.0/bin/python plugins/vllm/bench/vllm_answers.py --prefix 1024

Requests over one prompt are answered greedily by either, one after the other, with the log-
probabilities of the likeliest tokens. The model's weights are random and the same for both. Prints
how many answers and tokens are the same; --json keeps everything.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
from pathlib import Path

from shapes import SHAPES, VOCABULARY, write_config
from turns import Remote


class Engine:
    """One vLLM in this process."""

    def __init__(self, model: str, options: dict) -> None:
        from vllm import LLM

        self._llm = LLM(model, skip_tokenizer_init=True, **options)

    def served_by(self) -> str:
        runner = self._llm.llm_engine.model_executor.driver_worker.model_runner
        return runner.attn_groups[0][0].backend.__name__

    def answer(self, prompts: list[list[int]], tokens: int, logprobs: int) -> list[dict]:
        """Of each prompt the tokens, and the likeliest ones' log-probabilities at each."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        requests = [dict(prompt_token_ids=prompt) for prompt in prompts]
        answers = [o.outputs[0] for o in self._llm.generate(requests, parameters, use_tqdm=False)]
        return [
            dict(
                tokens=list(answer.token_ids),
                top_logprobs=[{t: p.logprob for t, p in at.items()} for at in answer.logprobs],
            )
            for answer in answers
        ]


def write_weights(folder: Path, dtype: str) -> None:
    """Random ones, as models are initialised. vLLM's dummies are so small that every token is as
    likely as any other, whatever attention computes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer of them")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of the prompt (1024)")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--own", type=int, default=32, help="tokens of a request's own (32)")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (16)")
    parser.add_argument("--logprobs", type=int, default=20, help="of so many tokens (20)")
    parser.add_argument("--json", help="write the answers here")
    args = parser.parse_args()

    multiprocessing.set_start_method("spawn")
    shape = dict(SHAPES[args.shape])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    longest = args.prefix + args.own + args.tokens + 1
    per_token = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    kv_tokens = args.prefix + args.requests * (args.own + args.tokens + 256)
    options = dict(
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=longest,
        max_num_seqs=args.requests,
        max_logprobs=args.logprobs,
        kv_cache_memory_bytes=kv_tokens * per_token * (2 if args.dtype == "float32" else 1),
        disable_log_stats=True,
    )
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    source = random.Random(f"{args.prefix}")
    words = lambda count: [source.randrange(3, VOCABULARY) for _ in range(count)]  # noqa: E731
    shared = words(args.prefix)
    prompts = [shared + words(args.own) for _ in range(args.requests)]
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), longest, shape)
        write_weights(Path(folder), args.dtype)
        for name in ("vllm", "relay"):
            engine = Remote(name == "relay", Engine, folder, options, **environment).ready()
            backend = engine.call("served_by")
            if ("Relay" in backend) != (name == "relay"):
                raise SystemExit(f"vLLM uses {backend}: python -m relay_attention.doctor says why")
            engine.call("answer", prompts[:1], 1, 0)  # so that the prompt is there for all
            answers[name] = engine.call("answer", prompts, args.tokens, args.logprobs)
            engine.close()
    pairs = list(zip(answers["vllm"], answers["relay"], strict=True))
    same = sum(a["tokens"] == b["tokens"] for a, b in pairs)
    tokens = sum(x == y for a, b in pairs for x, y in zip(a["tokens"], b["tokens"], strict=True))
    print(f"{same} of {len(pairs)} answers and {tokens} of {len(pairs) * args.tokens} tokens equal")
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | answers))


if __name__ == "__main__":
    main()
