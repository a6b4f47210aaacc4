"""Problem sets, and one problem laid out in GPU memory as vLLM lays it out."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

SETS = Path(__file__).resolve().parent / "problems"


@dataclass
class Case:
    """A decode batch. levels: (tokens, groups): so many tokens are shared by each of so many equal
    parts of the batch, one level after the other."""

    heads: list  # query heads, KV heads, head size
    batch: int
    own: int = 128  # tokens of each request's own, the row's own token among them
    levels: list = field(default_factory=list)
    block_size: int = 16
    ragged: bool = False  # own lengths from 1 to `own`
    kv: str = "bf16"  # or fp8: e4m3, scales of 1; queries are bf16
    model: str = ""
    expect: dict = field(default_factory=dict)

    @property
    def prefix(self):
        return sum(tokens for tokens, _ in self.levels)

    @property
    def own_columns(self):
        return -(-self.own // self.block_size)

    @property
    def blocks(self):
        shared = sum(tokens // self.block_size * groups for tokens, groups in self.levels)
        return shared + self.batch * self.own_columns

    @property
    def vector_bytes(self):
        """K and V of one token."""
        return self.heads[1] * 2 * self.heads[2] * (1 if self.kv == "fp8" else 2)

    @property
    def elements(self):
        """Of K and V."""
        return self.blocks * self.block_size * self.heads[1] * 2 * self.heads[2]

    @property
    def kv_bytes(self):
        return self.blocks * self.block_size * self.vector_bytes

    @property
    def unshared_bytes(self):
        """What a kernel reads that knows nothing of sharing."""
        return self.batch * (self.prefix + self.own) * self.vector_bytes

    @property
    def name(self):
        q, kv, dim = self.heads
        levels = "+".join(f"{t}" if g == 1 else f"{g}x{t}" for t, g in self.levels) or "0"
        tail = "" if self.block_size == 16 else f" bs{self.block_size}"
        own = f"{'~' if self.ragged else ''}{self.own}"
        tail += "" if self.kv == "bf16" else f" {self.kv}"
        return f"{q}/{kv}x{dim} P{levels} C{own} B{self.batch}{tail}"


def expand(item):
    """A case, or all cases of a grid. `prefix` is short for one level that all requests share."""
    item = dict(item)
    least, most = item.pop("least_gb", 0), item.pop("most_gb", 60)
    most_unshared = item.pop("most_unshared_gb", 1e9)
    grid = {k: item.pop(k) for k in ("heads", "prefix", "own", "batch") if k in item}
    if grid["heads"] and not isinstance(grid["heads"][0], list):
        grid["heads"] = [grid["heads"]]
    values = [v if isinstance(v, list) else [v] for v in grid.values()]
    for chosen in itertools.product(*values):
        fields = dict(zip(grid, chosen, strict=True)) | item
        prefix = fields.pop("prefix", 0)
        if prefix:
            fields["levels"] = [[prefix, 1]]
        case = Case(**fields)
        if least <= case.kv_bytes / 1e9 <= most and case.unshared_bytes / 1e9 <= most_unshared:
            yield case


def load(name):
    path = Path(name) if name.endswith(".json") else SETS / f"{name}.json"
    data = json.loads(path.read_text())
    data["name"] = path.stem
    data["cases"] = [case for item in data["cases"] for case in expand(item)]
    for case in data["cases"]:
        for tokens, groups in case.levels:
            if tokens % case.block_size or case.batch % groups:
                raise SystemExit(f"{path}: {case.name}: whole blocks and equal groups only")
        if case.kv not in ("bf16", "fp8"):
            raise SystemExit(f"{path}: {case.name}: kv is bf16 or fp8")
    return data


class Problem:
    """A case in GPU memory. `pool` is random data of which the KV cache takes the front."""

    def __init__(self, case, pool, seed=1):
        self.case = case
        self.q_heads, self.kv_heads, self.dim = case.heads
        self.batch, self.block_size, self.blocks = case.batch, case.block_size, case.blocks
        self.device = pool.device
        self.levels, self.scale = case.levels, self.dim**-0.5
        random = torch.Generator().manual_seed(seed)
        shape = (self.blocks, self.block_size, self.kv_heads, 2 * self.dim)
        # vLLM's: K and V of a (token, head) next to each other.
        self.kv = pool[: case.elements].view(shape)
        if case.kv == "fp8":
            self.kv = self.kv.to(torch.float8_e4m3fn)
        self.k, self.v = self.kv[..., : self.dim], self.kv[..., self.dim :]
        self.q = torch.randn(
            self.batch, self.q_heads, self.dim, dtype=torch.bfloat16, device=pool.device
        )
        # A cache that has been in use for a while: ids in no order.
        ids = torch.randperm(self.blocks, generator=random, dtype=torch.int32).to(pool.device)
        at, columns, self.level_ids = 0, [], []
        for tokens, groups in self.levels:
            width = tokens // self.block_size
            level = ids[at : at + width * groups].view(groups, width)
            at += width * groups
            self.level_ids.append(level)
            columns.append(level.repeat_interleave(self.batch // groups, 0))
        self.own_ids = ids[at:].view(self.batch, case.own_columns)
        self.table = torch.cat([*columns, self.own_ids], 1).contiguous()
        self.own_host = torch.full((self.batch,), case.own)
        if case.ragged:
            self.own_host = torch.randint(1, case.own + 1, (self.batch,), generator=random)
        self.lengths_host = self.own_host + case.prefix
        self.max_length = int(self.lengths_host.max())
        self.lengths = self.lengths_host.to(self.device, torch.int32)
        self.starts = torch.arange(self.batch + 1, device=self.device, dtype=torch.int32)

    def offsets(self, counts):
        sums = torch.cat([torch.zeros(1, dtype=counts.dtype), counts.cumsum(0)])
        return sums.to(self.device, torch.int32)

    def last_page(self, lengths):
        return ((lengths - 1) % self.block_size + 1).to(self.device, torch.int32)

    @property
    def bytes(self):
        """Every KV byte once, queries and output once."""
        shared = sum(tokens * groups for tokens, groups in self.levels)
        rows = 2 * self.q.numel() * self.q.element_size()
        return (shared + int(self.own_host.sum())) * self.case.vector_bytes + rows

    @property
    def flops(self):
        return 4 * self.q_heads * self.dim * int(self.lengths_host.sum())

    def reference(self, pairs):
        """Attention of some (request, query head), in double precision: [len(pairs)][dim]."""
        out = []
        for request, head in pairs:
            length = int(self.lengths_host[request])
            blocks = self.table[request, : -(-length // self.block_size)].long()
            kv = self.kv[blocks, :, head // (self.q_heads // self.kv_heads)]
            kv = kv.reshape(-1, 2 * self.dim)[:length].double()
            q = self.q[request, head].double() * self.scale
            weights = torch.softmax(kv[:, : self.dim] @ q, 0)
            out.append(weights @ kv[:, self.dim :])
        return torch.stack(out)

    def some_pairs(self):
        requests = sorted({0, self.batch // 2, self.batch - 1})
        return [(r, (7 * r + i) % self.q_heads) for r in requests for i in (0, self.q_heads // 2)]
