"""Small made-up results of every section, as its tasks would give them."""

from shapes import formula
from tasks import Row


def row(section, case, system, metric, value, better="lower", n=5):
    return Row(section, case, system, metric, "", better, value, 0.95 * value, 1.05 * value, n)


def operator(gain: float) -> list[Row]:
    """Sharing makes batch b `gain` times the formula's speed-up as fast."""
    rows = []
    for prefix in (64, 16384):
        for batch in (1, 32):
            case = dict(model="llama-2-7b", kv_type="f16", prefix=prefix, context=128, batch=batch)
            told = formula(batch, prefix, 128)
            on = 1e-6 * prefix
            off = on * (told * gain if batch > 1 else 1)
            rows += [
                row("operator", case, "relay", "latency", on),
                row("operator", case, "relay-off", "latency", off),
                row("operator", case, "ggml", "latency", 2 * off),
                row("operator", case, "vllm", "latency", 1.5 * off),
                row("operator", case, "vllm with Relay", "latency", 1.1 * on),
                row("operator", case, "cost model", "latency", on, "", 1),
                row("operator", case, "cost model, off", "latency", off, "", 1),
                row("operator", case, "formula", "speed-up", told, "", 1),
            ]
    return rows


def cuda(models=("Llama-2-7B", "Llama-2-13B", "Mistral-7B", "phi-2", "Llama-3.2-1B")) -> list[Row]:
    """A sweep of some models, half of the formula's speed-up, and a case that is no model's."""
    rows = []
    for model in (*models, "8/1x128"):
        for prefix in (64, 1024, 32768):
            for batch in (1, 8, 32, 64):
                heads = "8/1x128" if "/" in model else "32/32x128"
                case = dict(model=model, heads=heads, levels=f"[[{prefix}, 1]]", prefix=prefix,
                            context=128, batch=batch)  # fmt: skip
                told = formula(batch, prefix, 128)
                on = 4e-6 + 5e-9 * (prefix + 128 * batch)
                rows += [
                    row("cuda_operator", case, "relay", "latency", on, n=9),
                    row("cuda_operator", case, "relay-off", "latency", max(1, told / 2) * on, n=9),
                    row("cuda_operator", case, "fa3", "latency", max(1, told / 1.8) * on, n=9),
                    row("cuda_operator", case, "fi", "latency", max(1.1, told / 3) * on, n=9),
                    row("cuda_operator", case, "fi-cascade", "latency", 2 * on, n=9),
                    row("cuda_operator", case, "formula", "speed-up", told, "", 1),
                    row("cuda_operator", case, "limit", "latency", 0.7 * on, "", 1),
                ]
    return rows


def engines(section: str, case: dict, speeds: dict[str, float], n=3) -> list[Row]:
    """What clients see of engines of these speeds, in tokens/s."""
    rows = [row(section, case, s, "own prompt, mean", 9.1, "", 1) for s in speeds]
    rows += [row(section, case, s, "answer, mean", 17.2, "", 1) for s in speeds]
    for system, speed in speeds.items():
        rows.append(row(section, case, system, "output throughput", speed, "higher", n))
        rows.append(row(section, case, system, "cached share of prompts", 0.5, "", n))
        for p, factor in ((50, 1.0), (95, 1.5), (99, 1.7)):
            for metric in ("normalised latency", "time to first token", "inter-token latency"):
                rows.append(row(section, case, system, f"{metric} p{p}", factor / speed, n=n))
        rows.append(row(section, case, system, "KV held", 2**30 / speed, n=1))
        rows.append(row(section, case, system, "resident memory", 2**30, n=n))
    return rows


def served(experiment: str, **more) -> dict:
    return dict(
        experiment=experiment, model="llama-3.2-1b", layers=4, weights="q4_0", kv_type="f16",
        prompt=64, prompts=1, levels="1x64", without=0.0, requests=16, parallel=8,
    ) | more  # fmt: skip


THREE = {"relay": 100.0, "relay-off": 80.0, "llama-server": 50.0}


def throughput(sharing: float = 1.25) -> list[Row]:
    speeds = THREE | {"relay-off": 100 / sharing}
    rows = []
    for prompt in (64, 512, 2048):
        rows += engines("serving", served("throughput", prompt=prompt), speeds)
    other = served("throughput", model="llama-2-7b", layers=2, prompt=4096)
    rows += engines("serving", other, {s: v / 3 for s, v in speeds.items()})
    for found in [r for r in rows if r.metric == "output throughput"]:
        rows.append(row("serving", found.case, found.system, "price", 9 / found.median, n=3))
        rows.append(row("serving", found.case, found.system, "price of an hour", 0.09, "", 1))
    return rows


