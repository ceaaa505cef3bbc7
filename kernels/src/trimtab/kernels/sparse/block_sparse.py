"""Prefill on a CPU: tiles of 64 queries attend to 64-key blocks that they, or some of them, chose.

Runs the compiled code of ``block_sparse.cpp`` where it was built, else the same in plain torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kernels.sparse import compiled
from trimtab.kernels.sparse.compiled import DTYPES, integers, pointers
from trimtab.kernels.sparse.tables import cut, place_queries
from trimtab.kernels.sparse.tiles import weighted

TILE = 64
"""Queries of a tile, and keys of a block."""


@dataclass(frozen=True, slots=True)
class KeyStore:
    """Keys and values where they lie, cut into blocks of 64 tokens.

    Element ``(token i, dimension c)`` of a block is at ``base[block] + head * head_stride +
    token_at[block_token[block] + i] + dim_at[c]`` of the flat storage, so that packed tensors and
    the pages of a cache can both be read in place.

    Raises:
        ValueError: sizes do not fit together, or some of a block lies outside of its tensor.
    """

    k: Tensor
    v: Tensor
    k_base: Tensor
    v_base: Tensor
    block_token: Tensor
    block_length: Tensor
    k_token_at: Tensor
    v_token_at: Tensor
    k_dim_at: Tensor
    v_dim_at: Tensor
    k_head: int
    v_head: int
    kv_heads: int
    before: Tensor
    """Blocks of all earlier sequences, ``[sequences + 1]`` int64."""

    def __post_init__(self) -> None:
        _check_blocks(self)
        for name, x, base, token_at, dim_at, head in (
            ("k", self.k, self.k_base, self.k_token_at, self.k_dim_at, self.k_head),
            ("v", self.v, self.v_base, self.v_token_at, self.v_dim_at, self.v_head),
        ):
            heads = (0, head * (self.kv_heads - 1))
            token = _extent(self, base, token_at)
            if token is not None and dim_at.numel():
                low = token[0] + min(heads) + int(dim_at.min())
                high = token[1] + max(heads) + int(dim_at.max())
                if low < 0 or high >= _size(x):
                    raise ValueError(
                        f"blocks of {name} lie at {low} to {high}; it has {_size(x)} numbers"
                    )

    @classmethod
    def packed(cls, k: Tensor, v: Tensor, cu_keys: Tensor) -> KeyStore:
        """Packed keys ``[keys, kv_heads, d]`` and values ``[keys, kv_heads, d_v]``."""
        blocks = cut(cu_keys, k.shape[0], TILE)
        at = torch.arange(TILE)
        return cls(
            k=k,
            v=v,
            k_base=blocks.first * k.stride(0),
            v_base=blocks.first * v.stride(0),
            block_token=torch.zeros(blocks.first.numel(), dtype=torch.int32),
            block_length=blocks.length.int(),
            k_token_at=at * k.stride(0),
            v_token_at=at * v.stride(0),
            k_dim_at=torch.arange(k.shape[2]) * k.stride(2),
            v_dim_at=torch.arange(v.shape[2]) * v.stride(2),
            k_head=k.stride(1),
            v_head=v.stride(1),
            kv_heads=k.shape[1],
            before=blocks.before,
        )

    def read(self, block: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one block, ``[length, d]`` and ``[length, d_v]``."""
        begin, length = int(self.block_token[block]), int(self.block_length[block])
        found = []
        for x, base, token_at, dim_at, stride in (
            (self.k, self.k_base, self.k_token_at, self.k_dim_at, self.k_head),
            (self.v, self.v_base, self.v_token_at, self.v_dim_at, self.v_head),
        ):
            tokens = token_at[begin : begin + length, None]
            flat = int(base[block]) + head * stride + tokens + dim_at
            found.append(_flat(x)[flat])
        return found[0], found[1]


