"""The attention backend that vLLM sees: its own CPU backend, with the layers that Relay serves
computed by Relay.

Everything else (names, supported sizes, KV cache shape) is inherited, so that a vLLM with Relay
accepts exactly what it accepts without.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from relay_attention import settings
from relay_attention.cpu import served
from relay_attention.cpu.operator import Operator
from relay_attention.cpu.plan import Planner, Step
from relay_attention.cpu.report import Report
from relay_attention.log import leave_layers, logger


class RelayAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type["RelayAttentionImpl"]:
        return RelayAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["RelayAttentionMetadataBuilder"]:
        return RelayAttentionMetadataBuilder


@dataclass
class RelayAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a step, and Relay's. scheduler_metadata is for layers of vLLM's own."""

    planner: Planner | None = None
    step: Step | None = None


class RelayAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Describes each step to one group of layers, which share block tables."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        operators = [getattr(layer.impl, "operator", None) for layer in layers]
        self._serves_some = any(operators)
        self._serves_all = all(operators)
        self._planner = Planner()
        self._report = Report(self._planner.cost) if settings.verbose() else None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        if not self._serves_some:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._report is not None:
            self._report.next_step()
        common = common_attn_metadata
        fields = (
            vars(super().build(common_prefix_len, common, fast_build))
            if not self._serves_all
            else dict(
                num_actual_tokens=common.num_actual_tokens,
                max_query_len=common.max_query_len,
                query_start_loc=common.query_start_loc,
                max_seq_len=common.max_seq_len,
                seq_lens=common.seq_lens,
                block_table=common.block_table_tensor,
                slot_mapping=common.slot_mapping,
                scheduler_metadata=None,
                causal=common.causal,
            )
        )
        step = Step(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, bool(common.causal)
        )
        return RelayAttentionMetadata(**fields, planner=self._planner, step=step)


class RelayAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention. `operator` is None where vLLM's own kernel computes it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.operator: Operator | None = None
        if type(self) is not RelayAttentionImpl:
            reason = f"{type(self).__name__}, which changes how attention works"
        else:
            reason = served.refusal(self, get_current_vllm_config())
        if reason is not None:
            leave_layers(reason)
            return
        self.operator = Operator(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.scale,
            window=max(self.sliding_window, 0),
            softcap=self.logits_soft_cap,
            slopes=self.alibi_slopes,
        )
        self._sinks_version: tuple[int, int] | None = None
        if settings.verbose():
            logger.info_once(
                "Relay serves: heads %d/%d, size %d, window %d, soft cap %g, ALiBi %s, sinks %s",
                self.num_heads,
                self.num_kv_heads,
                self.head_size,
                max(self.sliding_window, 0),
                self.logits_soft_cap,
                self.alibi_slopes is not None,
                self.sinks is not None,
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes as CPUAttentionBackendImpl.forward has them."""
        if self.operator is None or attn_metadata is None or output_scale is not None:
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
        if self.sinks is not None:
            self._update_sinks()
        self.operator.attend(query, kv_cache, output, attn_metadata.planner, attn_metadata.step)
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.operator is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            self.operator.write(key, value, kv_cache, slot_mapping)

    def _update_sinks(self) -> None:
        """Sinks are weights: loaded after the layer is made, and perhaps again later."""
        version = (self.sinks.data_ptr(), self.sinks._version)
        if version != self._sinks_version:
            self.operator.set_sinks(self.sinks.detach().to(torch.float32).contiguous())
            self._sinks_version = version
