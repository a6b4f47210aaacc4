"""A vLLM engine on a GPU, as the benches drive it: whole calls of generate(), so that all of vLLM's
own machinery (CUDA graphs, asynchronous scheduling) is on as ever."""

import time
from dataclasses import dataclass

# For the process of an engine: to look into its workers, and not to compile a sampler for minutes.
ENVIRONMENT = dict(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_USE_FLASHINFER_SAMPLER="0")

FEW = 8  # tokens of the shorter call in step()


@dataclass
class Answers:
    seconds: float  # of the whole call
    tokens: int  # generated
    first: list[float]  # seconds to the first token of each request


class Engine:
    """One vLLM in this process. Prompts are lists of token ids. samples: answers to each prompt."""

    def __init__(self, model: str, options: dict) -> None:
        from vllm import LLM

        self._llm = LLM(model, disable_log_stats=False, **options)

    def close(self) -> None:
        """Ends vLLM's own processes, for which this one would wait at its end."""
        self._llm.llm_engine.engine_core.shutdown()

    def answer(
        self, prompts: list[list[int]], tokens: int | list[int], samples: int = 1
    ) -> Answers:
        """tokens: of every answer, or of each one."""
        from vllm import SamplingParams

        lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        parameters = [
            SamplingParams(
                max_tokens=length,
                n=samples,
                temperature=1.0 if samples > 1 else 0.0,
                ignore_eos=True,
                detokenize=False,
            )
            for length in lengths
        ]
        requests = [dict(prompt_token_ids=p) for p in prompts]
        begin = time.perf_counter()
        outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        seconds = time.perf_counter() - begin
        first = [o.metrics.first_token_latency for o in outputs if o.metrics is not None]
        generated = sum(len(answer.token_ids) for o in outputs for answer in o.outputs)
        return Answers(seconds, generated, first)

    def step(self, prompts: list[list[int]], steps: int, samples: int = 1) -> float:
        """Seconds of a decode step: what a call that is `steps` tokens longer takes more."""
        few = self.answer(prompts, FEW, samples).seconds
        return (self.answer(prompts, FEW + steps, samples).seconds - few) / steps

    def kv_bytes_of_a_slot(self) -> int:
        """Bytes of one token's KV in all layers of one GPU."""
        return self._llm.collective_rpc(_kv_bytes)[0]

    def watch_kv_slots(self, requests: int) -> None:
        """Looks at the next step with so many requests."""
        from relay_attention.cuda import report

        self._llm.collective_rpc(report.watch_kv_slots, args=(requests,))

    def kv_slots(self) -> tuple[int, int] | None:
        """KV slots of a layer that the plans of the watched step read, and would read if nothing
        were shared, summed over kinds of layers. None if Relay attended no such step."""
        from relay_attention.cuda import report

        found = self._llm.collective_rpc(report.watched_kv_slots)[0]
        return found[1:] if found is not None else None


def _kv_bytes(worker: object) -> int:
    # [num_blocks, kv_heads, block_size, 2 * head_size] of each layer
    return sum(x.shape[1] * x.shape[3] * x.element_size() for x in worker.model_runner.kv_caches)
