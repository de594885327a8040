"""Products by the tensor cores of Hopper, through Pallas' Mosaic GPU lowering, of any weight that comes as words.

Groups of four warps (warpgroups) decode weights in registers (see `fragments.py`) and multiply them with inputs in
shared memory. Words and inputs are copied there ahead, by a warpgroup of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jaxq.kernels.dispatch import axes_of, vary_as
from jaxq.kernels.gpu.fragments import ROWS, Tile, Warpgroup, left_operand, lowering, store, words_layout
from jaxq.kernels.gpu.plans import (
    CHUNK,
    COPY_REGISTERS,
    DEPTH,
    LEAST_TOKENS,
    LINE,
    Plan,
    Settings,
    default,
    plan_for,
)
from jaxq.kernels.gpu.weights import Weight

__all__ = ["Settings", "available", "default", "fits", "multiply"]


@functools.cache
def available() -> bool:
    """Whether the device of this process has `wgmma`, and this jax the lowering for it."""
    try:
        return jax.__version_info__ >= (0, 11) and jax.devices("gpu")[0].compute_capability == "9.0"
    except RuntimeError:
        return False


def fits(words: Any) -> bool:
    """Whether weights of these words, `(out, words)`, can be copied by tiles: whole lines of eight outputs."""
    out_size, row_words = words.shape[-2:]
    return out_size % 8 == 0 and row_words % LINE == 0


def multiply(
    x: Float[Array, "tokens in"],
    weight: Weight,
    settings: Settings,
    *,
    exact: bool = False,
    dtype: Any = jnp.float32,
) -> Float[Array, "tokens out"]:
    """The product, `(tokens, out)` in `dtype`: weights and `x` become float16, sums are float32.

    `exact` keeps `x` of another dtype in the range of float16 by a power of two for each token, so that bfloat16
    loses nothing. No overlay, and no decoder of bfloat16.
    """
    assert not weight.overlay and weight.decoder.kind == jnp.float16

    def product(settings: Settings, x: Array, words: Array, extra: tuple[Array, ...]) -> Array:
        return _product(x, Weight(words, weight.decoder, extra), settings, exact, dtype)

    one = custom_vmap(functools.partial(product, settings))

    @one.def_vmap
    def _several(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        # Programs find each other by their place in the grid of one product; several products are programs enough.
        alone = functools.partial(product, dataclasses.replace(settings, split=1))
        return jax.vmap(alone, jax.tree.map(lambda axis: 0 if axis else None, tuple(batched)))(*operands), True

    return one(x, weight.words, tuple(weight.extra))


def _product(
    x: Float[Array, "tokens in"], weight: Weight, settings: Settings, exact: bool, dtype: Any
) -> Float[Array, "tokens out"]:
    from jax.experimental.mosaic import gpu as mosaic

    mosaic_gpu = lowering()

    plan = plan_for(x.shape[0], weight, settings, dtype)
    units: tuple[Array, ...] = ()
    if exact and x.dtype != jnp.float16:
        x, unit = _in_range(x)
        units = (jnp.pad(unit, (0, -plan.tokens % plan.width)),)
    x = _whole(x.astype(jnp.float16), (8, CHUNK))
    line = 128 // plan.dtype.itemsize
    room = jax.eval_shape(lambda: _whole(jnp.zeros((plan.tokens, plan.out_size)), (8, line))).shape

    def kernel(x_ref: Any, words_ref: Any, *rest: Any, ring: Any, words: Any, barriers: Any) -> None:
        *others, out_ref, given_ref = rest
        inputs, (results, sums) = ring
        refs = {"x": x_ref, "words": words_ref, "out": out_ref, "given": given_ref}
        program = _Program(
            plan,
            weight.decoder,
            {**refs, "units": others[: len(units)], "extra": tuple(others[len(units) :])},
            {"inputs": inputs, "words": words, "results": results, "sums": sums},
            barriers,
        )
        program.run()

    def shared(shape: tuple[int, ...], dtype: Any) -> Any:
        tiling = mosaic_gpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
        return mosaic_gpu.SMEM(shape, dtype, transforms=(tiling, mosaic_gpu.SwizzleTransform(128)))

    sums = (plan.down, max(plan.share - 1, 1), ROWS, plan.width if plan.share > 1 else LEAST_TOKENS)
    freed = functools.partial(mosaic_gpu.Barrier, num_arrivals=plan.groups)
    if plan.cluster > 1:
        cluster: Any = ("cluster",)
        inputs_freed = mosaic_gpu.ClusterBarrier(
            collective_axes=cluster, num_arrivals=plan.groups, num_barriers=plan.ring
        )
    else:
        inputs_freed = freed(num_barriers=plan.ring)
    scratch = {
        "ring": mosaic_gpu.RefUnion(
            shared((plan.ring, plan.share, plan.width, plan.piece), jnp.float16),
            [shared((plan.down, plan.owned, ROWS), plan.dtype), mosaic_gpu.SMEM(sums, jnp.float32)],
        ),
        "words": shared((plan.stages, ROWS * plan.down, plan.words * plan.share), jnp.uint32),
        "barriers": {
            "inputs": mosaic_gpu.Barrier(num_arrivals=plan.share, num_barriers=plan.ring),
            "inputs freed": inputs_freed,
            "words": mosaic_gpu.Barrier(num_arrivals=1, num_barriers=plan.stages),
            "words freed": freed(num_barriers=plan.stages),
            "ended": freed(),
            "sums": mosaic_gpu.Barrier(num_arrivals=max(plan.groups - plan.down, 1)),
            "given": mosaic_gpu.Barrier(num_arrivals=1, num_barriers=plan.down),
        },
    }
    operands = [x, weight.words, *units, *(extra.reshape(-1) for extra in weight.extra)]
    operands = [vary_as(operand, *operands) for operand in operands]
    down = -(-plan.out_size // (ROWS * plan.down * plan.cluster))
    across = -(-plan.tokens // plan.width)
    # What programs give each other: for its owner, of each of the others.
    rows = down * plan.cluster * plan.down * ROWS
    given = (plan.owners, plan.split - 1, across, rows, plan.owned) if plan.split > 1 else (LEAST_TOKENS,)
    outs = (jax.ShapeDtypeStruct(room, plan.dtype), jax.ShapeDtypeStruct(given, jnp.float32))
    run = mosaic_gpu.kernel(
        kernel,
        out_type=tuple(out.update(manual_axis_type=axes_of(operands[0])) for out in outs),
        scratch_types=scratch,
        # Those that wait for each other start together: the last axis is the one that runs first.
        grid=(down, across, plan.split),
        grid_names=("rows", "tokens", "split"),
        cluster=(plan.cluster,),
        cluster_names=("cluster",),
        num_threads=plan.groups + 1,
        thread_name="group",
        # Which thread reads what is known here: a barrier around each copy would cost more than the copy.
        compiler_params=mosaic_gpu.CompilerParams(
            lowering_semantics=mosaic.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="jaxq_warpgroups",
    )
    return run(*operands)[0][: plan.tokens, : plan.out_size]


class _Program:
    """The kernel: what one program does."""

    def __init__(self, plan: Plan, decoder: Any, refs: Any, shared: Any, barriers: Any):
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        self.plan, self.decoder, self.refs, self.shared, self.barriers = plan, decoder, refs, shared, barriers
        self.group = lax.axis_index("group")
        self.first = (lax.axis_index("rows") * plan.cluster + lax.axis_index("cluster")) * (ROWS * plan.down)
        self.token = lax.axis_index("tokens") * plan.width
        self.split = lax.axis_index("split")
        self.told: Any = None
        if plan.split > 1:
            count = refs["given"].shape[2] * refs["given"].shape[3] // ROWS * plan.owners
            self.told = pallas.get_global(mosaic_gpu.SemaphoreType.REGULAR((count,)))

    def run(self) -> None:
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan = self.plan

        @pallas.when(self.group == plan.groups)
        def _copy() -> None:
            mosaic_gpu.set_max_registers(COPY_REGISTERS, action="decrease")
            self.copy()

        @pallas.when(self.group < plan.groups)
        def _compute() -> None:
            mosaic_gpu.set_max_registers(plan.registers, action="increase")
            pallas.run_scoped(self.compute, mosaic_gpu.ACC((ROWS, plan.width), jnp.float32))

    def copy(self) -> None:
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan, wait = self.plan, mosaic_gpu.barrier_wait
        rows, tokens = pallas.ds(self.first, ROWS * plan.down), pallas.ds(self.token, plan.width)

        @pallas.loop(0, plan.steps)
        def _step(step: Any) -> None:
            slot, place_in = lax.rem(step, plan.stages), self.split * plan.steps + step
            pallas.when(step >= plan.stages)(lambda: wait(self.barriers["words freed"].at[slot]))
            some = pallas.ds(place_in * (plan.words * plan.share), plan.words * plan.share)
            mosaic_gpu.copy_gmem_to_smem(
                self.refs["words"].at[rows, some], self.shared["words"].at[slot], self.barriers["words"].at[slot]
            )
            for part in range(plan.pieces):
                number = step * plan.pieces + part
                place = lax.rem(number, plan.ring)
                again = functools.partial(wait, self.barriers["inputs freed"].at[place])
                pallas.when(number >= plan.ring)(again)
                for share in range(plan.share):
                    start = (place_in * plan.share + share) * plan.inputs + part * plan.piece
                    mosaic_gpu.copy_gmem_to_smem(
                        self.refs["x"].at[tokens, pallas.ds(start, plan.piece)],
                        self.shared["inputs"].at[place, share],
                        self.barriers["inputs"].at[place],
                        collective_axes="cluster" if plan.cluster > 1 else None,
                    )

        # No program of a cluster may end while another one still writes to its shared memory.
        for number in range(plan.steps * plan.pieces - plan.ring, plan.steps * plan.pieces):
            wait(self.barriers["inputs freed"].at[number % plan.ring])

    def compute(self, sums: Any) -> None:
        mosaic_gpu = lowering()

        plan = self.plan
        state = self.decoder.begin(self.tile(0, 0))

        def step_ahead(step: Any, own: Any) -> Any:
            following = self.read(step + 1)
            self.step(step, state, own, sums)
            return following

        lax.fori_loop(0, plan.steps, step_ahead, self.read(0))
        total = sums[...]
        mosaic_gpu.barrier_arrive(self.barriers["ended"])
        self.finish(total)

    @property
    def share(self) -> Any:
        """Which of the warpgroups that share inputs this is."""
        return lax.rem(self.group, self.plan.share)

    @property
    def row(self) -> Any:
        """The first output of this warpgroup, of those of the program."""
        return lax.div(self.group, self.plan.share) * ROWS

    def tile(self, step: Any, block: int) -> Tile:
        plan = self.plan
        place = ((self.split * plan.steps + step) * plan.share + self.share) * plan.blocks + block
        return Tile(Warpgroup(), self.refs["extra"], self.first + self.row, place, self.decoder.order.run)

    def read(self, step: Any) -> list[Any]:
        return [self.decoder.read(self.tile(step, block)) for block in range(self.plan.blocks)]

    def step(self, step: Any, state: Any, own: Any, sums: Any) -> None:
        """Adds the products of one step to `sums`."""
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan, order, instructions = self.plan, self.decoder.order, Warpgroup()
        slot, rows = lax.rem(step, plan.stages), pallas.ds(self.row, ROWS)
        mosaic_gpu.barrier_wait(self.barriers["words"].at[slot])
        lines = []
        for at in range(0, plan.words, LINE):
            line = self.shared["words"].at[slot, rows, pallas.ds(self.share * plan.words + at, LINE)]
            lines.append(mosaic_gpu.load(line, layout=words_layout(), optimized=False))

        def words_at(at: int) -> Array:
            line, column = divmod(at, LINE)
            return lines[line][:, column : column + order.run]

        pairs: list[Array] = []
        some = min(plan.piece, DEPTH) // (2 * order.run)
        done = 0
        for block in range(plan.blocks):
            first = block * order.block_words
            planes = [words_at(first + plane * order.run) for plane in range(order.planes)]
            for found, scale in self.decoder.decode(instructions, state, own[block], planes):
                if scale is not None:
                    both = instructions.twice(scale.astype(jnp.float32))
                    found = [instructions.multiply_add(pair, both, None) for pair in found]
                pairs += found
                while len(pairs) >= some:
                    self.multiply(step, done, left_operand(pairs[:some]), sums)
                    pairs, done = pairs[some:], done + some * 2 * order.run
        assert not pairs and done == plan.inputs
        # Not before: reads of shared memory may still be under way when what follows them is.
        mosaic_gpu.barrier_arrive(self.barriers["words freed"].at[slot])

    def multiply(self, step: Any, done: int, weights: Array, sums: Any) -> None:
        """Adds the product of decoded weights with a step's inputs from `done` on."""
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan, depth = self.plan, weights.shape[1]
        part, column = divmod(done, plan.piece)
        number = step * plan.pieces + part
        place, last = lax.rem(number, plan.ring), done + depth == plan.inputs
        if column == 0:
            mosaic_gpu.barrier_wait(self.barriers["inputs"].at[place])
        inputs = self.shared["inputs"].at[place, self.share, :, pallas.ds(column, depth)]
        mosaic_gpu.wgmma(sums, weights, inputs.transpose((1, 0)))
        # All but this one have ended then. At the end of a step this one too: the compiler gives its registers to
        # the next step without regard to it.
        mosaic_gpu.wgmma_wait(0 if last else 1)
        if column == 0 and part:
            mosaic_gpu.barrier_arrive(self.barriers["inputs freed"].at[lax.rem(number - 1, plan.ring)])
        if last:
            mosaic_gpu.barrier_arrive(self.barriers["inputs freed"].at[place])

    def finish(self, total: Array) -> None:
        """Adds the sums of warpgroups that shared inputs, then those of programs that did, and writes them."""
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan, place = self.plan, lax.div(self.group, self.plan.share)
        if plan.share == 1:
            self.exchange(total, place)
            return

        @pallas.when(self.share > 0)
        def _give() -> None:
            # Nobody reads inputs any more, which lay where sums do, and results below.
            mosaic_gpu.barrier_wait(self.barriers["ended"])
            store(self.shared["sums"].at[place, self.share - 1], total)
            mosaic_gpu.barrier_arrive(self.barriers["sums"])

        @pallas.when(self.share == 0)
        def _take() -> None:
            mosaic_gpu.barrier_wait(self.barriers["sums"])
            whole = total
            for other in range(plan.share - 1):
                part = self.shared["sums"].at[place, other]
                whole += mosaic_gpu.load(part, layout=mosaic_gpu.Layout.WGMMA, optimized=False)
            self.exchange(whole, place)

    def exchange(self, total: Array, place: Any) -> None:
        """Gives each program that shared inputs the sums of its tokens, and writes those of this one.

        Through global memory, which is the cache here: a kernel that adds them afterwards would read all of them.
        """
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan = self.plan
        if plan.split == 1:
            self.write(total, place, 0)
            return
        across, row = lax.axis_index("tokens"), self.first + self.row
        rows, first = pallas.ds(row, ROWS), (across * (self.refs["given"].shape[3] // ROWS) + lax.div(row, ROWS))
        parts = [(owner, slice(owner * plan.owned, (owner + 1) * plan.owned)) for owner in range(plan.owners)]
        for owner, part in parts:

            @pallas.when(self.split != owner)
            def _give(owner: int = owner, part: slice = part) -> None:
                sender = lax.rem(self.split - owner - 1 + plan.split, plan.split)
                store(self.refs["given"].at[owner, sender, across, rows], total[:, part])

        mosaic_gpu.barrier_arrive(self.barriers["given"].at[place])
        mosaic_gpu.barrier_wait(self.barriers["given"].at[place])
        for owner, _ in parts:

            @pallas.when(self.split != owner)
            def _tell(owner: int = owner) -> None:
                mosaic_gpu.semaphore_signal(self.told.at[first * plan.owners + owner], memory_scope="gpu")

        for owner, part in parts:

            @pallas.when(self.split == owner)
            def _take(owner: int = owner, part: slice = part) -> None:
                told = self.told.at[first * plan.owners + owner]
                mosaic_gpu.semaphore_wait(told, plan.split - 1, decrement=False, memory_scope="gpu")
                whole = total[:, part]
                for sender in range(plan.split - 1):
                    other = self.refs["given"].at[owner, sender, across, rows]
                    whole += mosaic_gpu.load(other, layout=mosaic_gpu.Layout.WGMMA, optimized=False)
                self.write(whole, place, part.start)

    def write(self, total: Array, place: Any, start: int) -> None:
        """Sums of `owned` tokens from `start` on.

        Through shared memory, for whole lines: neighbouring outputs of a token lie in several lanes.
        """
        from jax.experimental import pallas

        mosaic_gpu = lowering()

        plan, here = self.plan, self.shared["results"].at[place]
        rows, tokens = pallas.ds(self.first + self.row, ROWS), pallas.ds(self.token + start, plan.owned)
        for ref in self.refs["units"]:
            columns = mosaic_gpu.Layout.WGMMA.reduce(0)
            unit = mosaic_gpu.load(ref.at[tokens], layout=columns, optimized=False)
            total = total * lax.broadcast_in_dim(unit, total.shape, (1,))
        total = mosaic_gpu.layout_cast(total.astype(plan.dtype), mosaic_gpu.Layout.WGMMA_TRANSPOSED)
        mosaic_gpu.barrier_wait(self.barriers["ended"])
        here.transpose((1, 0))[...] = total
        mosaic_gpu.commit_smem()
        mosaic_gpu.copy_smem_to_gmem(here, self.refs["out"].at[tokens, rows])
        mosaic_gpu.wait_smem_to_gmem(0)


def _whole(x: Array, tile: tuple[int, int]) -> Array:
    """`x` with zeros behind, so that each axis is shorter than a tile or whole tiles, as copies want it."""
    pads = [-size % each if size > each else 0 for size, each in zip(x.shape, tile, strict=True)]
    return jnp.pad(x, [(0, pad) for pad in pads]) if any(pads) else x


def _in_range(x: Float[Array, "tokens in"]) -> tuple[Float[Array, "tokens in"], Float[Array, " tokens"]]:
    """`x` over a power of two for each token, so that float16 holds what bfloat16 did, and those powers."""
    wide = x.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(wide), axis=1))
    # Below the largest float16; what is 2^-30 of a token's largest input or less has fewer digits then.
    unit = jnp.ldexp(jnp.float32(1), jnp.clip(exponent - 15, -100, 112))
    return wide / unit[:, None], unit
