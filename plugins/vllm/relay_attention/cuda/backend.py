"""The attention backend that vLLM sees on NVIDIA GPUs: its own FlashAttention, with the batches and
layers that Relay serves attended by Relay.

Everything else (names, supported sizes, the KV cache and how it is written) is inherited, so that a
vLLM with Relay accepts exactly what it accepts without.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import (
    CUDAGraphMode,
    VllmConfig,
    get_current_vllm_config,
    get_layers_from_vllm_config,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from relay_attention import settings
from relay_attention.cuda import native, served
from relay_attention.cuda.operator import Operator
from relay_attention.cuda.plan import Cache, Kind, Limits, Plan, dtype_of
from relay_attention.cuda.policy import DECODE_ROWS, Facts, Policy
from relay_attention.cuda.report import Report
from relay_attention.errors import RelayError
from relay_attention.log import leave_layers, logger


def _stream(device: torch.device) -> int:
    """The current stream as a cudaStream_t; torch.cuda.current_stream takes ten times as long."""
    return torch._C._cuda_getCurrentRawStream(device.index)


class RelayFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type["RelayFlashAttentionImpl"]:
        return RelayFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["RelayFlashAttentionMetadataBuilder"]:
        return RelayFlashAttentionMetadataBuilder


@dataclass
class RelayFlashAttentionMetadata(FlashAttentionMetadata):
    """vLLM's metadata of a step, and Relay's plans of it; None: vLLM's own kernel attends it."""

    plans: Mapping[Kind, Plan] | None = None


class RelayFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Plans each step of one group of layers, which share block tables, on the GPU."""

    # Another group's metadata with this one's block table would still have the other one's plans.
    supports_update_block_table: bool = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        found = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        layers = list(found.values())
        self._served = [x for x in layers if getattr(x.impl, "operator", None) is not None]
        self._serves_all = len(self._served) == len(layers)
        if type(self) is not RelayFlashAttentionMetadataBuilder:
            self._stand_aside(f"{type(self).__name__}, which changes what a batch is")
        elif any(not served.has_one_scale(layer) for layer in self._served):
            self._stand_aside("fp8 KV with scales for each head")
        self._sinks = _Sinks(self._served)
        for layer in self._served:
            if layer.impl.kv_cache_dtype in served.FP8:
                layer.impl.operator.set_scales(layer._q_scale, layer._k_scale, layer._v_scale)
        self._plans: dict[Kind, Plan] | None = None  # made when the KV cache is there
        self._policy: Policy | None = None
        self._attends_all = False  # Relay attends all layers of the step that is being built
        self._report = Report() if settings.verbose() else None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        common = common_attn_metadata
        if self._served and self._plans is None:
            self._make_plans(common.block_table_tensor)
        if not self._served:
            return super().build(common_prefix_len, common, fast_build)
        reason = self._policy.refusal(self._facts(common))
        self._attends_all = reason is None and self._serves_all
        try:
            own = super().build(common_prefix_len, common, fast_build)
        finally:
            self._attends_all = False
        if reason is None:
            self._sinks.refresh()
            self._plan(own)
        if self._report is not None:
            self._report.next_step(reason, self._plans, _stream(common.seq_lens.device))
        return RelayFlashAttentionMetadata(
            **vars(own), plans=self._plans if reason is None else None
        )

    def update_draft_decode_metadata(self, metadata: FlashAttentionMetadata) -> None:
        super().update_draft_decode_metadata(metadata)
        if getattr(metadata, "plans", None) is not None:
            self._plan(metadata)

    def _get_scheduler_metadata(self, **kwargs: object) -> torch.Tensor | None:
        """FlashAttention's own plan: not needed where it attends nothing."""
        return None if self._attends_all else super()._get_scheduler_metadata(**kwargs)

    def _plan(self, metadata: FlashAttentionMetadata) -> None:
        stream = _stream(metadata.seq_lens.device)
        for plan in self._plans.values():
            plan.make(
                metadata.query_start_loc,
                metadata.seq_lens,
                metadata.block_table,
                metadata.num_actual_tokens,
                stream,
            )

    def _facts(self, common: CommonAttentionMetadata) -> Facts:
        bounds = common.seq_lens_cpu_upper_bound
        return Facts(
            requests=common.num_reqs,
            rows=common.num_actual_tokens,
            max_query_rows=common.max_query_len,
            causal=common.causal is True,
            query_starts=common.query_start_loc_cpu.numpy(),
            kv_lengths=(
                bounds.numpy()
                if bounds is not None
                else np.full(common.num_reqs, common.max_seq_len)
            ),
        )

    def _make_plans(self, block_table: torch.Tensor) -> None:
        config, spec = self.vllm_config, self.kv_cache_spec
        scheduler = config.scheduler_config
        limits = Limits(
            requests=scheduler.max_num_seqs,
            rows=max(scheduler.max_num_batched_tokens, self.max_cudagraph_size or 0),
            blocks=block_table.shape[1],
        )
        kv_cache = self._served[0].kv_cache
        q_type = dtype_of(config.model_config.dtype)
        cache = Cache(
            kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            q_type=q_type,
            kv_type=native.F8_E4M3 if kv_cache.element_size() == 1 else q_type,
            block_size=kv_cache.shape[2],
            blocks=kv_cache.shape[0],
        )
        kinds = {layer.impl.operator.kind for layer in self._served}
        device = block_table.device
        try:
            plans = {kind: Plan(kind, cache, limits, device, _stream(device)) for kind in kinds}
        except RelayError as e:
            self._stand_aside(str(e))
            return
        except torch.OutOfMemoryError:  # vLLM's budget may leave nothing
            self._stand_aside(
                "no GPU memory is left for its workspace; lower --gpu-memory-utilization"
            )
            return
        speculative = config.speculative_config
        mixed = config.compilation_config.cudagraph_mode.mixed_mode()
        self._plans = plans
        self._policy = Policy(
            limits=next(iter(plans.values())).limits,
            decode_rows=DECODE_ROWS
            + (speculative.num_speculative_tokens or 0 if speculative is not None else 0),
            graph_rows=self.max_cudagraph_size or 0 if mixed == CUDAGraphMode.FULL else 0,
            group=max(kind.q_heads for kind in kinds) // cache.kv_heads,
        )
        if settings.verbose():
            for kind, plan in plans.items():
                logger.info(
                    "Relay plans: %s, %s, %s, kernels %s, workspace %.1f MiB",
                    kind,
                    cache,
                    plan.limits,
                    plan.path,
                    plan.workspace.numel() / 2**20,
                )

    def _stand_aside(self, reason: str) -> None:
        if self._served:
            leave_layers(reason)
        self._served = []


