"""Block selection written once more so plainly that it is right by looking: fp64, one head, one cell, one block at a time."""

from __future__ import annotations

import math

import torch


class Oracle:
    """One call of select_blocks; `rows()` yields the decision of every query block."""

    def __init__(self, call):
        self.query, self.key = call.query.double(), call.key.double()
        self.scale, self.causal, self.windows, self.stride, self.block = call.scale, call.causal, call.windows, call.stride, call.block_size
        self.pool, self.half, self.merged, self.peak = call.pool, call.estimate.half, call.estimate.merge, call.estimate.peak
        self.threshold, self.density, self.min_share = call.threshold, call.density, call.min_share
        self.flags, self.segments, start = call.key_flags, call.segments, call.query_start
        (self.batch, self.heads, self.query_len, _), self.key_len = call.query.shape, call.key.shape[2]
        self.start = self.key_len - self.query_len if start is None else int(start)

    def real_key(self, b, k):
        written = not self.causal or k < self.start + self.query_len
        return written and (self.flags is None or bool(self.flags[b % len(self.flags), k] & 1))

    def real_query(self, b, q):
        p = q + self.start
        return self.flags is None or not 0 <= p < self.key_len or bool(self.flags[b % len(self.flags), p] & 1)

    def segment(self, b, k):
        return int(self.segments[b % len(self.segments), k])

    def possible(self, b, h, rows, keys, *, window=True):
        """Whether some row may see some key: rows and keys are ranges of existing tokens."""
        rows_real = [q for q in rows if self.real_query(b, q)]
        keys_real = [k for k in keys if self.real_key(b, k)]
        if not keys_real or (self.causal and keys[0] > rows[-1] + self.start):
            return False
        w = (self.windows[h] if len(self.windows) > 1 else self.windows[0]) if self.windows else 0
        sink = self.flags is not None and any(self.flags[b % len(self.flags), k] & 2 for k in keys_real)
        if window and w > 0 and keys[-1] <= rows[0] + self.start - w and not sink:
            return False
        if self.segments is None:
            return True
        if any(not 0 <= q + self.start < self.key_len for q in rows):
            return True
        ours, theirs = [self.segment(b, q + self.start) for q in rows_real], [self.segment(b, k) for k in keys_real]
        return bool(ours) and min(ours) <= max(theirs) and min(theirs) <= max(ours)

    def importance(self, b, h):
        """[query_blocks, key_blocks]; under the row rule [query_blocks, cells of a block, key_blocks]"""
        s, span = self.stride, self.stride * (2 if self.half else 1)
        key_blocks = math.ceil(self.key_len / self.block)
        per_block = self.block // span
        result = torch.zeros(math.ceil(self.query_len / self.block), per_block, key_blocks, dtype=torch.float64)
        kv = h // (self.heads // self.key.shape[1])
        for i in range(math.ceil(self.query_len / span)):
            rows = range(i * span, min(i * span + s, self.query_len))
            logits = {}
            for j in range(math.ceil(self.key_len / s)):
                keys = range(j * s, min(j * s + s, self.key_len))
                if not any(self.real_query(b, q) for q in rows) or not self.possible(b, h, rows, keys):
                    continue
                # every token of some neighbours with every token of those that they meet
                m = self.merged
                near = [(a, b) for a in range(m) for b in range(m)]
                pairs = [(i * span + s - m - r + a, j * s + r + b) for r in range(0, s, m) for a, b in near]
                count = len(pairs)
                pairs = [(q, k) for q, k in pairs if q in rows and k in keys and self.real_query(b, q) and self.real_key(b, k)]
                logits[j] = sum(float(self.query[b, h, q] @ self.key[b, kv, k]) for q, k in pairs) * self.scale / count
            mass = torch.zeros(key_blocks, dtype=torch.float64)
            if any(not math.isfinite(x) for x in logits.values()):
                mass.fill_(math.nan)
            elif logits:
                if self.peak:  # the first cell of each block stands for the highest
                    blocks = {j * s // self.block for j in logits}
                    logits = {n * self.block // s: max(x for j, x in logits.items() if j * s // self.block == n) for n in blocks}
                top = max(logits.values())
                total = sum(math.exp(x - top) for x in logits.values())
                for j, x in logits.items():
                    mass[j * s // self.block] += math.exp(x - top) / total
            result[i // per_block, i % per_block] = mass
        if self.pool == "row":
            return result
        return result.sum(1) if self.pool == "sum" else result.amax(1)

    def forced(self, b, h, block, possible):
        first = next((k for k in range(self.key_len) if self.real_key(b, k)), None)
        low = block * self.block + self.start
        high = min((block + 1) * self.block, self.query_len) - 1 + self.start
        own = {p // self.block for p in range(low, high + 1)} & set(range(math.ceil(self.key_len / self.block)))
        own |= set() if first is None else {first // self.block}
        return {k for k in own if k in possible or self.reachable(b, h, block, k)}

    def reachable(self, b, h, block, k):
        rows = range(block * self.block, min((block + 1) * self.block, self.query_len))
        return self.possible(b, h, rows, range(k * self.block, min((k + 1) * self.block, self.key_len)), window=False)

    def union(self, b, h, block, importance):
        """Blocks that some cell of one query block keeps, those that are forced, and how far every other block is from being decided the
        other way: of a kept one, by the cell that is surest of it."""
        cells = [self.row(b, h, block, mass) for mass in importance]
        kept, forced, sure, loose = set(), cells[0][1], {}, {}
        for mass, (mine, _, distance) in zip(importance, cells, strict=True):
            total = max(float(mass.sum()), 1e-30)
            floor = min((float(mass[k]) for k in mine - forced), default=math.inf)
            mine = mine | {k for k in distance if float(mass[k]) == floor}
            ceiling = max((float(mass[k]) for k in set(distance) - mine), default=-math.inf)
            line = self.min_share * total if self.min_share else math.inf
            large = {k for k in distance if line <= float(mass[k]) > 0}
            kept |= mine | large
            for k in mine | set(distance):
                x, far = float(mass[k]), distance.get(k, math.inf)
                if k in mine:
                    sure[k] = max(sure.get(k, 0.0), min(far, (x - ceiling) / total))
                if k in large:
                    sure[k] = max(sure.get(k, 0.0), (x - line) / total)
                if k not in mine | large:
                    loose[k] = min(loose.get(k, math.inf), far, (floor - x) / total, (line - x) / total)
        return kept, forced, {**loose, **sure}

    def row(self, b, h, block, importance):
        """Kept blocks of one query block, the others' cutoff (lowest kept, highest dropped) and each block's distance to the rule."""
        key_blocks = importance.shape[-1]
        rows = range(block * self.block, min((block + 1) * self.block, self.query_len))
        spans = [range(k * self.block, min((k + 1) * self.block, self.key_len)) for k in range(key_blocks)]
        possible = {k for k in range(key_blocks) if self.possible(b, h, rows, spans[k])}
        forced = self.forced(b, h, block, possible)
        possible |= forced
        tau = 0 if self.density else self.threshold[h] if len(self.threshold) > 1 else self.threshold[0]
        if (tau >= 1 and not self.density) or not bool(importance.isfinite().all()):
            return possible, forced, {}
        others = sorted(possible - forced, key=lambda k: (-float(importance[k]), k))
        total = sum(float(importance[k]) for k in possible)
        before, kept, slack = sum(float(importance[k]) for k in forced), set(forced), {}
        wanted = math.ceil(self.density * len(possible) - 1e-9) - len(forced)
        for rank, k in enumerate(others):
            x = float(importance[k])
            if (rank < wanted) if self.density else (before < tau * total and x > 0):
                kept.add(k)
            slack[k] = abs(before - tau * total) / max(total, 1e-30)
            before += x
        return kept, forced, slack


def assert_selection(counts, indices, call, *, tolerance=1e-4):
    """Block lists equal the definition's, except where importance or mass decides by less than `tolerance` of the row."""
    oracle = Oracle(call)
    for b in range(oracle.batch):
        for h in range(oracle.heads):
            importance = oracle.importance(b, h)
            for block in range(importance.shape[0]):
                if call.pool == "row":
                    kept, forced, slack = oracle.union(b, h, block, importance[block])
                    got = set(indices[b, h, block, : int(counts[b, h, block])].tolist())
                    assert forced <= got, (b, h, block, forced, got)
                    assert all(slack.get(k, math.inf) < tolerance for k in got ^ kept), (b, h, block, sorted(kept), sorted(got), slack)
                    continue
                kept, forced, slack = oracle.row(b, h, block, importance[block])
                got = set(indices[b, h, block, : int(counts[b, h, block])].tolist())
                assert forced <= got, (b, h, block, forced, got)
                others = kept - forced
                dropped = set(slack) - kept
                floor = min((float(importance[block, k]) for k in others), default=math.inf)
                ceiling = max((float(importance[block, k]) for k in dropped), default=-math.inf)
                room = tolerance * max(float(importance[block].sum()), 1e-30)
                for k in got ^ kept:
                    x = float(importance[block, k])
                    near = slack.get(k, math.inf) < tolerance or (x >= floor - room and x <= ceiling + room)
                    assert near, (b, h, block, k, x, floor, ceiling, sorted(kept), sorted(got))
