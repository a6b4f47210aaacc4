"""Who shares what in a batch, found once per step and used by all layers."""

import ctypes
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from relay_attention import settings
from relay_attention.cpu import layout, native, openmp
from relay_attention.errors import RelayError

if TYPE_CHECKING:
    import torch


def dtype_of(dtype: "torch.dtype") -> int:
    """The relay_dtype of a torch dtype. Raises RelayError if Relay's kernels lack it."""
    import torch

    known = {torch.float32: native.F32, torch.float16: native.F16, torch.bfloat16: native.BF16}
    if dtype not in known:
        raise RelayError(f"no kernels for {dtype}; float32, float16 and bfloat16 are served")
    return known[dtype]


@dataclass(frozen=True)
class Shape:
    """What a plan depends on besides the batch. `window` is in tokens, 0 for none."""

    q_heads: int
    kv_heads: int
    head_size: int
    dtype: "torch.dtype"
    block_size: int
    window: int = 0


@dataclass(eq=False)
class Step:
    """A batch, as vLLM describes it. Request i owns the query rows
    [query_start_loc[i], query_start_loc[i + 1]), the last ones of its seq_lens[i] tokens.

    query_start_loc: int32 [requests + 1]
    seq_lens: int32 or int64 [requests]
    block_table: int32 [requests, any]; only the blocks of the seq_lens[i] tokens are looked at
    """

    query_start_loc: "torch.Tensor"
    seq_lens: "torch.Tensor"
    block_table: "torch.Tensor"
    causal: bool = True

    def __post_init__(self) -> None:
        import torch

        self.seq_lens = self.seq_lens.to(torch.int64).contiguous()
        self.query_start_loc = self.query_start_loc.contiguous()
        if self.block_table.stride(-1) != 1 and self.block_table.numel() > 0:
            self.block_table = self.block_table.contiguous()
        for name in ("query_start_loc", "block_table"):
            if getattr(self, name).dtype != torch.int32:
                raise RelayError(f"{name} is {getattr(self, name).dtype}, expected torch.int32")

    @property
    def requests(self) -> int:
        return self.seq_lens.shape[0]


@dataclass
class PlanningCost:
    """How long planning took, for RELAY_VERBOSE and the benches."""

    plans: int = 0
    seconds: float = 0.0


class Plan:
    """The native plan of one shape, and the scratch memory of running it. Both are reused from step
    to step."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.threads = openmp.threads()
        self.step: Step | None = None  # what it was last made for
        self._options = native.PlanOptions(
            q_heads=shape.q_heads,
            kv_heads=shape.kv_heads,
            qk_dim=shape.head_size,
            v_dim=shape.head_size,
            k_type=dtype_of(shape.dtype),
            v_type=dtype_of(shape.dtype),
            threads=self.threads,
            sharing=int(settings.sharing()),
            layout=layout.layout_of(shape.block_size, shape.head_size),
        )
        self.handle = ctypes.c_void_p()
        self.workspace = ctypes.c_void_p()
        native.check(native.library().relay_workspace_create(self.workspace))

    def make(self, step: Step) -> None:
        """Plans `step`. Raises RelayError if it describes no batch."""
        library = native.library()
        self.step = None  # a plan that failed serves nobody
        batch = native.Batch(
            requests=step.requests,
            row_offsets=step.query_start_loc.data_ptr(),
            kv_lengths=step.seq_lens.data_ptr(),
            table=step.block_table.data_ptr(),
            table_stride=step.block_table.stride(0),
            block_size=self.shape.block_size,
            window=self.shape.window,
            causal=int(step.causal),
        )
        native.check(library.relay_plan_batch(self.handle, batch, self._options))
        native.check(library.relay_workspace_fit(self.workspace, self.handle))
        self.step = step

    def slots(self) -> tuple[int, int]:
        """KV slots that the plan reads, and that it would read if nothing were shared."""
        read, attended = ctypes.c_int64(), ctypes.c_int64()
        native.check(native.library().relay_plan_slots(self.handle, read, attended))
        return read.value, attended.value

    def __del__(self) -> None:
        # Only what __init__ got to; at interpreter exit the operating system frees the rest.
        if getattr(self, "workspace", None) and native is not None:
            native.library().relay_workspace_free(self.workspace)
            native.library().relay_plan_free(self.handle)


@dataclass
class Planner:
    """The plans of one group of layers that share block tables: one for each shape among them."""

    cost: PlanningCost = field(default_factory=PlanningCost)
    _plans: dict[Shape, Plan] = field(default_factory=dict)

    def plan(self, step: Step, shape: Shape) -> Plan:
        """The plan of `step` for layers of `shape`: made for the first, then found again."""
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = Plan(shape)
        if plan.step is not step:
            begin = time.perf_counter()
            plan.make(step)
            self.cost.seconds += time.perf_counter() - begin
            self.cost.plans += 1
        return plan