class _Sinks:
    """Sinks in f32, refreshed once per step, as weights may be loaded anew at any time."""

    def __init__(self, layers: list[Attention]) -> None:
        with_sinks = [layer for layer in layers if layer.impl.sinks is not None]
        self._sources = [layer.impl.sinks.detach() for layer in with_sinks]
        self._copies = [x.to(torch.float32, copy=True) for x in self._sources]
        for layer, copy in zip(with_sinks, self._copies, strict=True):
            layer.impl.operator.set_sinks(copy)

    def refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)


class RelayFlashAttentionImpl(FlashAttentionImpl):
    """One layer's attention. `operator` is None where vLLM's own kernel computes all of it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.operator: Operator | None = None
        if type(self) is not RelayFlashAttentionImpl:
            reason = f"{type(self).__name__}, which changes how attention works"
        else:
            reason = served.refusal(self, get_current_vllm_config())
        if reason is not None:
            leave_layers(reason)
            return
        window = self.sliding_window[0] + 1
        self.operator = Operator(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.scale,
            window=window,
            softcap=self.logits_soft_cap,
            slopes=self.alibi_slopes,
        )
        if settings.verbose():
            logger.info_once(
                "Relay serves: heads %d/%d, size %d, window %d, soft cap %g, ALiBi %s, sinks %s, "
                "KV cache %s",
                self.num_heads,
                self.num_kv_heads,
                self.head_size,
                window,
                self.logits_soft_cap,
                self.alibi_slopes is not None,
                self.sinks is not None,
                self.kv_cache_dtype,
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes as FlashAttentionImpl.forward has them."""
        plan = None
        if self.operator is not None and output_scale is None:
            plan = (getattr(attn_metadata, "plans", None) or {}).get(self.operator.kind)
        if plan is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        self.operator.attend(query, kv_cache, output, plan, _stream(query.device))
        return output
