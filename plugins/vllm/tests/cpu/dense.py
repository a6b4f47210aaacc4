"""The oracle: dense attention in double precision, and how far rounding may lead away from it."""

import torch
from batches import Batch

# Largest relative error of rounding to each dtype.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}


def attend(
    batch: Batch,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [rows, q_heads, head_size] in float64, and the error that each element may have.

    With weights p (sum 1) and logits x, an error of at most e in every logit changes each weight by
    a factor within exp(+-2e), so the output by 2e * sum p |v|. Beside that, each weight and each
    sum is rounded as the dtype's kernels round (bf16 weights at worst), and so is the output.
    """
    dtype = batch.query.dtype
    outputs, errors = [], []
    for i, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        begin, end = batch.step.query_start_loc[i : i + 2].tolist()
        q = batch.query[begin:end].double()
        tokens, rows = key.shape[0], end - begin
        group = q.shape[1] // key.shape[1]
        k = key.double().repeat_interleave(group, 1)
        v = value.double().repeat_interleave(group, 1)
        x = torch.einsum("rhd,thd->hrt", q, k) * scale
        # Sums of head_size products in f32; the exponential and tanh are good to some 2^-22.
        size = torch.einsum("rhd,thd->hrt", q.abs(), k.abs()) * scale
        e = q.shape[-1] * 2.0**-24 * size + 2.0**-20 * (1 + x.abs())
        if softcap:
            x = softcap * torch.tanh(x / softcap)
        row_position = torch.arange(tokens - rows, tokens)[:, None]
        column = torch.arange(tokens)[None, :]
        if slopes is not None:
            bias = slopes.double()[:, None, None] * (column - row_position)
            x, e = x + bias, e + 2.0**-22 * bias.abs()
        hidden = column > row_position
        if window:
            hidden |= column <= row_position - window
        x = x.masked_fill(hidden, -torch.inf)
        e = e.masked_fill(hidden, 0.0).amax(-1, keepdim=True)
        if sinks is not None:
            x = torch.cat([x, sinks.double()[:, None, None].expand(-1, rows, 1)], -1)
        p = torch.softmax(x, -1)[..., :tokens]
        out = torch.einsum("hrt,thd->rhd", p, v)
        weighted = torch.einsum("hrt,thd->rhd", p, v.abs())
        weight_rounding = 2 * ROUNDING[torch.bfloat16] if dtype == torch.bfloat16 else 0.0
        sums = tokens * 2.0**-24
        error = weighted * (2 * e.permute(1, 0, 2) + weight_rounding + 2 * sums)
        outputs.append(out)
        errors.append(error + 2 * ROUNDING[dtype] * out.abs() + 1e-30)
    if not outputs:
        empty = torch.zeros(batch.query.shape, dtype=torch.float64)
        return empty, empty
    return torch.cat(outputs), torch.cat(errors)