def _check_blocks(store: KeyStore) -> None:
    count = store.k_base.shape
    for name in ("k_base", "v_base", "block_token", "block_length"):
        if (of := getattr(store, name)).dim() != 1 or of.shape != count:
            raise ValueError(f"{name} is {tuple(of.shape)}; it must be {tuple(count)}, like k_base")
    if store.kv_heads < 1 or store.k_token_at.shape != store.v_token_at.shape:
        raise ValueError(
            f"{store.kv_heads} KV heads, {store.k_token_at.numel()} places of keys and"
            f" {store.v_token_at.numel()} of values; give heads, and as many places of both"
        )
    begin, length = store.block_token.long(), store.block_length.long()
    places = store.k_token_at.numel()
    if count[0] and (
        int(length.min()) < 0
        or int(length.max()) > TILE
        or int(begin.min()) < 0
        or int((begin + length).max()) > places
    ):
        raise ValueError(
            f"blocks of {int(length.min())} to {int(length.max())} tokens end at place"
            f" {int((begin + length).max())} of {places}; they must have 0 to {TILE} tokens"
        )
    before = store.before.tolist()
    if before[0] != 0 or before != sorted(before) or before[-1] > count[0]:
        raise ValueError(
            f"before is {before}; it must rise from 0 to the {count[0]} blocks at most"
        )


def _extent(store: KeyStore, base: Tensor, token_at: Tensor) -> tuple[int, int] | None:
    """The least and the most place of a token, or None if there are none."""
    offset = torch.arange(TILE)
    there = offset < store.block_length[:, None]
    place = (store.block_token.long()[:, None] + offset).masked_fill(~there, 0)
    if not bool(there.any()):
        return None
    at = (base[:, None] + token_at[place])[there]
    return int(at.min()), int(at.max())


def _size(x: Tensor) -> int:
    """Numbers from a tensor's first element to its last in memory."""
    if not x.numel():
        return 0
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1


def _flat(x: Tensor) -> Tensor:
    """A tensor's storage from its first element on."""
    return x.as_strided((_size(x),), (1,))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of packed queries: those whose keys lie in one block, of one sequence."""

    query: Tensor
    """The first packed query of each, ``[tiles]`` int64."""
    queries: Tensor
    """How many it has, ``[tiles]`` int32."""
    position: Tensor
    """The place of the first among its sequence's keys, ``[tiles]`` int32."""
    sequence: Tensor

    @classmethod
    def of(cls, cu_queries: Tensor, cu_keys: Tensor, queries: int) -> Tiles:
        """Cuts packed queries; the last query of a sequence belongs to its last key.

        Raises:
            ValueError: the ends do not fit the queries, or a sequence has fewer keys.
        """
        if cu_queries.shape != cu_keys.shape or int(cu_queries[-1]) != queries:
            raise ValueError(
                f"cu_queries ends at {int(cu_queries[-1])} after {cu_queries.numel() - 1}"
                f" sequences; it must end at {queries}, after {cu_keys.numel() - 1} like cu_keys"
            )
        last = place_queries(cu_queries, cu_keys, queries, TILE)
        position = last.last - cu_keys.long()[last.sequence]
        if bool((position < 0).any()):
            raise ValueError(
                f"sequence {int(last.sequence[position < 0][0])} has more queries than keys;"
                " it needs a key a query"
            )
        begins = torch.ones(queries, dtype=torch.bool)
        begins[1:] = (position[1:] % TILE == 0) | (last.sequence[1:] != last.sequence[:-1])
        first = begins.nonzero()[:, 0]
        counts = torch.nn.functional.pad(first, (0, 1), value=queries).diff()
        return cls(first, counts.int(), position[first].int(), last.sequence[first])

    def part(self, some: slice) -> Tiles:
        """Some of them."""
        parts = (self.query, self.queries, self.position, self.sequence)
        return Tiles(*(x[some] for x in parts))

    @property
    def last_block(self) -> Tensor:
        """The block of each tile's last query, ``[tiles]`` int64."""
        return (self.position.long() + self.queries - 1) // TILE


