"""Batched matrix products on Hopper GPUs (Mosaic), in bfloat16. Whole rows of a result stay in one block, so that an
epilogue that needs a row can run in registers.

A block computes `rows` rows of one head's product. One warpgroup loads tiles of both operands; the others split the
columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

TILE = 64  # rows of one wgmma: every extent of an operand is a multiple
SHARED = 212 * 1024  # bytes of shared memory for tiles: a block may have 227 KiB, and the vectors take at most 15
STAGES = 4  # tiles of the operands in flight


class Operand(NamedTuple):
    """array: bf16 [batch, token, head, column], or [batch, head, row, column] if not by_token. transposed: in the
    product.
    """

    array: jax.Array
    by_token: bool = True
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a head, as stored."""
        _, a, b, columns = self.array.shape
        return (a if self.by_token else b), columns


class Tile(NamedTuple):
    """The inputs of a warpgroup's epilogue. rows are vectors [rows], columns are vectors [columns of this warpgroup];
    all f32.

    dots: products of the left operand's rows with the vectors `along`. whole: sums each row's partial values over the
    warpgroups; call it once.
    """

    product: jax.Array  # [rows, columns]
    dots: list[jax.Array]
    rows: list[jax.Array]
    columns: list[jax.Array]
    elementwise: list[jax.Array]  # [rows, columns]
    whole: Callable[[jax.Array], jax.Array]

    def down(self, row: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row, self.product.shape, [0])

    def across(self, column: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(column, self.product.shape, [1])


class Result(NamedTuple):
    """An output: [batch, token, head, column] if by_token, else [batch, head, row, column]; [batch, head, row] f32 if
    `vector`.
    """

    dtype: DTypeLike = jnp.bfloat16
    by_token: bool = True
    vector: bool = False

    def array(self, batch: int, head: int, height: int, width: int) -> jax.ShapeDtypeStruct:
        if self.vector:
            return jax.ShapeDtypeStruct((batch, head, height), jnp.float32)
        rows = (height, head) if self.by_token else (head, height)
        return jax.ShapeDtypeStruct((batch, *rows, width), self.dtype)


def product(
    name: str,
    left: Operand,
    right: Operand,
    results: Sequence[Result],
    finish: Callable[[Tile], Sequence[jax.Array]],
    *,
    along: Sequence[jax.Array] = (),
    offset: float = 0,
    rows: Sequence[jax.Array] = (),
    columns: Sequence[jax.Array] = (),
    elementwise: Sequence[Operand] = (),
) -> list[jax.Array]:
    """Compute finish(left @ right) for every head of every image.

    finish: the epilogue. along: f32 [batch, head, contracted], vectors whose dot products with the rows of left +
    offset are computed (left must not be transposed). rows: f32 [batch, head, row]; columns: f32 [batch, head, column];
    elementwise: operands with the product's shape.
    """
    plan = _plan(
        left, right, len(elementwise), [jnp.dtype(result.dtype).itemsize for result in results if not result.vector]
    )
    batch, head = left.array.shape[0], left.array.shape[2 if left.by_token else 1]
    wgs = plan.warpgroups
    vectors = [*along, *rows, *columns]
    given = len(along) * (plan.contracted // plan.part) + len(rows) + len(columns) + len(elementwise)

    scratch: dict[str, Any] = dict(
        stages=[plan.stage(result.dtype) for result in results if not result.vector],
        shelf=[plgpu.SMEM((wgs, plan.rows), jnp.float32) for result in results if result.vector],
        along_smem=[plgpu.SMEM((wgs, plan.contracted), jnp.float32) for _ in along],
        rows_smem=[plgpu.SMEM((wgs, plan.rows), jnp.float32) for _ in rows],
        columns_smem=[plgpu.SMEM((wgs, plan.columns), jnp.float32) for _ in columns],
        elementwise_smem=[
            plgpu.SMEM((wgs, plan.rows, plan.columns), jnp.bfloat16, transforms=_transforms(plan.swizzled))
            for _ in elementwise
        ],
        loaded=plgpu.Barrier(num_arrivals=max(given, 1), num_barriers=wgs),
        parts=plgpu.SMEM((wgs, plan.rows), jnp.float32),
        met=plgpu.Barrier(num_arrivals=wgs),
    )

    def body(left_ref: Any, right_ref: Any, *refs: Any, **memory: Any) -> None:
        _body(plan, left, right, elementwise, results, finish, offset, left_ref, right_ref, refs, **memory)

    return plgpu.kernel(
        body,
        out_type=[result.array(batch, head, plan.height, plan.width) for result in results],
        grid=(batch, head, plan.tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=wgs + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=name,
    )(left.array, right.array, *vectors, *(x.array for x in elementwise))


def _body(
    plan: Any, left: Operand, right: Operand, elementwise: Any, results: Any, finish: Any, offset: float,
    left_ref: Any, right_ref: Any,
    refs: Any, *,
    stages: Any, shelf: Any, along_smem: Any, rows_smem: Any, columns_smem: Any, elementwise_smem: Any, loaded: Any,
    parts: Any, met: Any,
) -> None:  # fmt: skip
    b, h, tile, wg = (lax.axis_index(axis) for axis in ("batch", "head", "tile", "wg"))
    # The last tile may overlap the previous one; it computes the shared rows again, with the same bits.
    start = jnp.minimum(tile * plan.rows, plan.height - plan.rows)
    down, across = pl.ds(start, plan.rows), pl.ds(wg * plan.columns, plan.columns)
    counts = (len(along_smem), len(rows_smem), len(columns_smem), len(elementwise_smem), len(results))
    along, rows, columns, tiles, outs = _split(refs, counts)

    def of_head(ref: Any, by_token: bool) -> Any:
        return ref.at[b, :, h] if by_token else ref.at[b, h]

    def step(index: Any, left_smem: Any, right_smem: Any, carry: Any) -> Any:
        accumulator, dots = carry
        a = left_smem.transpose((1, 0)) if left.transposed else left_smem
        w = right_smem.at[across].transpose((1, 0)) if right.transposed else right_smem.at[:, across]
        plgpu.wgmma(accumulator, a, w)
        part = pl.ds(index[0] * plan.depth, plan.depth)
        x: Any = left_smem[...].astype(jnp.float32) + offset if dots else None
        dots = [
            dot + (x * lax.broadcast_in_dim(v[wg, part], x.shape, [1])).sum(1)
            for dot, v in zip(dots, along_smem, strict=True)
        ]
        plgpu.wgmma_wait(0)
        return accumulator, dots

    def compute(run: Any) -> None:
        arrives = loaded.at[wg]
        for ref, smem in zip(along, along_smem, strict=True):
            for i in range(0, plan.contracted, plan.part):
                plgpu.copy_gmem_to_smem(ref.at[b, h, i : i + plan.part], smem.at[wg, i : i + plan.part], arrives)
        for refs, memory, place in ((rows, rows_smem, down), (columns, columns_smem, across)):
            for ref, smem in zip(refs, memory, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, h, place], smem.at[wg], arrives)
        for operand, ref, smem in zip(elementwise, tiles, elementwise_smem, strict=True):
            plgpu.copy_gmem_to_smem(of_head(ref, operand.by_token).at[down, across], smem.at[wg], arrives)
        if along:
            plgpu.barrier_wait(arrives)

        def accumulate(accumulator: Any) -> None:
            _, dots = run((accumulator, [jnp.zeros((plan.rows,), jnp.float32) for _ in along]))
            found = accumulator[...]
            if not along and (rows or columns or elementwise):
                plgpu.barrier_wait(arrives)
            write(finish(Tile(
                product=found, dots=dots, rows=[x[wg] for x in rows_smem], columns=[x[wg] for x in columns_smem],
                elementwise=[x[wg].astype(jnp.float32) for x in elementwise_smem], whole=whole,
            )))  # fmt: skip

        pl.run_scoped(accumulate, plgpu.ACC((plan.rows, plan.columns), jnp.float32))

    def whole(part: jax.Array) -> jax.Array:
        if plan.warpgroups == 1:
            return part
        parts[wg] = part
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        total: Any = sum(parts[i] for i in range(plan.warpgroups))
        return total

    def write(values: Any) -> None:
        free_stages, free_shelf = iter(stages), iter(shelf)
        for result, value, out in zip(results, values, outs, strict=True):
            if result.vector:
                place = next(free_shelf)

                @pl.when(wg == 0)
                def _(place: Any = place, value: Any = value, out: Any = out) -> None:
                    place[0] = value
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(place.at[0], out.at[b, h, down])

                continue
            stage, value = next(free_stages), value.astype(result.dtype)
            piece = stage.shape[2]
            for r in range(0, plan.rows, TILE):
                for c in range(0, plan.columns, piece):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    stage[wg] = value[r : r + TILE, c : c + piece]
                    plgpu.commit_smem()
                    target = of_head(out, result.by_token)
                    plgpu.copy_smem_to_gmem(
                        stage.at[wg], target.at[pl.ds(start + r, TILE), pl.ds(wg * plan.columns + c, piece)]
                    )
        plgpu.wait_smem_to_gmem(0)

    def block(operand: Operand, extent: int) -> plgpu.BlockSpec:
        """A block has one step of the contracted axis and all of the other axis."""
        first = operand.transposed != (operand is right)  # whether the contraction runs over the stored rows
        shape = (plan.depth, extent) if first else (extent, plan.depth)
        return plgpu.BlockSpec(
            shape, (lambda i: (i, 0)) if first else (lambda i: (0, i)), transforms=_transforms(plan.swizzled)
        )

    left_rows = of_head(left_ref, left.by_token)
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(plan.contracted // plan.depth,),
        in_specs=[block(left, plan.rows), block(right, plan.width)],
        memory_registers=40,
        max_concurrent_steps=plan.steps,
        wg_axis="wg",
        num_compute_wgs=plan.warpgroups,
        compute_context=compute,
    )(left_rows.at[:, down] if left.transposed else left_rows.at[down], of_head(right_ref, right.by_token))


class _Plan(NamedTuple):
    """height, width: of the product; contracted: its inner extent, in steps of `depth`. swizzled: columns of a swizzled
    tile.
    """

    height: int
    width: int
    contracted: int
    rows: int
    columns: int
    depth: int
    swizzled: int
    steps: int

    @property
    def warpgroups(self) -> int:
        return self.width // self.columns

    @property
    def part(self) -> int:
        """Elements of a contracted vector in one copy, at most 256."""
        return next(size for size in range(256, 0, -32) if self.contracted % size == 0)

    @property
    def tiles(self) -> int:
        return -(-self.height // self.rows)

    @property
    def piece(self) -> int:
        """Columns that a warpgroup writes at once."""
        return next(size for size in (64, 96, 32) if self.columns % size == 0 and size % self.swizzled == 0)

    def stage(self, dtype: Any) -> Any:
        """Shared memory in which a warpgroup stages its writes."""
        size = jnp.dtype(dtype).itemsize
        swizzled = next(width for width in (128 // size, 64 // size) if self.piece % width == 0)
        return plgpu.SMEM((self.warpgroups, TILE, self.piece), dtype, transforms=_transforms(swizzled, size))


def _plan(left: Operand, right: Operand, elementwise: int, written: list[int]) -> _Plan:
    """elementwise: number of elementwise operands; written: bytes of an element of each result."""
    contracted, height = left.shape if left.transposed else left.shape[::-1]
    width = right.shape[0 if right.transposed else 1]
    columns = _columns(width)
    depth = 64 if contracted % 64 == 0 else 96
    swizzled = 64 if columns % 64 == 0 and depth == 64 else 32

    def plan(depth: int, swizzled: int) -> _Plan:
        plan = _Plan(
            height=height,
            width=width,
            contracted=contracted,
            rows=TILE,
            columns=columns,
            depth=depth,
            swizzled=swizzled,
            steps=STAGES,
        )
        other = elementwise * plan.rows * width * 2 + sum(written) * plan.warpgroups * TILE * plan.piece
        return plan._replace(steps=min(STAGES, (SHARED - other) // (2 * depth * (plan.rows + width))))

    thick = plan(depth, swizzled)
    return thick if thick.steps >= 2 else plan(32, 32)


def _columns(width: int) -> int:
    """Columns of one warpgroup."""
    options = [width // n for n in (1, 2, 3) if width % (32 * n) == 0 and width // n <= 256]
    wide = [c for c in options if c % 64 == 0 and c <= 192] or options
    return max(wide) if width <= 128 else min(wide)


def _transforms(columns: int, size: int = 2) -> tuple[Any, ...]:
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * size)


def _split(items: Any, counts: Any) -> list[Any]:
    split, items = [], list(items)
    for count in counts:
        split.append(items[:count])
        items = items[count:]
    return split
