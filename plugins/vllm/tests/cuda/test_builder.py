"""What a builder tells the native library in each step. The library only writes it down, so that no
GPU is needed, and FlashAttention's own half is replaced too."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from relay_attention.cuda import backend, native, served
from relay_attention.cuda.operator import Operator
from relay_attention.cuda.plan import Kind
from relay_attention.errors import RelayError
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)


class Library:
    """librelay-cuda that serves up to `most` requests; `calls` are (name, what it was told)."""

    def __init__(self, most: int = 1024) -> None:
        self.most = most
        self.calls: list[tuple[str, dict]] = []

    def _write(self, name: str, struct: ctypes.Structure) -> int:
        self.calls.append((name, {f: getattr(struct, f) for f, *_ in struct._fields_}))
        return 0

    def named(self, name: str) -> list[dict]:
        return [told for called, told in self.calls if called == name]

    def relay_cuda_workspace_bytes(self, options, size):
        size.value = 4096
        return 0 if options.max_requests <= self.most else 1

    def relay_cuda_plan_create(self, handle, options, workspace, size, stream):
        handle.value = 1
        return self._write("create", options)

    def relay_cuda_plan_batch(self, handle, batch, stream):
        return self._write("batch", batch)

    def relay_cuda_attend(self, handle, inputs, stream):
        return self._write("attend", inputs)

    def relay_cuda_plan_free(self, handle):
        pass

    def relay_cuda_last_error(self):
        return b"too large"


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(native, "library", lambda: made)
    monkeypatch.setattr(backend, "_stream", lambda device: 0)
    return made


def layer(q_heads: int = 8, window: int = 0, operator: bool = True, sinks=None) -> SimpleNamespace:
    """NHD in memory, as vLLM allocates by default."""
    cache = torch.zeros(100, 16, 2, 256, dtype=torch.bfloat16).transpose(1, 2)
    made = Operator(q_heads, 2, 128, 0.1, window=window) if operator else None
    impl = SimpleNamespace(operator=made, sinks=sinks, kv_cache_dtype="auto")
    return SimpleNamespace(impl=impl, kv_cache=cache)


@pytest.fixture
def make_builder(library, monkeypatch):
    def own_init(self, spec, names, config, device):
        self.kv_cache_spec, self.vllm_config, self.max_cudagraph_size = spec, config, 512

    def own_build(self, prefix, common, fast_build=False):
        self.own_plan = self._get_scheduler_metadata(aot_schedule=True)
        return FlashAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=None,
        )

    own = FlashAttentionMetadataBuilder
    monkeypatch.setattr(own, "__init__", own_init)
    monkeypatch.setattr(own, "build", own_build)
    monkeypatch.setattr(own, "_get_scheduler_metadata", lambda self, **_: "FlashAttention's")
    monkeypatch.setattr(served, "has_one_scale", lambda layer: True)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=1024, max_num_batched_tokens=8192),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        speculative_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
    )
    spec = SimpleNamespace(num_kv_heads=2, head_size=128, block_size=16)

    def make(*layers, kind=backend.RelayFlashAttentionMetadataBuilder):
        found = {str(i): x for i, x in enumerate(layers)}
        monkeypatch.setattr(backend, "get_layers_from_vllm_config", lambda *_: found)
        return kind(spec, list(found), config, torch.device("cpu"))

    return make


def step(rows: list[int], lengths: list[int]) -> SimpleNamespace:
    starts = torch.tensor(np.cumsum([0, *rows]), dtype=torch.int32)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=len(rows),
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        max_seq_len=int(lengths.max()),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        block_table_tensor=torch.zeros(len(rows), 32, dtype=torch.int32),
        causal=True,
    )


DECODE = ([1] * 4, [100] * 4)
PROMPT = ([512], [512])


def test_plans_each_step_once_for_each_kind_of_layer(make_builder, library):
    builder = make_builder(layer(), layer(), layer(window=64))
    common = step(*DECODE)
    metadata = builder.build(0, common)
    assert set(metadata.plans) == {Kind(8, 0), Kind(8, 64)}
    assert sorted(x["window"] for x in library.named("create")) == [0, 64]
    for told in library.named("create"):
        limits = [told[f"max_{x}"] for x in ("requests", "rows", "blocks")]
        assert limits == [1024, 8192, 32]
        assert (told["cache_blocks"], told["block_size"], told["head_dim"]) == (100, 16, 128)
    assert len(library.named("batch")) == 2
    for told in library.named("batch"):
        assert (told["requests"], told["rows"], told["table_stride"]) == (4, 4, 32)
        assert told["query_starts"] == common.query_start_loc.data_ptr()
        assert told["kv_lengths"] == common.seq_lens.data_ptr()
        assert told["table"] == common.block_table_tensor.data_ptr()
    builder.build(0, step(*DECODE))
    assert (len(library.named("create")), len(library.named("batch"))) == (2, 4)


def test_flash_attention_plans_only_what_it_attends(make_builder):
    builder = make_builder(layer(), layer())
    assert builder.build(0, step(*DECODE)).plans and builder.own_plan is None
    assert builder.build(0, step(*PROMPT)).plans is None
    assert builder.own_plan == "FlashAttention's"
    mixed = make_builder(layer(), layer(operator=False))
    assert mixed.build(0, step(*DECODE)).plans
    assert mixed.own_plan == "FlashAttention's"


def test_a_draft_step_within_a_graph_is_planned_in_it(make_builder, library, monkeypatch):
    monkeypatch.setattr(
        FlashAttentionMetadataBuilder, "update_draft_decode_metadata", lambda self, metadata: None
    )
    builder = make_builder(layer())
    metadata = builder.build(0, step(*DECODE))
    builder.update_draft_decode_metadata(metadata)
    assert len(library.named("batch")) == 2
    builder.update_draft_decode_metadata(builder.build(0, step(*PROMPT)))
    assert len(library.named("batch")) == 2


def test_long_contexts_leave_room_for_fewer_requests(make_builder, library):
    library.most = 300
    builder = make_builder(layer())
    assert builder.build(0, step(*DECODE)).plans
    assert library.named("create")[0]["max_requests"] == 256
    assert builder.build(0, step([1] * 257, [100] * 257)).plans is None


def test_what_cannot_be_planned_is_left_to_flash_attention(make_builder, library):
    library.most = 0
    builder = make_builder(layer())
    for _ in range(2):
        assert not hasattr(builder.build(0, step(*DECODE)), "plans")
    assert builder.own_plan == "FlashAttention's"


def test_without_memory_for_a_workspace_flash_attention_goes_on(make_builder, library, monkeypatch):
    builder = make_builder(layer())

    def empty(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    assert not hasattr(builder.build(0, step(*DECODE)), "plans")
    assert builder.own_plan == "FlashAttention's"
    assert library.named("create") == []


def test_a_builder_that_vllm_changed_is_left_alone(make_builder, library):
    class Changed(backend.RelayFlashAttentionMetadataBuilder):
        pass

    assert not hasattr(make_builder(layer(), kind=Changed).build(0, step(*DECODE)), "plans")
    assert library.calls == []


def test_sinks_are_read_anew_each_step(make_builder, library):
    sinks = torch.zeros(8, dtype=torch.bfloat16)
    served_layer = layer(sinks=sinks)
    builder = make_builder(served_layer)
    sinks.data.fill_(1.5)  # as loading weights does
    metadata = builder.build(0, step(*DECODE))
    query, output = torch.zeros(2, 4, 8, 128, dtype=torch.bfloat16)
    operator = served_layer.impl.operator
    operator.attend(query, served_layer.kv_cache, output, metadata.plans[operator.kind], 0)
    told = library.named("attend")[0]
    assert list((ctypes.c_float * 8).from_address(told["sinks"])) == [1.5] * 8


@pytest.mark.parametrize("queries", [torch.bfloat16, torch.float8_e4m3fn])
def test_fp8_queries_are_read_as_they_are(make_builder, library, queries):
    fp8 = layer()
    fp8.impl.kv_cache_dtype = "fp8"
    fp8.kv_cache = fp8.kv_cache.to(torch.float8_e4m3fn)
    fp8._q_scale, fp8._k_scale, fp8._v_scale = torch.tensor([[0.5], [0.25], [2.0]])
    metadata = make_builder(fp8).build(0, step(*DECODE))
    query = torch.zeros(4, 8, 128, dtype=queries)
    output = torch.zeros(4, 8, 128, dtype=torch.bfloat16)
    operator = fp8.impl.operator
    operator.attend(query, fp8.kv_cache, output, metadata.plans[operator.kind], 0)
    told = library.named("attend")[0]
    size = query.element_size()
    assert (told["q_row_stride"], told["q_head_stride"]) == (8 * 128 * size, 128 * size)
    assert (told["out_row_stride"], told["out_head_stride"]) == (8 * 256, 256)
    assert told["q_scale"] == (fp8._q_scale.data_ptr() if size == 1 else None)
    scales = (told["k_scale"], told["v_scale"])
    assert scales == (fp8._k_scale.data_ptr(), fp8._v_scale.data_ptr())


def test_queries_of_another_type_than_the_output_are_refused(make_builder, library):
    served_layer = layer()
    metadata = make_builder(served_layer).build(0, step(*DECODE))
    query = torch.zeros(4, 8, 128, dtype=torch.float8_e4m3fn)
    output = torch.zeros(4, 8, 128, dtype=torch.bfloat16)
    operator = served_layer.impl.operator
    with pytest.raises(RelayError, match="float8"):
        operator.attend(query, served_layer.kv_cache, output, metadata.plans[operator.kind], 0)


def test_strides_are_those_of_the_cache_in_memory(make_builder, library):
    served_layer = layer()
    metadata = make_builder(served_layer).build(0, step(*DECODE))
    query = torch.zeros(4, 12, 128, dtype=torch.bfloat16)[:, :8]  # of a fused projection
    output = torch.zeros(4, 8, 128, dtype=torch.bfloat16)
    operator = served_layer.impl.operator
    operator.attend(query, served_layer.kv_cache, output, metadata.plans[operator.kind], 0)
    told = library.named("attend")[0]
    assert (told["q_row_stride"], told["q_head_stride"]) == (12 * 256, 256)
    assert (told["out_row_stride"], told["out_head_stride"]) == (8 * 256, 256)
    k, v = told["k"], told["v"]
    assert (k.block_stride, k.slot_stride, k.head_stride) == (16 * 2 * 512, 2 * 512, 512)
    assert v.data - k.data == 256
