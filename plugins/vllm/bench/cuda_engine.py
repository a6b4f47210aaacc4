"""A vLLM engine on a GPU, as the benches drive it: sets of requests from begin to end, so that all
of vLLM's own machinery (CUDA graphs, asynchronous scheduling) is on as ever."""

import math
import time
from dataclasses import dataclass

# For the process of an engine: to look into its workers, and not to compile a sampler for minutes.
ENVIRONMENT = dict(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_USE_FLASHINFER_SAMPLER="0")
# For several GPUs without FlashInfer's all-reduce, which it compiles for minutes at the first start
# and which takes NVLink multicast: the environment, and compilation_config's pass_config, as its
# fusion with the norm is a switch of its own.
OWN_ALLREDUCE = dict(VLLM_ALLREDUCE_USE_FLASHINFER="0")
OWN_ALLREDUCE_PASSES = dict(fuse_allreduce_rms=False)

FEW = 8  # tokens of the shorter call in step()


@dataclass
class Answers:
    seconds: float  # of the whole call
    tokens: int  # generated
    first: list[float]  # seconds to the first token of each request that was answered
    cached: int  # tokens of their prompts that were found in the cache
    unfinished: int  # answers that were stopped


class Engine:
    """One vLLM in this process. Prompts are lists of token ids. samples: answers to each prompt."""

    def __init__(self, model: str, options: dict) -> None:
        from vllm import LLM

        self._llm = LLM(model, disable_log_stats=False, **options)

    def close(self) -> None:
        """Ends vLLM's own processes, for which this one would wait at its end."""
        self._llm.llm_engine.engine_core.shutdown()

    def forget(self) -> None:
        """Empties the cache of prefixes."""
        for _ in range(50):  # the last requests may be on their way out
            if self._llm.reset_prefix_cache():
                return
            time.sleep(0.1)
        raise RuntimeError("vLLM's prefix cache cannot be emptied")

    def answer(
        self,
        prompts: list[list[int]],
        tokens: int | list[int],
        samples: int = 1,
        most_seconds: float = math.inf,
        read_cache: bool = True,
    ) -> Answers:
        """tokens: of every answer, or of each one. most_seconds: what is not answered by then is
        stopped. read_cache=False: each request computes its whole prompt and keeps that KV for
        itself, as in a vLLM without prefix caching."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        engine = self._llm.llm_engine
        begin = time.perf_counter()
        # As LLM.generate() does, which cannot be stopped.
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            parameters = SamplingParams(
                max_tokens=length,
                n=samples,
                temperature=1.0 if samples > 1 else 0.0,
                ignore_eos=True,
                detokenize=False,
                skip_reading_prefix_cache=not read_cache,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(number), dict(prompt_token_ids=prompt), parameters)
        finished = []
        while engine.has_unfinished_requests() and time.perf_counter() - begin < most_seconds:
            finished += [output for output in engine.step() if output.finished]
        seconds = time.perf_counter() - begin
        first = [o.metrics.first_token_latency for o in finished if o.metrics is not None]
        generated = sum(len(answer.token_ids) for o in finished for answer in o.outputs)
        cached = sum(o.num_cached_tokens or 0 for o in finished)
        unfinished, stopped = self._stop()
        return Answers(seconds, generated + stopped, first, cached, unfinished)

    def _stop(self) -> tuple[int, int]:
        """Ends all requests. How many answers those were, and their tokens."""
        engine = self._llm.llm_engine
        states = engine.output_processor.request_states
        count = len(states)
        tokens = sum(state.detokenizer.num_output_tokens() for state in states.values())
        # Samples that are ready wait for the others of their prompt.
        parents = {id(s.parent_req): s.parent_req for s in states.values() if s.parent_req}
        for parent in parents.values():
            tokens += sum(len(o.token_ids) for o in parent.output_aggregator if o is not None)
        engine.abort_request(list(states), internal=True)
        return count, tokens

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
        found = self._watched()
        return found[1:3] if found is not None else None

    def kv_bytes(self) -> tuple[int, int] | None:
        """The same in bytes of all layers of one GPU."""
        found = self._watched()
        return found[3:] if found is not None else None

    def _watched(self) -> tuple[int, ...] | None:
        from relay_attention.cuda import report

        return self._llm.collective_rpc(report.watched_kv_slots)[0]


def _kv_bytes(worker: object) -> int:
    # [num_blocks, kv_heads, block_size, 2 * head_size] of each layer
    return sum(x.shape[1] * x.shape[3] * x.element_size() for x in worker.model_runner.kv_caches)
