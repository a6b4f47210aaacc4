"""Each section: FIELDS of its problems, and points(problem, programs). A point is a list of tasks:
what is measured of the same case, so that it can be compared."""

from sections import cuda, kernels, little_model, llama_cpp, operator, quality, serving, trace, vllm

ALL = {
    "kernels": kernels,
    "operator": operator,
    "cuda_operator": cuda,
    "llama_cpp": llama_cpp,
    "vllm_steps": vllm.STEPS,
    "trace": trace,
    "serving": serving,
    "vllm_serving": vllm.SERVING,
    "vllm_throughput": vllm.THROUGHPUT,
    "quality": quality,
    "little_model": little_model,
}
