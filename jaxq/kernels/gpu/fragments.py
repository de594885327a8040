"""What a kernel in Pallas' Mosaic GPU lowering keeps in registers: words of codes, and weights decoded from them.

An array of `(64, words)` is spread over the four warps of a warpgroup as `wgmma` takes its left operand: the
halves of a word are two neighbouring inputs, as a register of that operand has them. So decoded weights never pass
through memory, and a decoder (`weights.Decoder`) is the same as for other kernels: operations on each element.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float16

from jaxq.kernels.gpu.lanes import Assembly, Words

#: Outputs of a warpgroup: the rows of the left operand of `wgmma`.
ROWS = 64


def lowering() -> Any:
    """Pallas' module for Mosaic GPU, which not every jax has, nor with the same names."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def store(ref: Any, value: Array) -> None:
    """`ref[...] = value`, where lanes may meet in banks of memory: from jax 0.12 on an assignment refuses that."""
    mosaic_gpu = lowering()
    if hasattr(mosaic_gpu, "store"):
        mosaic_gpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def words_layout() -> Any:
    """Of `(64, words)`: lane `4 r + q` of a warp has words `q + 4 m` of rows `r` and `r + 8`."""
    from jax.experimental.mosaic import gpu as mosaic

    mosaic_gpu = lowering()

    tiling = mosaic.fragmented_array.Tiling(((64, 4), (16, 4), (8, 4), (1,)))
    return mosaic_gpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


class Warpgroup(Assembly):
    """`Instructions` for a Pallas kernel that is lowered through Mosaic GPU; arrays are `(64, words)`."""

    def run(self, text: str, *words: Array) -> Words:
        return _assembly(text, *words)

    def twice(self, value: Array) -> Words:
        """A pair of a float32, rounded to float16, with itself."""
        return self.run("{ .reg .b16 h; cvt.rn.f16.f32 h, $1; mov.b32 $0, {h, h}; }", value)