@dataclass(frozen=True, slots=True)
class Choice:
    """The blocks of each head's tiles, ids within their sequence, ascending and without repeats."""

    rows: Tensor
    """Where each list begins, ``[heads * tiles + 1]`` int64."""
    blocks: Tensor
    """int32."""
    queries: Tensor | None = None
    """Which queries of the tile chose each, int64: bit ``n`` is that of the key number ``n`` of the
    tile's own block. All did, where there is none."""

    @classmethod
    def of_mask(cls, chosen: Tensor) -> Choice:
        """From a mask ``[heads, tiles, blocks]``."""
        counts = chosen.sum(-1).flatten()
        rows = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(rows, chosen.nonzero()[:, -1].int())

    @classmethod
    def of_queries(cls, chosen: Tensor, position: int) -> Choice:
        """From a mask ``[heads, queries, blocks]`` of one sequence.

        Args:
            chosen: the mask.
            position: the first query's place among the keys.
        """
        bits = query_bits(chosen, position)
        of_tiles = cls.of_mask(bits != 0)
        return cls(of_tiles.rows, of_tiles.blocks, bits[bits != 0])


def query_bits(chosen: Tensor, position: int) -> Tensor:
    """A mask ``[heads, queries, blocks]`` of one sequence as bits ``[heads, tiles, blocks]`` int64.

    Args:
        chosen: the mask.
        position: the first query's place among the keys.
    """
    before = position % TILE
    whole = torch.nn.functional.pad(
        chosen, (0, 0, before, -(before + chosen.shape[1]) % TILE)
    ).unflatten(1, (-1, TILE))
    bits: Tensor = whole.new_zeros((), dtype=torch.int64).expand(whole.select(2, 0).shape)
    for place in range(TILE):
        bits = bits | whole.select(2, place).long() << place
    return bits


class _Problem(ctypes.Structure):
    """``Problem`` of ``block_sparse.cpp``, field for field."""

    _fields_ = (
        *pointers("q", "k", "v", "out", "panels"),
        *pointers("k_base", "v_base", "block_token", "block_length"),
        *pointers("k_token_at", "v_token_at", "k_dim_at", "v_dim_at"),
        *pointers("tile_query", "tile_block", "tile_queries"),
        *pointers("tile_position", "rows", "chosen"),
        *pointers("chosen_by", "needed", "shares"),
        *integers("q_token", "q_head", "out_token", "out_head"),
        *integers("k_head", "v_head", "tiles", "blocks"),
        *integers("heads", "kv_heads", "d", "d_v", "share_rows"),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("sample_step", ctypes.c_int32),
        ("keys_packed", ctypes.c_int32),
    )


