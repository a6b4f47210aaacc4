"""One vLLM engine on a GPU in a process of its own, so that each starts with a GPU of its own.

Its arguments are a file with what remote.py asks, and the file that remote.py gets, both pickled.
"""

import pickle
import sys
import time
from pathlib import Path

import arrivals
import engines
import torch
from relay_attention.cuda import report


def _forbid_waiting() -> None:
    """Whatever waits for the GPU in what Relay does to a step raises. torch knows of its own calls;
    what the native library enqueues is captured in CUDA graphs, where waiting is an error."""
    from relay_attention.cuda import backend

    def forbid(function):
        def wrapped(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return wrapped

    builder, impl = backend.RelayFlashAttentionMetadataBuilder, backend.RelayFlashAttentionImpl
    builder.build = forbid(builder.build)
    impl.forward = forbid(impl.forward)


def main() -> None:
    request = pickle.loads(Path(sys.argv[1]).read_bytes())
    if request["forbid_waiting"]:
        _forbid_waiting()
    begin = time.perf_counter()
    with engines.engine(request["model"], relay=request["relay"], **request["options"]) as llm:
        print(f"engine: {time.perf_counter() - begin:.1f} s to start", flush=True)
        served = engines.served_layers(llm)
        if request["arrivals"]:
            outcome = arrivals.run(llm, request["arrivals"], torch.cuda.memory_allocated)
            answers, preempted, memory = [outcome.answers], outcome.preempted, outcome.memory
        else:
            preempted, memory = 0, []
            answers = [
                engines.generate(llm, prompts, tokens, **sampling)
                for prompts, tokens, sampling in request["calls"]
            ]
        plans, read, attended = llm.collective_rpc(report.kv_slots)[0]
    Path(sys.argv[2]).write_bytes(
        pickle.dumps(
            dict(
                answers=answers,
                served=served,
                plans=plans,
                read=read,
                attended=attended,
                preempted=preempted,
                memory=memory,
            )
        )
    )
    print(f"engine: served {served}, {plans} plans, the last read {read} of {attended} KV slots")


if __name__ == "__main__":
    main()