def _assembly(text: str, *operands: Array) -> Words:
    """Runs PTX of which $0 is the result, on each register."""
    from jax.experimental.mosaic import gpu as mosaic

    mosaic_gpu = lowering()

    ir, llvm, _ = _dialects()
    layout, shape = words_layout(), max((x.shape for x in operands), key=len)
    laid = [mosaic_gpu.layout_cast(jnp.broadcast_to(x, shape), layout) for x in operands]

    def each(_: Any, *arrays: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        kinds = ["f" if isinstance(x.mlir_dtype, ir.F32Type) else "r" for x in arrays]
        found = np.empty_like(arrays[0].registers)
        for at in np.ndindex(found.shape):
            singles = [_single(x.registers[at]) for x in arrays]
            value = llvm.inline_asm(word, singles, text, ",".join(["=r", *kinds]), has_side_effects=False)
            found[at] = _vector(value)
        return mosaic.FragmentedArray(_registers=found, _layout=layout.to_mgpu(), _is_signed=False)

    result = mosaic_gpu.ShapeDtypeStruct(shape, jnp.uint32, layout=layout)
    return mosaic_gpu.inline_mgpu(arg_types=(layout,) * len(laid), return_type=result)(each)(*laid)


def _dialects() -> Any:
    from jax._src.lib.mlir.dialects import llvm, vector

    mlir: Any = importlib.import_module("jax._src.lib.mlir")
    return mlir.ir, llvm, vector


def _constant(value: int) -> Any:
    ir, llvm, _ = _dialects()
    word = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(word, ir.IntegerAttr.get(word, value)).result


def _single(register: Any) -> Any:
    """The element of a vector of one."""
    _, llvm, _ = _dialects()
    return llvm.extractelement(register, _constant(0))


def _vector(value: Any) -> Any:
    """A vector of one element."""
    ir, _, vector = _dialects()
    return vector.broadcast(ir.VectorType.get((1,), value.type), value)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What decoders read of a weight: a block of the outputs of a warpgroup. See `weights.Tile`."""

    instructions: Warpgroup
    refs: tuple[Any, ...]
    first: Array
    blocks: Array
    run: int

    def load(self, place: int, index: Array | int, width: int) -> Array:
        """Element `index` of each output's `width` of the array at `place`."""
        return gathered(self.refs[place], self.first, index, width, self.run)


def gathered(ref: Any, first: Array, index: Array | int, width: int, run: int) -> Array:
    """`ref[(first + row) * width + index]`, `(64, run)`, the same in each column; integers as uint32."""
    from jax.experimental.mosaic import gpu as mosaic

    mosaic_gpu = lowering()

    ir, llvm, _ = _dialects()
    layout, shape = words_layout(), (ROWS, run)
    integer = jnp.issubdtype(ref.dtype, jnp.integer)
    rows = ref.shape[0] // width
    # What fills up the last tile or step reads what the last output or group has, and does not count.
    index = jnp.minimum(jnp.asarray(index, jnp.int32), width - 1)

    def read(_: Any, source: Any, first: Any, index: Any) -> Any:
        from jax._src.lib.mlir.dialects import arith

        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        element = ir.MemRefType(source.type).element_type
        base, first, index = mosaic.utils.memref_ptr(source), first.registers.item(), index.registers.item()

        def at_element(pointer: Any, place: Any) -> Any:
            return llvm.getelementptr(pointer.type, pointer, [place], [-(2**31)], element, no_wrap_flags=0)

        # One address for all rows, which a scalar unit computes, and an offset of each row that does not change.
        base = at_element(base, arith.extui(i64, index))
        inner = layout.to_mgpu()
        found = np.empty(inner.registers_shape(shape), dtype=object)
        seen: dict[Any, Any] = {}
        for at, (row, _) in zip(np.ndindex(found.shape), inner.thread_idxs(shape), strict=True):
            half = at[4]
            if half not in seen:
                row = arith.index_cast(i32, row) if isinstance(row.type, ir.IndexType) else row
                row = arith.minui(arith.addi(first, row), _constant(rows - 1))
                offset = arith.extui(i64, arith.muli(row, _constant(width)))
                value = llvm.load(element, at_element(base, offset))
                if integer and ir.IntegerType(element).width < 32:
                    value = arith.extui(i32, value)
                seen[half] = _vector(value)
            found[at] = seen[half]
        return mosaic.FragmentedArray(_registers=found, _layout=inner, _is_signed=False if integer else None)

    dtype = jnp.uint32 if integer else ref.dtype
    result = mosaic_gpu.ShapeDtypeStruct(shape, dtype, layout=layout)
    scalar = mosaic_gpu.Layout.WG_SPLAT(())
    types = (mosaic_gpu.RefType(), scalar, scalar)
    return mosaic_gpu.inline_mgpu(arg_types=types, return_type=result)(read)(ref, first, index)


def left_operand(pairs: list[Words]) -> Float16[Array, "64 inputs"]:
    """`(64, 2 run pairs)` from the pairs of `run` words, `(64, run)` each, in the order of inputs."""
    from jax.experimental.mosaic import gpu as mosaic

    mosaic_gpu = lowering()

    ir, _, vector = _dialects()
    layout, run = words_layout(), pairs[0].shape[1]
    laid = [mosaic_gpu.layout_cast(pair, layout) for pair in pairs]
    shape = (ROWS, 2 * run * len(pairs))

    def join(_: Any, *arrays: Any) -> Any:
        two, inner = ir.VectorType.get((2,), ir.F16Type.get()), mosaic.WGMMA_LAYOUT
        found = np.empty(inner.registers_shape(shape), dtype=object)
        for at in np.ndindex(found.shape):
            # Tiles of eight inputs: those of one pair and four words of each row.
            which, tile = divmod(at[1], run // 4)
            found[at] = vector.bitcast(two, arrays[which].registers[(at[0], tile, *at[2:])])
        return mosaic.FragmentedArray(_registers=found, _layout=inner, _is_signed=None)

    result = mosaic_gpu.ShapeDtypeStruct(shape, jnp.float16, layout=mosaic_gpu.Layout.WGMMA)
    return mosaic_gpu.inline_mgpu(arg_types=(layout,) * len(laid), return_type=result)(join)(*laid)