class _Keeping(ctypes.Structure):
    """``Keeping`` of ``block_sparse.cpp``, field for field."""

    _fields_ = (
        *pointers("shares", "own", "kept"),
        *integers("heads", "rows", "blocks", "first", "recent", "top"),
        ("mass", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


def library() -> ctypes.CDLL | None:
    """The best compiled code that this machine can run, or None where none was built.

    What was built and does not load is said once in the log, and so is that nothing was found.
    """
    structures = {"trimtab_problem_bytes": _Problem, "trimtab_keeping_bytes": _Keeping}
    sizes = tuple((name, ctypes.sizeof(structure)) for name, structure in structures.items())
    return compiled.library("block_sparse", sizes, "prefills on a CPU run")


class TiledAttention:
    """Causal attention of tiles of queries to blocks of keys, in compiled code.

    Keys and values are packed once, for the estimate of `shares` and for `attend`, whichever tiles
    these are for.

    Args:
        q: ``[queries, heads, d]``; float32, bfloat16 or float16.
        store: the keys and values, of the same type.
        tiles: the tiles of ``q``.
        scale: of the logits.

    `is_compiled_for` tells whether it can be made.

    Raises:
        ValueError: queries, keys and values do not fit together.
    """

    def __init__(self, q: Tensor, store: KeyStore, tiles: Tiles, scale: float) -> None:
        code = library()
        assert code is not None
        _check(q, store, tiles)
        # The compiled code steps through a query's numbers one by one.
        q = q if q.stride(2) == 1 else q.contiguous()
        self._code, self._store, self._tiles = code, store, tiles
        self._heads = q.shape[1]
        blocks, wide = store.k_base.numel(), store.v_dim_at.numel()
        panel = TILE * (-(-q.shape[2] // 2) * 2 + -(-wide // 16) * 16)
        bytes_each = code.trimtab_element_bytes(DTYPES[q.dtype])
        panels = torch.empty(store.kv_heads * blocks * panel * bytes_each, dtype=torch.uint8)
        tensors = {"q": q, "k": store.k, "v": store.v, "panels": panels}
        offsets = {
            "k_base": store.k_base,
            "v_base": store.v_base,
            "block_token": store.block_token,
            "block_length": store.block_length,
            "k_token_at": store.k_token_at,
            "v_token_at": store.v_token_at,
            "k_dim_at": store.k_dim_at,
            "v_dim_at": store.v_dim_at,
            "needed": torch.zeros(store.kv_heads * blocks, dtype=torch.uint8),
        }
        self._kept: dict[str, Tensor] = {}
        self._problem = _Problem(
            q_token=q.stride(0),
            q_head=q.stride(1),
            k_head=store.k_head,
            v_head=store.v_head,
            blocks=blocks,
            heads=self._heads,
            kv_heads=store.kv_heads,
            d=q.shape[2],
            d_v=wide,
            scale=scale,
            dtype=DTYPES[q.dtype],
            threads=torch.get_num_threads(),
        )
        for name, tensor in tensors.items():
            self._point(name, tensor)
        for name, tensor in offsets.items():
            self._point(name, tensor.contiguous())

    def _point(self, name: str, tensor: Tensor) -> None:
        """Hands a tensor to the compiled code, and keeps it for as long."""
        self._kept[name] = tensor
        setattr(self._problem, name, tensor.data_ptr())

    def _take(self, some: slice) -> Tiles:
        """Turns to some of the tiles."""
        tiles = self._tiles.part(some)
        self._point("tile_query", tiles.query.contiguous())
        self._point("tile_block", self._store.before[tiles.sequence])
        self._point("tile_queries", tiles.queries.contiguous())
        self._point("tile_position", tiles.position.contiguous())
        self._problem.tiles = tiles.query.numel()
        return tiles

    def shares(
        self, step: int, *, some: slice = slice(None), by: Literal["tile", "query"] = "tile"
    ) -> Tensor:
        """The mean share of each block in the attention of every ``step``-th query of a tile.

        Args:
            step: divides 64.
            some: which tiles.
            by: ``query`` for the shares of each query; ``step`` is then 1.

        Returns:
            ``[heads, tiles or queries, blocks]`` float32 by id within the tile's sequence; there
            are as many as all sequences have together, and what a tile's has not is 0.
        """
        tiles = self._take(some)
        queries = int(tiles.queries.sum())
        rows = queries if by == "query" else tiles.query.numel()
        shares = torch.empty(self._heads, rows, self._store.k_base.numel())
        self._point("shares", shares)
        self._problem.sample_step = step
        self._problem.share_rows = queries if by == "query" else 0
        self._code.trimtab_block_shares(ctypes.byref(self._problem))
        self._problem.keys_packed = 1
        return shares

    def attend(self, choice: Choice, out: Tensor, *, some: slice = slice(None)) -> Tensor:
        """Writes the attention of some tiles to their blocks into ``out``; see `tiled_attention`.

        Raises:
            ValueError: ``out`` does not fit the queries and values, or its last dimension is not
                dense.
        """
        q = self._kept["q"]
        wanted = (*q.shape[:2], self._store.v_dim_at.numel())
        if out.shape != wanted or (out.dtype, out.device) != (q.dtype, q.device):
            raise ValueError(
                f"out is {tuple(out.shape)} in {out.dtype} on {out.device};"
                f" it must be {wanted} in {q.dtype} on {q.device}"
            )
        if out.stride(2) != 1:
            raise ValueError(f"the last dimension of out has a stride of {out.stride(2)}; give 1")
        _check_choice(choice, self._heads, self._tiles.part(some), self._store)
        self._point("rows", choice.rows.contiguous())
        self._point("chosen", choice.blocks.contiguous())
        if choice.queries is None:
            self._problem.chosen_by = None
        else:
            self._point("chosen_by", choice.queries.contiguous())
        self._take(some)
        self._point("out", out)
        self._problem.out_token, self._problem.out_head = out.stride(0), out.stride(1)
        self._code.trimtab_block_sparse(ctypes.byref(self._problem))
        return out


def _check(q: Tensor, store: KeyStore, tiles: Tiles) -> None:
    """Refuses what the compiled code would read past its end, or as numbers of another type."""
    if q.dim() != 3 or q.shape[2] != store.k_dim_at.numel() or q.shape[1] % store.kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)}; it must be [queries, a multiple of {store.kv_heads} heads,"
            f" {store.k_dim_at.numel()}]"
        )
    if not q.dtype == store.k.dtype == store.v.dtype:
        raise ValueError(
            f"q, k and v are {q.dtype}, {store.k.dtype} and {store.v.dtype}; give one dtype"
        )
    places = [x.device.type for x in (q, store.k, store.v)]
    if places != ["cpu"] * 3:
        raise ValueError(f"q, k and v are on {', '.join(places)}; they must be on a CPU")
    if not tiles.query.numel():
        return
    end, blocks = int((tiles.query + tiles.queries).max()), _blocks_of(tiles, store)
    if end > q.shape[0] or int(tiles.query.min()) < 0:
        raise ValueError(f"tiles end at query {end}; there are {q.shape[0]}")
    if int(tiles.position.min()) < 0 or bool((tiles.last_block >= blocks).any()):
        raise ValueError(
            f"tiles have keys from {int(tiles.position.min())} to block"
            f" {int(tiles.last_block.max())}; there are {int(blocks.max())} blocks from key 0 on"
        )


def _blocks_of(tiles: Tiles, store: KeyStore) -> Tensor:
    """Blocks of each tile's sequence."""
    if int(tiles.sequence.max()) >= store.before.numel() - 1:
        raise ValueError(
            f"tiles are of {int(tiles.sequence.max()) + 1} sequences;"
            f" keys and values are of {store.before.numel() - 1}"
        )
    return store.before.diff()[tiles.sequence]


def _check_choice(choice: Choice, heads: int, tiles: Tiles, store: KeyStore) -> None:
    """Refuses lists that do not fit the tiles, or name blocks that there are not."""
    lists, count = heads * tiles.query.numel(), choice.blocks.numel()
    rows = choice.rows
    if rows.shape != (lists + 1,) or rows[0] != 0 or rows[-1] != count or (rows.diff() < 0).any():
        raise ValueError(
            f"rows of a choice are {tuple(rows.shape)}; they must rise from 0 to {count} in"
            f" {lists + 1} numbers, for {heads} heads of {tiles.query.numel()} tiles"
        )
    if choice.queries is not None and choice.queries.shape != choice.blocks.shape:
        raise ValueError(f"{choice.queries.numel()} sets of queries are of {count} blocks")
    if not count:
        return
    known = _blocks_of(tiles, store).repeat(heads).repeat_interleave(rows.diff())
    if int(choice.blocks.min()) < 0 or bool((choice.blocks >= known).any()):
        raise ValueError(
            f"blocks {int(choice.blocks.min())} to {int(choice.blocks.max())} are chosen;"
            f" a sequence has blocks 0 to {int(known.min()) - 1}"
        )


def kept_blocks(
    shares: Tensor, own: Tensor, *, first: int, recent: int, top: int, mass: float
) -> Tensor | None:
    """What `Selection.keep` keeps, by compiled code; None where there is none for it.

    Args:
        shares: ``[heads, rows, blocks]``.
        own: the last block that each row can see, ``[rows]`` int64.
        first: blocks that are always kept.
        recent: latest blocks that are always kept.
        top: how many are kept; 0 where ``mass`` decides.
        mass: the share that is kept.
    """
    code = library()
    if code is None or shares.device.type != "cpu" or shares.dtype != torch.float32:
        return None
    shares, own = shares.contiguous(), own.contiguous()
    kept = torch.zeros(shares.shape, dtype=torch.uint8)
    heads, rows, blocks = shares.shape
    given = _Keeping(
        heads=heads,
        rows=rows,
        blocks=blocks,
        first=first,
        recent=recent,
        top=top,
        mass=mass,
        threads=torch.get_num_threads(),
        shares=shares.data_ptr(),
        own=own.data_ptr(),
        kept=kept.data_ptr(),
    )
    code.trimtab_keep_blocks(ctypes.byref(given))
    return kept.bool()


def is_compiled_for(q: Tensor) -> bool:
    """Whether `TiledAttention` takes these queries on this machine."""
    return library() is not None and q.dtype in DTYPES


def tiled_attention(
    q: Tensor, store: KeyStore, tiles: Tiles, choice: Choice, out: Tensor, scale: float
) -> Tensor:
    """Causal attention of each tile to its blocks, written into ``out``.

    Args:
        q: ``[queries, heads, d]``.
        store: the keys and values, of the same type.
        tiles: the tiles of ``q``.
        choice: their blocks; blocks past a tile's last query show nothing.
        out: ``[queries, heads, d_v]`` as ``q``, its last dimension dense.
        scale: of the logits.

    Raises:
        ValueError: they do not fit together.
    """
    if is_compiled_for(q):
        return TiledAttention(q, store, tiles, scale).attend(choice, out)
    return tiled_attention_in_torch(q, store, tiles, choice, out, scale)


def tiled_attention_in_torch(
    q: Tensor, store: KeyStore, tiles: Tiles, choice: Choice, out: Tensor, scale: float
) -> Tensor:
    """What `tiled_attention` does, by gathering each tile's blocks; any dtype.

    Raises:
        ValueError: they do not fit together.
    """
    _check(q, store, tiles)
    _check_choice(choice, q.shape[1], tiles, store)
    group = q.shape[1] // store.kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = choice.rows.tolist()
    for tile, begin in enumerate(tiles.query.tolist()):
        rows = slice(begin, begin + int(tiles.queries[tile]))
        position = int(tiles.position[tile]) + torch.arange(rows.stop - rows.start)
        before = int(store.before[tiles.sequence[tile]])
        for head in range(q.shape[1]):
            at = head * tiles.query.numel() + tile
            ids = choice.blocks[bounds[at] : bounds[at + 1]].tolist()
            if not ids:
                out[rows, head] = 0
                continue
            parts = [store.read(before + block, head // group) for block in ids]
            keys, values = (torch.cat(part).to(wide) for part in zip(*parts, strict=True))
            place = torch.cat(
                [
                    block * TILE + torch.arange(len(k))
                    for block, (k, _) in zip(ids, parts, strict=True)
                ]
            )
            visible = place <= position[:, None]
            if choice.queries is not None:
                bits = choice.queries[bounds[at] : bounds[at + 1]]
                chose = (bits >> (position % TILE)[:, None] & 1).bool()
                lengths = torch.tensor([len(k) for k, _ in parts])
                visible &= chose.repeat_interleave(lengths, 1)
            logits = q[rows, head].to(wide) @ keys.T * scale
            p = torch.softmax(logits.masked_fill(~visible, float("-inf")), -1)
            p = p.masked_fill(~visible, 0.0)
            out[rows, head] = weighted(p[None], values[None], visible[None])[0].to(out.dtype)
    return out