def arrivals(latencies: dict[str, tuple], section="serving", bound=0.2) -> list[Row]:
    """p95 of normalised latency at 1, 2 and 4 requests a second."""
    rows = []
    for system, seconds in latencies.items():
        for rate, latency in zip((1.0, 2.0, 4.0), seconds, strict=False):
            case = served("arrivals", rate=rate)
            rows += engines(section, case, {system: 1.5 / latency})
            if bound:
                rows.append(row(section, case, system, "bound", bound, "", 1))
    return rows


def over(experiment: str, field: str, values: list, speeds=THREE) -> list[Row]:
    rows = []
    for i, value in enumerate(values, 1):
        case = served(experiment, **{field: value})
        rows += engines("serving", case, {s: v / i for s, v in speeds.items()})
    return rows


def vllm(prompts=(1,), rates=("all at once", 0.3), n=3) -> list[Row]:
    rows = []
    speeds = {"vllm": 24.0, "vllm with Relay": 30.0, "vllm, no prefix caching": 6.0}
    for count in prompts:
        for rate in rates:
            case = dict(model="llama-1b", prompt=512, prompts=count, rate=rate, requests=16,
                        concurrency=16)  # fmt: skip
            rows += engines("vllm_serving", case, speeds, n)
    return rows


def vllm_steps(prefixes=(1024,), batches=(1, 8, 16)) -> list[Row]:
    return [
        row("vllm_steps", dict(model="llama-1b", prefix=prefix, context=16, batch=batch), system,
            "decode step", 0.1 * scale * (1 + batch / 16))
        for prefix in prefixes
        for batch in batches
        for system, scale in (("vllm", 1.0), ("vllm with Relay", 0.9))
    ]  # fmt: skip


def trace_steps() -> list[dict]:
    """As `relay bench trace` tells them: two levels, and in some steps a third."""
    steps = []
    for i in range(60):
        levels = [(100 + 5 * (i % 7), 2), (20, 8)] + [(10, 5)] * (i % 10 == 0)
        shared = sum(attended for attended, _ in levels)
        steps.append(dict(
            time=60.0 * i, batch=50, kv_slots_attended=1000, seconds_on=0.9, seconds_off=1.0,
            kv_slots_read=1000 - shared + sum(read for _, read in levels),
            levels=[dict(kv_slots_attended=a, kv_slots_read=r) for a, r in levels],
        ))  # fmt: skip
    return steps


def trace() -> list[Row]:
    from sections import trace as section

    case = dict(trace="t.jsonl", model="mistral-7b", token_ms=50.0, max_batch=0, kv_type="f16")
    steps = trace_steps()
    return section.rows_of(case, dict(steps=steps, mean=steps[0]))


def errors() -> list[Row]:
    found = {"f16": (1e-6, 7e-3, 4e-4), "bf16": (3.7e-3, 3.5e-3, 3.6e-3), "q8_0": (5e-3, 1e-2)}
    return [
        row("quality", dict(what="operator", kv_type=kv_type, heads=8, kv_heads=2, head_dim=128,
                            slots=4096, rows=32, values=kind, phase="decode"),
            system, "relative rms error", error * scale, n=1)
        for kv_type, values in found.items()
        for kind, scale in (("realistic", 1.0), ("flat", 1e-2))
        for system, error in zip(("relay", "ggml", "ggml, -fa off"), values, strict=False)
    ]  # fmt: skip


def answers(same: float, margin: float | None) -> list[Row]:
    case = dict(what="answers", model="llama-3.2-1b", kv_type="f16", prompt=1024, layers=4,
                weights="q8_0", requests=8, tokens=16, against="llama.cpp")  # fmt: skip
    found = {
        "greedy answers the same": same, "greedy tokens the same": same,
        "largest log-probability difference": 0.2, "mean KL divergence": 1e-4,
        "largest KL divergence": 1e-3,
    } | ({} if margin is None else {"largest margin where answers part": margin})  # fmt: skip
    return [row("quality", case, "relay", metric, value, n=1) for metric, value in found.items()]


def little_model() -> list[Row]:
    systems = {"relay": (63, 64), "relay-off": (63, 64), "vllm": (62, 64),
               "relay, tuned prefix": (24, 24)}  # fmt: skip
    return [
        row("little_model", dict(model="little", questions=questions), system, "answers right",
            right / questions, "higher", 1)
        for system, (right, questions) in systems.items()
    ]  # fmt: skip


def llama_cpp() -> list[Row]:
    return [
        row("llama_cpp", dict(model="llama-3.2-1b", prefix=1024, batch=batch), system,
            "decode speed", speed * batch, "higher")
        for batch in (1, 32)
        for system, speed in (("llama.cpp", 10.0), ("llama.cpp, -fa off", 8.0),
                              ("llama.cpp with Relay", 15.0))
    ]  # fmt: skip


def kernels() -> list[Row]:
    return [
        row("kernels", dict(kernel=f"f16/d:64/rows:{rows}"), "relay", "time", 1e-6 * rows, n=3)
        for rows in (1, 32)
    ] + [row("kernels", dict(kernel="peak/iterations:1"), "relay", "time", 1.0, n=3)]
