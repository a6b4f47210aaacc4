"""Each section: FIELDS of its problems, and tasks(problem, programs)."""

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
    "quality": quality,
    "little_model": little_model,
}
